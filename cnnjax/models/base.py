"""What every network has in common: stages, an input size, a name in the registry."""

import collections
import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cnnjax.nn import check_fill
from cnnjax.runtime.types import AnyArray


class Network(nn.Module):
    """An image classifier [batch, height, width, channels] -> logits [batch, num_classes], written as a walk through its stages.

    A subclass defines `walk`, which yields (stage name, map) at falling resolution and, last, ("logits", logits). Modules
    are named so that a parameter's path, joined with dots, is torchvision's key (`cnnjax.weights`); a name may hold dots.
    `padding` is the fill of every convolution and pool (`cnnjax.nn.padding`), `dtype` that of the computation: parameters
    stay float32. `axis_name` is the device axis over which BatchNorm takes its statistics.
    """

    num_classes: int = 1000
    padding: str = "zeros"
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    input_shape: tuple[int, int, int] = (
        224,
        224,
        3,
    )  # height, width and channels that the publication uses

    def __post_init__(self):
        check_fill(self.padding)
        if self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} is not a positive number")
        super().__post_init__()

    @nn.nowrap
    def walk(
        self, x: Float[AnyArray, "batch height width channels"], train: bool
    ) -> Iterator[tuple[str, Array]]:
        raise NotImplementedError

    @nn.compact
    def _run(self, x, train, last):
        if x.ndim != 4:
            raise ValueError(f"an input of shape {x.shape} is not [batch, height, width, channels]")
        maps = collections.OrderedDict()  # a plain dict would come out of jit in alphabetical order
        for name, y in self.walk(x, train):
            maps[name] = y
            if name == last:
                return maps
        raise ValueError(
            f"last={last!r} is not a stage of this network; its stages are {', '.join(list(maps)[:-1])}"
        )

    def __call__(
        self, x: Float[AnyArray, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch ..."]:
        """Returns logits; `train` turns on dropout and BatchNorm's batch statistics."""
        return self._run(x, train, "logits")["logits"].astype(jnp.float32)

    def stages(
        self,
        x: Float[AnyArray, "batch height width channels"],
        train: bool = False,
        last: str | None = None,
    ) -> collections.OrderedDict[str, Float[Array, "batch ..."]]:
        """Returns the named activations in order, up to the stage `last`, which need no parameters of what comes after it.

        Raises `ValueError` if there is no stage of that name.
        """
        maps = self._run(x, train, last or "logits")
        maps.pop("logits", None)
        return maps


_REGISTRY: dict[str, Callable[..., Network]] = {}


def register(name: str, build: Callable[..., Network]) -> None:
    """Makes `build(**fields)` the network called `name`."""
    if name in _REGISTRY:
        raise ValueError(f"model {name!r} is registered twice")
    _REGISTRY[name] = build


def list_models(pattern: str = "*") -> list[str]:
    """The registered names that match a shell pattern, such as `*vgg*`, in alphabetical order."""
    return sorted(fnmatch.filter(_REGISTRY, pattern))


def create_model(name: str, **fields) -> Network:
    """Builds a network by name; `fields` are `num_classes`, `padding`, `dtype`, `axis_name` and the family's own.

    Raises `ValueError`, with the nearest names, for an unknown model, and for a field that it does not have.
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
                f"{field}={fields[field]!r} is not a field of {name}; it accepts {', '.join(accepted)}"
            )
    return build(**fields)
