"""Learning-rate schedules.

All but "plateau" are tables of every step's rate, made beforehand. "plateau" follows a metric.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping

import ml_collections
import numpy as np
import optax

from cnnjax.runtime import configuration
from cnnjax.train import defaults

_LOG = logging.getLogger("cnnjax")
# The keys that each schedule reads, besides `name`, `learning_rate` and `warmup_epochs`.
KEYS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "step": ("factor", "epochs", "every"),
    "cosine": (),
    "restarts": ("every",),
    "plateau": (
        "factor",
        "metric",
        "patience",
        "mode",
        "threshold",
        "threshold_mode",
        "cooldown",
        "min_lr",
    ),
}
NAMES = tuple(KEYS)
# The metrics of the validation images that "plateau" may follow, and whether smaller or larger is
# better.
_MODES = {"error": "min", "loss": "min", "accuracy": "max"}


def settings(schedule: Mapping | ml_collections.ConfigDict) -> dict:
    """Completes a schedule's settings with their defaults.

    Raises:
      ValueError: for a wrong name, key or value.
    """
    name = schedule.get("name")
    if name not in NAMES:
        raise ValueError(f"schedule.name={name!r} is not one of {', '.join(NAMES)}")
    # A learning rate must be given.
    complete = defaults.get_config().schedule.to_dict() | {"learning_rate": None}
    for key in schedule:
        if key not in complete:
            raise ValueError(
                f"schedule.{key}={schedule[key]!r} is not a key of schedules; they have "
                f"{', '.join(complete)}"
            )
    complete |= dict(schedule)
    for key in ("learning_rate", "warmup_epochs", "every"):
        configuration.check_least(f"schedule.{key}", complete[key], 0)
    if name == "plateau":
        _check_plateau(complete)
    if name == "restarts" and not complete["every"] > 0:
        raise ValueError(
            f"schedule.every={complete['every']!r} is not a positive number of epochs, which "
            "schedule.name='restarts' needs"
        )
    if name == "step":
        _check_steps(complete)
    return complete


def _check_plateau(complete: dict) -> None:
    Plateau.of(complete)
    metric = complete["metric"]
    mode = complete["mode"]
    if _MODES.get(metric) != mode:
        pairs = [f"{name!r} with {required!r}" for name, required in _MODES.items()]
        raise ValueError(
            f"schedule.metric={metric!r} with schedule.mode={mode!r} is not one of "
            f"{', '.join(pairs)}"
        )


def _check_steps(complete: dict) -> None:
    epochs = list(complete["epochs"])
    every = complete["every"]
    if not 0 < complete["factor"] < math.inf:
        raise ValueError(f"schedule.factor={complete['factor']!r} is not a positive number")
    if bool(epochs) == bool(every):
        raise ValueError(
            f"schedule.epochs={tuple(epochs)} and schedule.every={every}: give one of them, a list "
            "of epochs or a positive number of epochs"
        )
    are_numbers = all(configuration.is_number(epoch) for epoch in epochs)
    is_rising = are_numbers and epochs == sorted(set(epochs))
    if epochs and not (is_rising and epochs[0] >= 1):
        raise ValueError(f"schedule.epochs={tuple(epochs)} are not rising numbers of at least 1")


def learning_rates(
    schedule: Mapping | ml_collections.ConfigDict, steps_per_epoch: int, epochs: int
) -> np.ndarray:
    """Computes the learning rate of every step.

    - "constant": the same everywhere.
    - "step": multiplied by `factor` after each of `epochs` (10: the first 10 epochs have the rate
      before), or every `every` epochs. The lectures' schedules are every=5 with factor=1/1.5, and
      epochs=(10, 14, 18) with factor=1/2.
    - "cosine": falls to almost zero at the last step.
    - "restarts": falls to almost zero along a cosine in `every` epochs and starts anew (Loshchilov
      and Hutter 2017, arXiv 1608.03983). Snapshots (Huang et al. 2017, arXiv 1704.00109) are taken
      where it is lowest.
    - "plateau": constant; `Plateau` scales it.

    The rate first rises linearly from zero for `warmup_epochs`. A cosine then takes the rest.

    Args:
      schedule: a configuration's `schedule`.
      steps_per_epoch: the number of steps of an epoch.
      epochs: the number of epochs.

    Returns:
      float32 [epochs * steps_per_epoch].

    Raises:
      ValueError: for wrong settings.
    """
    complete = settings(schedule)
    total = steps_per_epoch * epochs
    rate = complete["learning_rate"]
    warmup = round(complete["warmup_epochs"] * steps_per_epoch)
    name = schedule["name"]
    if warmup >= total and name != "constant":
        _LOG.warning(
            "schedule.warmup_epochs=%g covers all epochs=%d: schedule.name=%r never begins",
            complete["warmup_epochs"],
            epochs,
            name,
        )
    if name == "step":
        epochs_of_change = complete["epochs"]
        late = [epoch for epoch in epochs_of_change if epoch >= epochs]
        if late:
            _LOG.warning(
                "schedule.epochs=%s: the rate does not change at %s, since epochs=%d",
                tuple(epochs_of_change),
                ", ".join(f"{epoch:g}" for epoch in late),
                epochs,
            )
        if not epochs_of_change:
            epochs_of_change = np.arange(complete["every"], epochs, complete["every"])
        factors: dict[int, float] = {}
        for epoch in epochs_of_change:
            # Counted from the end of the warmup, as `join_schedules` does.
            step = round(epoch * steps_per_epoch) - warmup
            # Several epochs may round to one step.
            factors[step] = factors.get(step, 1.0) * complete["factor"]
        after_warmup = optax.piecewise_constant_schedule(rate, factors)
    elif name == "cosine":
        after_warmup = optax.cosine_decay_schedule(rate, max(1, total - warmup))
    elif name == "restarts":
        period = max(1, round(complete["every"] * steps_per_epoch))
        cycle = optax.cosine_decay_schedule(rate, period)
        after_warmup = lambda count: cycle(count % period)
    else:
        after_warmup = optax.constant_schedule(rate)
    warmup_schedule = optax.linear_schedule(0.0, rate, max(1, warmup))
    joined = optax.join_schedules([warmup_schedule, after_warmup], [warmup])
    rates = joined(np.arange(total, dtype=np.float32))
    # A constant schedule gives one number for all steps.
    return np.broadcast_to(np.asarray(rates, np.float32), total)


@dataclasses.dataclass
class Plateau:
    """PyTorch's ReduceLROnPlateau, rule for rule.

    The rate is multiplied by `factor` at the first check after `patience` checks in a row without
    improvement. It does not fall below `min_lr`, nor by less than 1e-8. A NaN is no improvement.

    Attributes:
      learning_rate: the schedule's; `scale` times it is the rate to use.
      factor: between 0 and 1.
      patience: a number of checks.
      mode: "min" if a smaller metric is better, "max" if a larger one is.
      threshold: an improvement is by more than this.
      threshold_mode: "rel", relative to the best, or "abs".
      cooldown: the number of checks after a reduction that do not count.
      min_lr: the smallest rate.

    Raises:
      ValueError: for an unknown `mode` or `threshold_mode`, a `factor` that is not between 0 and 1,
        or a negative `patience`, `threshold`, `cooldown` or `min_lr`.
    """

    learning_rate: float
    factor: float = 0.1
    patience: int = 10
    mode: str = "min"
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0
    min_lr: float = 0.0

    def __post_init__(self):
        accepted = {"mode": ("min", "max"), "threshold_mode": ("rel", "abs")}
        for name, values in accepted.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"schedule.{name}={value!r} is not one of {', '.join(values)}")
        if not 0 < self.factor < 1:
            raise ValueError(
                f"schedule.factor={self.factor!r} is not between 0 and 1, both excluded"
            )
        for name in ("patience", "threshold", "cooldown", "min_lr"):
            configuration.check_least(f"schedule.{name}", getattr(self, name), 0)
        self.rate = self.learning_rate
        self.best = math.inf if self.mode == "min" else -math.inf
        self.bad = 0
        self.cooling = 0

    @classmethod
    def of(cls, complete: dict) -> "Plateau":
        """Builds the rule from what `settings` returns; raises `ValueError` for wrong values."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: complete[name] for name in names})

    @property
    def scale(self) -> float:
        """Returns the present rate as a multiple of the schedule's `learning_rate`."""
        return self.rate / self.learning_rate if self.learning_rate else 1.0

    def _improves(self, metric: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        if self.threshold_mode == "rel":
            bound = self.best * (1 + sign * self.threshold)
        else:
            bound = self.best + sign * self.threshold
        return metric > bound if self.mode == "max" else metric < bound

    def update(self, metric: float) -> None:
        """Checks the metric once."""
        if self._improves(metric):
            self.best = metric
            self.bad = 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad = 0
        if self.bad > self.patience:
            lower = max(self.rate * self.factor, self.min_lr)
            if self.rate - lower > 1e-8:
                self.rate = lower
            self.cooling = self.cooldown
            self.bad = 0

    def state(self) -> dict:
        """Returns the rule's state for a checkpoint, as JSON.

        JSON has no infinity: without a metric so far, the best is None.
        """
        return {
            "rate": self.rate,
            "best": self.best if math.isfinite(self.best) else None,
            "bad": self.bad,
            "cooling": self.cooling,
        }

    def restore(self, state: dict) -> None:
        """Continues from what `state` returned."""
        self.rate = state["rate"]
        self.bad = state["bad"]
        self.cooling = state["cooling"]
        if state["best"] is not None:
            self.best = state["best"]
