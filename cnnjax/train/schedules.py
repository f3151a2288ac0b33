"""Learning rates: a table of every step's made beforehand, and the plateau rule, which watches a
metric."""

import dataclasses
import math
from collections.abc import Mapping

import ml_collections
import numpy as np
import optax

from cnnjax.train.defaults import SCHEDULE

NAMES = ("constant", "step", "cosine", "restarts", "plateau")


def settings(schedule: Mapping | ml_collections.ConfigDict) -> dict:
    """A schedule's settings with their defaults. Raises `ValueError` for a wrong name, key or
    value."""
    name = schedule.get("name")
    if name not in NAMES:
        raise ValueError(f"schedule.name={name!r} is not one of {', '.join(NAMES)}")
    for key in schedule:
        if key != "name" and key not in SCHEDULE:
            raise ValueError(
                f"schedule.{key}={schedule[key]!r} is not a key of schedules; they have "
                f"{', '.join(SCHEDULE)}"
            )
    found = SCHEDULE | dict(schedule)
    if found["learning_rate"] is None or not found["learning_rate"] >= 0:
        raise ValueError(
            f"schedule.learning_rate={found['learning_rate']!r} is not a number of at least 0"
        )
    if found["warmup_epochs"] < 0:
        raise ValueError(
            f"schedule.warmup_epochs={found['warmup_epochs']!r} is not a number of at least 0"
        )
    if name == "plateau":
        Plateau(**{field.name: found[field.name] for field in dataclasses.fields(Plateau)})
        modes = {"error": "min", "loss": "min", "accuracy": "max"}  # of the validation images
        if modes.get(found["metric"]) != found["mode"]:
            raise ValueError(
                f"schedule.metric={found['metric']!r} with schedule.mode={found['mode']!r} is "
                "not one of "
                + ", ".join(f"{metric!r} with {mode!r}" for metric, mode in modes.items())
            )
    if name == "restarts" and not found["every"] > 0:
        raise ValueError(
            f"schedule.every={found['every']!r} is not a positive number of epochs, which "
            "schedule.name='restarts' needs"
        )
    if name == "step":
        epochs = list(found["epochs"])
        if not 0 < found["factor"]:
            raise ValueError(f"schedule.factor={found['factor']!r} is not a positive number")
        if bool(epochs) == bool(found["every"]) or found["every"] < 0:
            raise ValueError(
                f"schedule.epochs={tuple(epochs)} and schedule.every={found['every']}: give one "
                "of them, a list of epochs or "
                "a positive number of epochs"
            )
        if epochs != sorted(set(epochs)) or epochs[:1] < [1] and epochs:
            raise ValueError(f"schedule.epochs={tuple(epochs)} are not rising positive numbers")
    return found


def learning_rates(
    schedule: Mapping | ml_collections.ConfigDict, steps_per_epoch: int, epochs: int
) -> np.ndarray:
    """The learning rate of every step, float32 [epochs * steps_per_epoch].

    "step" multiplies by `factor` after each of `epochs` (10: the first 10 epochs have the rate
    before it) or after `every` so many: the lectures' schedules are every=5 with factor=1/1.5, and
    epochs=(10, 14, 18) with factor=1/2. "cosine" falls to zero at the last step, "restarts" at the
    end of `every` so many epochs, after which it starts anew (Loshchilov and Hutter 2017, arXiv
    1608.03983; the snapshots of Huang et al. 2017, arXiv 1704.00109, are taken there).
    `warmup_epochs` rise linearly from zero first; a cosine then takes the rest. "plateau" is
    constant: `Plateau` scales it. Raises `ValueError` for wrong settings.
    """
    found, total = settings(schedule), steps_per_epoch * epochs
    rate, warmup = found["learning_rate"], round(found["warmup_epochs"] * steps_per_epoch)
    if schedule["name"] == "step":
        changes = found["epochs"] or range(found["every"], epochs, found["every"])
        after = optax.piecewise_constant_schedule(
            rate, {int(epoch * steps_per_epoch) - warmup: found["factor"] for epoch in changes}
        )
    elif schedule["name"] == "cosine":
        after = optax.cosine_decay_schedule(rate, max(1, total - warmup))
    elif schedule["name"] == "restarts":
        period = max(1, round(found["every"] * steps_per_epoch))
        cycle = optax.cosine_decay_schedule(rate, period)
        after = lambda count: cycle(count % period)
    else:
        after = optax.constant_schedule(rate)
    whole = optax.join_schedules(
        [optax.linear_schedule(0.0, rate, max(1, warmup)), after], [warmup]
    )
    return np.broadcast_to(np.asarray(whole(np.arange(total, dtype=np.float32)), np.float32), total)


@dataclasses.dataclass
class Plateau:
    """PyTorch's ReduceLROnPlateau, rule for rule: `scale` times the schedule's learning rate is the
    rate to use.

    The rate is multiplied by `factor` at the first check after `patience` in a row that were no
    improvement by more than `threshold` (relative, "rel", or absolute, "abs") over the best; the
    `cooldown` checks after that count for nothing. It does not fall below `min_lr`, nor by less
    than 1e-8. A NaN is no improvement.
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
        for name, accepted in (("mode", ("min", "max")), ("threshold_mode", ("rel", "abs"))):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"schedule.{name}={getattr(self, name)!r} is not one of {', '.join(accepted)}"
                )
        if not 0 < self.factor < 1:
            raise ValueError(
                f"schedule.factor={self.factor!r} is not between 0 and 1, both excluded"
            )
        for name in ("patience", "threshold", "cooldown", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"schedule.{name}={getattr(self, name)!r} is not a number of at least 0"
                )
        self.rate = self.learning_rate
        self.best = math.inf if self.mode == "min" else -math.inf
        self.bad = self.cooling = 0

    @classmethod
    def of(cls, schedule: Mapping | ml_collections.ConfigDict) -> "Plateau":
        """The rule of a schedule's settings; raises `ValueError` where they are wrong."""
        found = settings(schedule)
        return cls(**{field.name: found[field.name] for field in dataclasses.fields(cls)})

    @property
    def scale(self) -> float:
        return self.rate / self.learning_rate if self.learning_rate else 1.0

    def _improves(self, metric: float) -> bool:
        sign = 1 if self.mode == "max" else -1
        bound = (
            self.best * (1 + sign * self.threshold)
            if self.threshold_mode == "rel"
            else self.best + sign * self.threshold
        )
        return metric > bound if self.mode == "max" else metric < bound

    def update(self, metric: float) -> None:
        """Takes one check of the metric."""
        if self._improves(metric):
            self.best, self.bad = metric, 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling, self.bad = self.cooling - 1, 0
        if self.bad > self.patience:
            lower = max(self.rate * self.factor, self.min_lr)
            self.rate = lower if self.rate - lower > 1e-8 else self.rate
            self.cooling, self.bad = self.cooldown, 0

    def state(self) -> dict:
        """What the rule remembers, for a checkpoint; JSON has no infinity, so a best that is not
        yet known is None."""
        return {
            "rate": self.rate,
            "best": self.best if math.isfinite(self.best) else None,
            "bad": self.bad,
            "cooling": self.cooling,
        }

    def restore(self, state: dict) -> None:
        """Takes up where `state()` was."""
        self.rate, self.bad, self.cooling = state["rate"], state["bad"], state["cooling"]
        self.best = self.best if state["best"] is None else state["best"]
