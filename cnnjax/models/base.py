"""What every network has in common: stages, an input size, a name in the registry."""

import collections
import difflib
import fnmatch
import inspect
from collections.abc import Callable, Generator, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cnnjax.nn import check_fill
from cnnjax.runtime.types import AnyArray

# What a network goes on with in place of the map of a stage, by the name of the stage.
Replacements = Mapping[str, Callable[[Array], Array]]


class Network(nn.Module):
    """An image classifier, written as a walk through its stages.

    A subclass defines `walk`, a generator: at falling resolution it yields (stage name, map) and
    takes back the map with which it goes on, as in `x = yield "layer1", x`; last it yields
    ("logits", logits). Modules are named so that a parameter's path, joined with dots, is
    torchvision's key (`cnnjax.weights`); a name may itself hold dots.

    - `num_classes`: number of logits.
    - `padding`: fill of every convolution and pool (`cnnjax.nn.padding`).
    - `dtype`: of the computation; parameters stay float32.
    - `axis_name`: device axis over which BatchNorm takes its statistics.
    - `input_shape`: height, width and channels of the publication's images.
    """

    num_classes: int = 1000
    padding: str = "zeros"
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    input_shape: tuple[int, int, int] = (224, 224, 3)

    def __post_init__(self):
        check_fill(self.padding)
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} is not a positive number")
        super().__post_init__()

    @nn.nowrap
    def walk(
        self, x: Float[AnyArray, "batch height width channels"], train: bool
    ) -> Generator[tuple[str, Array], Array, None]:
        raise NotImplementedError

    def __call__(
        self,
        x: Float[AnyArray, "batch height width channels"],
        train: bool = False,
        replace: Replacements | None = None,
    ) -> Float[Array, "batch ..."]:
        """Computes logits, float32.

        - `x`: images [batch, height, width, channels].
        - `train`: turns on dropout and BatchNorm's batch statistics.
        - `replace`: functions by the names of stages. The network goes on with what a function
          makes of its stage's map: with `{"layer1": lambda y: y.at[..., 3].set(0)}`, without
          that unit.

        Raises `ValueError` if the images do not fit or a stage is unknown.
        """
        logits = self._run(x, train, "logits", replace)["logits"]
        return logits.astype(jnp.float32)

    def stages(
        self,
        x: Float[AnyArray, "batch height width channels"],
        train: bool = False,
        last: str | None = None,
        replace: Replacements | None = None,
    ) -> collections.OrderedDict[str, Float[Array, "batch ..."]]:
        """Computes the maps of the stages, by name and in order.

        - `last`: the stage to stop at; parameters of what comes after it are not needed.
        - `replace`: as in `__call__`; the maps are those that the network goes on with.

        Raises `ValueError` if the images do not fit or a stage is unknown.
        """
        maps = self._run(x, train, last or "logits", replace)
        maps.pop("logits", None)
        return maps

    @nn.compact
    def _run(self, x, train, last, replace=None):
        if x.ndim != 4:
            raise ValueError(f"an input of shape {x.shape} is not [batch, height, width, channels]")
        replace = replace or {}
        # A plain dict would come out of jit in alphabetical order.
        maps = collections.OrderedDict()
        walk = self.walk(x, train)
        name, y = next(walk)
        while True:
            maps[name] = replace[name](y) if name in replace else y
            if name in (last, "logits"):
                break
            name, y = walk.send(maps[name])
        stages = ", ".join(stage for stage in maps if stage != "logits")
        if last not in maps:
            raise ValueError(
                f"last={last!r} is not a stage of this network; its stages are {stages}"
            )
        for stage in replace:
            if stage not in maps:
                raise ValueError(
                    f"replace={stage!r} is not a stage of this network up to {last!r}; "
                    f"those are {stages}"
                )
        return maps


_REGISTRY: dict[str, Callable[..., Network]] = {}


def register(name: str, build: Callable[..., Network]) -> None:
    """Makes `build(**fields)` the network called `name`."""
    if name in _REGISTRY:
        raise ValueError(f"model {name!r} is registered twice")
    _REGISTRY[name] = build


def list_models(pattern: str = "*") -> list[str]:
    """Lists the registered names that match a shell pattern, such as `*vgg*`, sorted."""
    return sorted(fnmatch.filter(_REGISTRY, pattern))


def create_model(name: str, **fields) -> Network:
    """Builds a network by name.

    - `fields`: `num_classes`, `padding`, `dtype`, `axis_name` and the family's own.

    Raises `ValueError`, with the nearest names, for an unknown model, and for a field that it does
    not have.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"known models: {', '.join(list_models())}"
        )
        raise ValueError(f"model={name!r} is not known; {hint}")
    build = _REGISTRY[name]
    accepted = [
        field for field in inspect.signature(build).parameters if field not in ("parent", "name")
    ]
    for field in fields:
        if field not in accepted:
            raise ValueError(
                f"{field}={fields[field]!r} is not a field of {name}; it accepts "
                f"{', '.join(accepted)}"
            )
    return build(**fields)
