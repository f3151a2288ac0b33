"""What all networks share: stages, an input size, a name in the registry."""

import collections
import difflib
import fnmatch
import functools
import inspect
import numbers
import os
import pathlib
import typing
from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cnnjax.nn import check_fill, check_sampling
from cnnjax.nn.geometry import check_map
from cnnjax.runtime import source
from cnnjax.runtime.configuration import is_number, is_whole, to_tuples
from cnnjax.runtime.paths import expand_user, sha256
from cnnjax.runtime.types import AnyArray

# Maps a stage's name to a function of its map; the network continues with what the function
# returns.
Replacements = Mapping[str, Callable[[Array], Array]]


# Fields that families share by name: sizes or tuples of sizes, and rates of dropout.
_SIZES = ("input_shape", "hidden", "depths", "widths")
_RATES = ("dropout", "dropout_aux")


class Network(nn.Module):
    """An image classifier, written as a walk through its stages.

    A subclass defines `walk`, a generator: at falling resolution it yields (stage name, map) and
    takes back the map to continue with, as in `x = yield "layer1", x`; last it yields
    ("logits", logits). Modules are named so that a parameter's path, joined with dots, is
    torchvision's key (`cnnjax.weights`); a name may itself hold dots.

    Attributes:
      num_classes: number of logits.
      padding: fill of every convolution and pool (`cnnjax.nn.padding`).
      sampling: how strided convolutions and pools reduce the resolution (`cnnjax.nn.sampling`).
      dtype: type of the computation; parameters stay float32.
      axis_name: device axis over which BatchNorm takes its statistics.
      input_shape: height, width and channels of its images; the publication's by default.

    Raises `ValueError` if a field does not fit: an unknown padding or sampling, a dtype that is not
    floating point, fewer classes than 1, a size that is not above 0, or a rate of dropout that is
    not at least 0 and below 1.
    """

    # Names of further fields that hold sizes.
    _sizes: ClassVar[tuple[str, ...]] = ()
    # The weight of auxiliary classifiers' losses in training: Szegedy et al. 2014, section 5.
    auxiliary_weight: ClassVar[float] = 0.3

    num_classes: int = 1000
    padding: str = "zeros"
    sampling: str = "stride"
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    input_shape: tuple[int, int, int] = (224, 224, 3)

    def __post_init__(self):
        check_fill(self.padding, "padding")
        check_sampling(self.sampling)
        _check_dtype(self.dtype)
        if not is_whole(self.num_classes) or self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} is not a positive number of classes")
        for field in (*_SIZES, *self._sizes):
            _check_sizes(field, getattr(self, field, ()))
        for field in _RATES:
            _check_rate(field, getattr(self, field, 0.0))
        super().__post_init__()

    @nn.nowrap
    def walk(
        self, x: Float[AnyArray, "batch height width channels"], train: bool
    ) -> Generator[tuple[str, Array], Array, None]:
        """Yields (stage name, map), one stage after the other, and ("logits", logits) last."""
        raise NotImplementedError

    def __call__(
        self,
        x: Float[AnyArray, "batch height width channels"],
        train: bool = False,
        replace: Replacements | None = None,
    ) -> Float[Array, "batch ..."]:
        """Computes logits, float32.

        Args:
          x: images [batch, height, width, channels].
          train: turns on dropout and BatchNorm's batch statistics.
          replace: functions of a stage's map, by the name of the stage. The network continues with
            what the function returns: `{"layer1": lambda y: y.at[..., 3].set(0)}` switches off one
            unit.

        Raises `ValueError` if the images do not fit or are integers, or a stage is unknown.
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

        Args:
          x: images [batch, height, width, channels].
          train: as in `__call__`.
          last: the stage to stop at; parameters of later layers are not needed.
          replace: as in `__call__`; the maps returned are the replaced ones.

        Raises `ValueError` if the images do not fit or are integers, or a stage is unknown.
        """
        maps = self._run(x, train, last or "logits", replace)
        maps.pop("logits", None)
        return maps

    @nn.compact
    def _run(self, x, train, last, replace=None):
        check_map(x)
        replace = replace or {}
        # A plain dict would come out of jit in alphabetical order.
        maps = collections.OrderedDict()
        network = type(self).__name__
        walk = self.walk(x, train)
        if not isinstance(walk, Generator):
            raise ValueError(
                f"walk of {network} returns a {type(walk).__name__}; it is to yield its stages, "
                "and ('logits', logits) last"
            )
        # A generator starts with None.
        y = None
        while True:
            try:
                name, y = walk.send(y)
            except StopIteration:
                raise ValueError(
                    f"walk of {network} ends without yielding ('logits', logits)"
                ) from None
            if name in replace:
                y = replace[name](y)
            maps[name] = y
            if name in (last, "logits"):
                break
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


def _check_sizes(name: str, sizes: Any) -> None:
    """Raises `ValueError` if a size is not above 0; a user's field may hold other things."""
    is_tuple = isinstance(sizes, tuple)
    if any(is_number(size) and size <= 0 for size in (sizes if is_tuple else (sizes,))):
        accepted = "are not all positive numbers" if is_tuple else "is not a positive number"
        raise ValueError(f"{name}={sizes!r} {accepted}")


def _check_rate(name: str, rate: Any) -> None:
    """Raises `ValueError` if a rate is not in [0, 1); a user's field may be no number."""
    is_real = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    if is_real and not 0 <= rate < 1:
        raise ValueError(f"{name}={rate!r} is not a number of at least 0 and below 1")


def _check_dtype(dtype: DTypeLike) -> None:
    try:
        is_floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ValueError(
            f"dtype={dtype!r} is not a floating-point type, such as 'float32' or 'bfloat16'"
        )


# The registered networks by name, filled as the files that define them are imported.
_REGISTRY: dict[str, Callable[..., Network]] = {}
# The user's file that registered a name; networks of this package have none.
_FILES: dict[str, str] = {}


def register(name: str, build: Callable[..., Network]) -> None:
    """Registers `build(**fields)` as the network called `name`.

    A user's file may register its names again, since it may be imported twice.

    Raises `ValueError` if the name is another network's or has a colon.
    """
    if ":" in name:
        raise ValueError(f"model {name!r} has a colon, which stands between a file and a name")
    file = source.running_file()
    if file is None:
        file = _users_file(build)
    if name in _REGISTRY and (file is None or _FILES.get(name) != file):
        raise ValueError(f"model {name!r} is registered twice")
    _REGISTRY[name] = build
    if file is not None:
        _FILES[name] = file


def forget_files() -> None:
    """Counts all networks registered so far as this package's own.

    It does not matter which file imported them.
    """
    _FILES.clear()


def _users_file(build: Callable[..., Network]) -> str | None:
    """Returns the file that defines a network, or None.

    It is None for a network of this package and for one that no file defines.
    """
    while isinstance(build, functools.partial):
        build = build.func
    try:
        file = pathlib.Path(inspect.getfile(build)).resolve()
    # Defined at a prompt.
    except (TypeError, OSError):
        return None
    package = pathlib.Path(__file__).parents[1].resolve()
    return None if package in file.parents else str(file)


def list_models(pattern: str = "*") -> list[str]:
    """Lists the registered names that match a shell pattern, such as `*vgg*`, sorted."""
    return sorted(fnmatch.filter(_REGISTRY, pattern))


def name_with_file(name: str) -> str:
    """Returns the name of a network of a user's file as FILE.py:NAME.

    FILE is the whole path, so that the network is found from every folder. Names of other networks
    stay as they are.
    """
    file = _FILES.get(name, "")
    if pathlib.Path(file).is_file():
        return f"{file}:{name}"
    place, _, attribute = str(name).rpartition(":")
    if place.endswith(".py"):
        return f"{os.path.abspath(os.path.expanduser(place))}:{attribute}"
    return name


def digest_network(name: str) -> str | None:
    """Hashes the file of a user's network FILE.py:NAME; returns None for other networks."""
    file, _, _ = name.rpartition(":")
    return sha256(expand_user(file)) if file.endswith(".py") else None


def create_model(name: str, **fields) -> Network:
    """Builds a network by name.

    Args:
      name: a registered name, or FILE.py:NAME or package.module:NAME, where NAME is a subclass of
        `Network`, a function that returns one, or a name that the file registers.
      fields: `num_classes`, `padding`, `sampling`, `dtype`, `axis_name`, `input_shape` and the
        family's own.

    Raises `ValueError` if the model is unknown, naming the nearest names, if it does not have a
    field, or if a value has another type or does not fit (`Network`).
    """
    # Configuration files and command lines may give lists, which flax cannot hash.
    fields = {field: to_tuples(value) for field, value in fields.items()}
    build = _builder(name)
    parameters = _parameters(build)
    takes_any = any(
        parameter.kind is parameter.VAR_KEYWORD
        for parameter in inspect.signature(build).parameters.values()
    )
    for field, value in fields.items():
        if field in parameters:
            _check_type(field, value, parameters[field], name)
        elif not takes_any:
            raise ValueError(
                f"{field}={value!r} is not a field of {name}; it accepts {', '.join(parameters)}"
            )
    try:
        network = build(**fields)
    except TypeError as error:
        raise ValueError(f"model={name!r} cannot be built: {error}") from error
    if not isinstance(network, Network):
        raise ValueError(
            f"model={name!r} is a {type(network).__name__}, not a cnnjax.models.Network"
        )
    return network


def _builder(name: str) -> Callable[..., Network]:
    if not isinstance(name, str):
        raise ValueError(f"model={name!r} is not the name of a model, a string")
    if ":" in name:
        return _users_builder(name)
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=3)
        hint = f"known models: {', '.join(list_models())}, or FILE.py:NAME"
        if name.endswith(".py"):
            hint = f"expected {name}:NAME"
        elif near:
            hint = f"did you mean {' or '.join(near)}?"
        raise ValueError(f"model={name!r} is not known; {hint}")
    return _REGISTRY[name]


def _users_builder(name: str) -> Callable[..., Network]:
    """Returns the builder of the network FILE.py:NAME or package.module:NAME."""
    place, _, attribute = name.rpartition(":")
    import_network = source.import_file if place.endswith(".py") else source.import_module
    try:
        module = import_network(place)
    except ValueError as error:
        raise ValueError(f"model={name!r}: {error}") from error
    if attribute in _FILES and _FILES[attribute] == module.__file__:
        return _REGISTRY[attribute]
    build = getattr(module, attribute, None)
    if not callable(build):
        raise ValueError(f"model={name!r}: {place} has no network {attribute!r}")
    return build


def _parameters(build: Callable[..., Network]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of `build` that are fields.

    `parent` and `name` are Flax's.
    """
    parameters = {}
    for field, parameter in inspect.signature(build).parameters.items():
        if field not in ("parent", "name") and parameter.kind is not parameter.VAR_KEYWORD:
            parameters[field] = parameter
    return parameters


def _check_type(field: str, value: Any, parameter: inspect.Parameter, model: str) -> None:
    """Raises `ValueError` if a field's value has another type than its default.

    A word in place of a number is refused, for example, and so is a number in place of a word.
    """
    default = parameter.default
    if value is default:
        return
    expected = type(default).__name__
    if isinstance(default, bool):
        is_right = isinstance(value, bool)
    elif isinstance(default, int):
        is_right = is_whole(value)
    elif isinstance(default, float):
        is_right = is_number(value)
    elif isinstance(default, str):
        is_right = isinstance(value, str)
    elif typing.get_origin(parameter.annotation) is tuple:
        # An empty default does not show the type of the elements.
        expected = str(parameter.annotation)
        is_right = _is_annotated(value, parameter.annotation)
    elif isinstance(default, tuple):
        is_right = isinstance(value, (tuple, list))
    # A type of numbers can be called, too, but its field also takes the type's name.
    elif Callable in (parameter.annotation, typing.get_origin(parameter.annotation)):
        expected = "Callable"
        is_right = callable(value)
    else:
        is_right = True
    if not is_right:
        raise ValueError(f"{field}={value!r} is not of the type {expected}, as {model} expects")


def _is_annotated(value: Any, annotation: Any) -> bool:
    """Tells whether a value fits an annotation, such as `tuple[int, ...]`.

    It is called for a tuple, and again for each element.
    """
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = typing.get_args(annotation)
        if kinds[-1:] == (...,):
            kinds = kinds[:1] * len(value)
        return len(kinds) == len(value) and all(map(_is_annotated, value, kinds))
    if annotation is int:
        return is_whole(value)
    if annotation is str:
        return isinstance(value, str)
    return True
