"""What the units of a network look for: filters, maps, preferred images, saliency, occlusion, receptive fields, borders.

    python -m cnnjax.visualize levels --model squeezenet1_1 --weights FILE --photographs FOLDER --workdir runs/levels

Commands: filters, activations, maximize, patches, occlusion, grad-cam, field, equivariance, levels (`--help` lists the options of
each). A command writes COMMAND.png and results.json to its work directory. The functions above the figures take and return arrays:
`images` are [batch, height, width, channels] as the network takes them, `stage` is the name of one of the network's stages.
"""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import PIL.ImageOps
from jaxtyping import Array, Float, Int, Shaped, UInt8
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cnnjax import summary, weights
from cnnjax.data import photographs
from cnnjax.inspect import count_named
from cnnjax.models import Network, create_model
from cnnjax.nn import FILLS, relu_rule
from cnnjax.nn.activation import RELU
from cnnjax.position.encoder import normalize
from cnnjax.position.metrics import border_distance
from cnnjax.runtime import backend, command, workdir
from cnnjax.runtime.progress import progress
from cnnjax.runtime.types import AnyArray

RULES = ("gradient", "deconvnet", "guided")

# Luo et al. 2016 (arXiv 1701.04128), section 3: a pixel is in the effective field above 1 - 95.45 % of the strongest.
_IN_FIELD = 1 - 0.9545

# Of Lucid (lucid/optvis/param/color.py): the square root of the colors' covariance on ImageNet, and its scale.
_COLORS = np.array([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], np.float32)
_COLORS /= np.linalg.norm(_COLORS, axis=0).max()
_START, _RATE = (
    0.01,
    0.05,
)  # Lucid's standard deviation of the first spectrum, and its Adam's learning rate
_RATED = 32  # pixels: below, waves that add up to a pixel become so few that the rate must grow (to 0.5 for a filter of 3x3)
_BATCH = 16
_FLOOR = 1e-7  # what a logarithmic axis shows for an error of 0
_CELL = 48  # pixels, the least height of an image in a mosaic


@functools.cache
def stage_channels(model: Network) -> dict[str, int]:
    """The stages of a network in order, and how many channels each has, without computing them."""
    model = model.clone(padding="zeros")  # which changes neither
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    shapes = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="stages"), weights.variable_shapes(model), image
    )
    return {name: shape.shape[-1] for name, shape in shapes.items()}


def _check_stage(model, stage, channels=()):
    accepted = stage_channels(model)
    if stage not in accepted:
        raise ValueError(
            f"stage={stage!r} is not a stage of this network; its stages are {', '.join(accepted) or 'none'}"
        )
    for channel in np.ravel(channels):
        if not 0 <= channel < accepted[stage]:
            raise ValueError(
                f"channel={channel} is not between 0 and {accepted[stage] - 1}, the channels of stage {stage}"
            )


def receptive_field(model: Network, stage: str) -> summary.Field:
    """What a position of a stage sees (`summary.receptive_field`). Raises `ValueError` if there is no such stage."""
    _check_stage(model, stage)
    return summary.receptive_field(model, stage)


def _apply(model, variables, images, **options):
    return model.apply(
        variables, images, rngs={"padding": jax.random.key(0)}, **options
    )  # noise is drawn under padding='random' only


def _stage(model, variables, images, stage):
    return _apply(model, variables, images, method="stages", last=stage)[stage]


@functools.partial(jax.jit, static_argnames=("model", "stage"))
def _activations(model, variables, images, stage):
    return _stage(model, variables, images, stage)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, variables, images):
    return _apply(model, variables, images)


def first_filters(
    model: Network, variables: dict
) -> tuple[str, Float[np.ndarray, "height width in filters"]]:
    """The name and the kernels of the convolution that runs first.

    Raises `ValueError` if the network has none.
    """
    names = [
        layer.name for layer in summary.layers(model.clone(padding="zeros")) if layer.kind == "Conv"
    ]
    if not names:
        raise ValueError("the network has no convolution, and so no filters to show")
    kernel = variables["params"]
    for key in weights.torchvision_keys(weights.variable_shapes(model))[f"{names[0]}.weight"][1:]:
        kernel = kernel[key]
    return names[0], np.asarray(kernel)


def activations(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
) -> Float[Array, "batch rows columns units"]:
    """The maps of a stage. Raises `ValueError` if there is no such stage."""
    _check_stage(model, stage)
    return _activations(model, variables, images, stage)


def peaks(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
) -> tuple[Float[np.ndarray, "batch units"], Int[np.ndarray, "batch units 2"]]:
    """Each channel's largest activation on each image, and its row and column.

    Raises `ValueError` if there is no such stage.
    """
    maps = np.asarray(activations(model, variables, images, stage))
    flat = maps.reshape(len(maps), -1, maps.shape[-1])
    return flat.max(1), np.stack(np.divmod(flat.argmax(1), maps.shape[2]), -1)


@functools.partial(jax.jit, static_argnames=("model", "stage", "rule"))
def _saliency(model, variables, images, channels, stage, rule):
    def strongest(images):
        maps = _stage(model, variables, images, stage)
        maps = jnp.take_along_axis(maps, channels[:, None, None, None], 3).reshape(len(images), -1)
        return jnp.take_along_axis(maps, maps.argmax(1)[:, None], 1).astype(jnp.float32).sum()

    with relu_rule(rule):
        return jax.grad(strongest)(images)


@functools.cache
def count_relus(model: Network, stage: str) -> int:
    """How many ReLUs a network has up to a stage."""
    model = model.clone(padding="zeros")
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    with relu_rule("guided"):
        return count_named(
            RELU,
            lambda variables, x: _stage(model, variables, x, stage),
            weights.variable_shapes(model),
            image,
        )


def saliency(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
    channel: int | Sequence[int] | Int[AnyArray, " batch"],
    rule: str,
) -> Float[Array, "batch height width channels"]:
    """What of each image excites a channel's strongest unit, by one of `RULES`: a signal back from that unit.

    `channel` is one for all images or an array with one for each. Max-pools send the signal to where the maximum was, which are the
    deconvnet's switches, and whatever else is not a ReLU passes it back as its derivative does; so does a ReLU6 where it is
    saturated. Raises `ValueError` for an unknown stage, channel or rule, and for a rule about ReLUs where there are none.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(RULES)}")
    _check_stage(model, stage, channel)
    if rule != "gradient" and not count_relus(model, stage):
        raise ValueError(
            f"rule={rule!r} is about ReLUs, and this network has none up to stage {stage!r}; "
            "use rule='gradient'"
        )
    return _saliency(
        model, variables, images, jnp.broadcast_to(jnp.asarray(channel), len(images)), stage, rule
    )


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _occluded_logits(model, variables, image, corners, value, size):
    rows, columns = (
        jnp.arange(n)[None, :] - corners[:, axis, None] for axis, n in enumerate(image.shape[:2])
    )
    hidden = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[
        :, None, :
    ]
    return _apply(model, variables, jnp.where(hidden[..., None], value, image))


def occlusion(
    model: Network,
    variables: dict,
    image: Float[AnyArray, "height width channels"],
    size: int,
    stride: int,
    value: float = 0.0,
) -> Float[np.ndarray, "rows columns {model.num_classes}"]:
    """The logits for an image with a square hidden, for each of its places.

    The square [i, j] of `size` pixels, filled with `value` (0 is the mean color of a normalized image), has its upper left corner at
    (i * stride, j * stride). Raises `ValueError` if it does not fit into the image. Zeiler and Fergus 2014, section 4.2.
    """
    if not 1 <= size <= min(image.shape[:2]):
        raise ValueError(
            f"size={size} of the square is not between 1 and {min(image.shape[:2])}, the side of the image"
        )
    if stride < 1:
        raise ValueError(f"stride={stride} is not a positive number of pixels")
    grid = [(n - size) // stride + 1 for n in image.shape[:2]]
    corners = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), -1) * stride
    padded = np.resize(
        corners, (-(-len(corners) // _BATCH) * _BATCH, 2)
    )  # one shape, one compilation
    fill = jnp.asarray(value, image.dtype)
    logits = [
        _occluded_logits(model, variables, image, batch, fill, size)
        for batch in padded.reshape(-1, _BATCH, 2)
    ]
    return np.concatenate(logits)[: len(corners)].reshape(*grid, -1)


@functools.partial(jax.jit, static_argnames=("model", "stage"))
def _grad_cam(model, variables, images, classes, stage):
    maps = _stage(model, variables, images, stage)

    def evidence(maps):
        logits = _apply(model, variables, images, replace={stage: lambda _: maps})
        return jnp.take_along_axis(logits, classes[:, None], 1).sum()

    gradient = jax.grad(evidence)(maps)
    return jax.nn.relu((gradient.mean((1, 2), keepdims=True) * maps).sum(3))


def grad_cam(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    classes: Sequence[int] | Int[AnyArray, " batch"],
    stage: str,
) -> Float[Array, "batch rows columns"]:
    """Where each image speaks for its class: a stage's maps, weighted by the mean gradients of the class's logit.

    Raises `ValueError` for an unknown stage or class. Selvaraju et al. 2017 (arXiv 1610.02391),
    equations 1 and 2.
    """
    _check_stage(model, stage)
    chosen = jnp.broadcast_to(jnp.asarray(classes), len(images))
    if not 0 <= chosen.min() <= chosen.max() < model.num_classes:
        raise ValueError(
            f"classes={chosen.tolist()} are not all between 0 and {model.num_classes - 1}, the network's classes"
        )
    return _grad_cam(model, variables, images, chosen, stage)


def frame(model: Network, stage: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[slice, ...]]:
    """The least image at the heart of which a unit of a stage sees no border: its (height, width), the unit's place, what it sees.

    It is never larger than the image of the network's publication, of which the unit then is the central one and sees everything.
    """
    field = receptive_field(model, stage)
    at = tuple(-(low // step) for low, step in zip(field.low, field.step))
    first, last = (
        tuple(step * i + side for step, i, side in zip(field.step, at, sides))
        for sides in (field.low, field.high)
    )
    size = tuple(end + 1 for end in last)
    if max(a - b for a, b in zip(size, model.input_shape)) <= 0:
        return size, at, tuple(slice(start, end + 1) for start, end in zip(first, last))
    size = model.input_shape[:2]
    image = jax.ShapeDtypeStruct((1, *model.input_shape), jnp.float32)
    maps = jax.eval_shape(
        lambda v, x: _stage(model, v, x, stage), weights.variable_shapes(model), image
    )
    return size, tuple(n // 2 for n in maps.shape[1:3]), (slice(None), slice(None))


def _frequencies(size):
    """The modulus of each coefficient's frequency, in cycles per pixel: [height, width // 2 + 1]."""
    return np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None, :])


def _paint(spectrum, size):
    """Coefficients [2, batch, height, width // 2 + 1, channels] -> RGB in [0, 1], [batch, height, width, 3], as Lucid does it."""
    scale = np.sqrt(size[0] * size[1]) / np.maximum(_frequencies(size), 1 / max(size)) / 4
    spectrum = spectrum * jnp.asarray(scale[:, :, None], jnp.float32)
    image = jnp.fft.irfft2(jax.lax.complex(spectrum[0], spectrum[1]), size, axes=(1, 2))
    image = image @ jnp.asarray(_COLORS.T) if image.shape[-1] == 3 else image
    return jnp.broadcast_to(jax.nn.sigmoid(image), (*image.shape[:3], 3))


def network_input(
    model: Network, images: Shaped[AnyArray, "batch height width 3"]
) -> Float[AnyArray, "batch height width channels"]:
    """RGB from 0 to 255 as the network takes it: ImageNet's mean and standard deviation taken out.

    A network of one channel gets the mean of the three.
    """
    x = normalize(images)
    return x if model.input_shape[2] == 3 else x.mean(3, keepdims=True)


@functools.partial(jax.jit, static_argnames=("model", "stage", "rule", "at"))
def _unit(model, variables, pixels, channels, stage, rule, at):
    """The activation of each image's own channel at one place of a stage, [batch]."""
    with relu_rule(rule):
        maps = _stage(model, variables, network_input(model, 255 * pixels), stage)
    return maps[jnp.arange(len(channels)), at[0], at[1], channels].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "stage", "size", "at", "steps", "jitter"))
def _climb(
    model, variables, spectrum, channels, key, total_variation, stage, size, at, steps, jitter
):
    """Improves coefficients by gradient ascent on their images' activations, less the price of their edges."""
    optimizer = optax.adam(_RATE * max(1, _RATED / min(size)))

    def worth(spectrum, shift):
        pixels = _paint(spectrum, size)
        score = _unit(
            model, variables, jnp.roll(pixels, shift, (1, 2)), channels, stage, "redirected", at
        )
        rough = sum(jnp.abs(jnp.diff(pixels, axis=axis)).sum((1, 2, 3)) for axis in (1, 2)) / (
            3 * min(size)
        )
        return (score - total_variation * rough * jax.lax.stop_gradient(jnp.abs(score))).sum()

    def step(state, key):
        spectrum, memory = state
        shift = jax.random.randint(key, (2,), -jitter, jitter + 1)
        updates, memory = optimizer.update(
            -jax.grad(worth)(spectrum, shift), memory
        )  # after the ReLUs: their rule is about ascent
        return (optax.apply_updates(spectrum, updates), memory), None

    (spectrum, _), _ = jax.lax.scan(
        step, (spectrum, optimizer.init(spectrum)), jax.random.split(key, steps)
    )
    return spectrum


def maximize(
    model: Network,
    variables: dict,
    stage: str,
    channels: Sequence[int] | Int[np.ndarray, " units"],
    steps: int = 256,
    jitter: int | None = None,
    total_variation: float = 0.02,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "units height width 3"], Float[np.ndarray, "2 units"]]:
    """Images that excite a unit of each of the `channels`, found by gradient ascent: RGB in [0, 1].

    They show what the unit sees of the image, where that is not more than the publication's image. Also returns the units'
    activations: for the first image, which is noise, and for the result. The image is painted in decorrelated
    frequencies and colors and climbed by Adam (Olah et al. 2017, distill.pub/2017/feature-visualization). At each step it is rolled
    by up to `jitter` pixels (a quarter of the stage's stride if None), and `total_variation` is the share of the activation that an
    edge from black to white across the whole image costs. Raises `ValueError` for an unknown stage or channel, or a number out of
    range.
    """
    _check_stage(model, stage, channels)
    jitter = min(receptive_field(model, stage).step) // 4 if jitter is None else jitter
    for name, value, least in (
        ("steps", steps, 1),
        ("jitter", jitter, 0),
        ("total_variation", total_variation, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} is not a number of at least {least}")
    size, at, seen = frame(model, stage)
    units = jnp.atleast_1d(jnp.asarray(channels))
    start, roll = jax.random.split(jax.random.key(seed))
    spectrum = _START * jax.random.normal(
        start, (2, len(units), *_frequencies(size).shape, model.input_shape[2])
    )
    before = _unit(model, variables, _paint(spectrum, size), units, stage, "gradient", at)
    spectrum = _climb(
        model,
        variables,
        spectrum,
        units,
        roll,
        jnp.float32(total_variation),
        stage,
        size,
        at,
        steps,
        jitter,
    )
    pixels = _paint(spectrum, size)
    after = _unit(model, variables, pixels, units, stage, "gradient", at)
    return np.asarray(pixels[:, *seen]), np.stack([before, after])


@functools.partial(jax.jit, static_argnames=("model", "stage"))
def _central_gradients(model, variables, images, key, stage):
    maps, back = jax.vjp(lambda images: _stage(model, variables, images, stage), images)
    signs = jax.random.rademacher(key, (len(maps), maps.shape[3]), maps.dtype)
    (gradient,) = back(
        jnp.zeros_like(maps).at[:, maps.shape[1] // 2, maps.shape[2] // 2].set(signs)
    )
    return jnp.sqrt(jnp.square(gradient.astype(jnp.float32)).mean((0, 3)))


def effective_receptive_field(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
    seed: int = 0,
) -> Float[np.ndarray, "height width"]:
    """How much each pixel moves the central unit of a stage, relative to the pixel that does most.

    It is the root of the mean square of the gradient over images, colors and the stage's channels, whose signals go back together
    under random signs. Raises `ValueError` if there is no such stage. Luo et al. 2016 (arXiv 1701.04128), section 3.
    """
    _check_stage(model, stage)
    field = np.asarray(_central_gradients(model, variables, images, jax.random.key(seed), stage))
    return field / max(field.max(), np.finfo(np.float32).tiny)


def effective_size(field: Float[np.ndarray, "height width"]) -> float:
    """The side, in pixels, of the square with as many pixels as an effective receptive field has above 4.55 % of its largest."""
    return float(np.sqrt((field > _IN_FIELD).sum()))


def equivariance_error(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
) -> Float[np.ndarray, " distances"]:
    """How far a shifted image's features are from the shifted features, by distance to the border: 0 is the border itself.

    The image is shifted by the stage's stride along both axes: two windows that much smaller are cut out of `images`, at its two
    corners, so that one feature lies one position further in the other. The error is relative: the root of the squared differences
    over that of the squared features, of all images, channels and positions at that distance from the nearer border, in positions.
    Raises `ValueError` for an unknown stage, and for images too small to compare.
    """
    step = receptive_field(model, stage).step
    windows = images[:, step[0] :, step[1] :], images[:, : -step[0], : -step[1]]
    late, early = (
        np.asarray(_activations(model, variables, window, stage), np.float64) for window in windows
    )
    late, early = late[:, :-1, :-1], early[:, 1:, 1:]
    if not early.size:
        raise ValueError(
            f"images of {images.shape[1]}x{images.shape[2]} leave no two positions of stage={stage!r} to compare under "
            f"padding={model.padding!r}; use larger ones or another stage"
        )
    distance = border_distance(*early.shape[1:3]).ravel()
    different, whole = (
        np.bincount(distance, np.square(x).sum((0, 3)).ravel()) for x in (late - early, early)
    )
    return np.sqrt(different / np.maximum(whole, np.finfo(np.float64).tiny))


# --- figures ---------------------------------------------------------------------------------------------------------------------


def _brighten(
    signals: Float[np.ndarray, "n height width channels"],
) -> Float[np.ndarray, "n height width 3"]:
    """Signals of either sign as RGB in [0, 1] about gray, each by the strongest half percent."""
    strong = np.quantile(np.abs(signals), 0.995, (1, 2, 3), keepdims=True)
    return np.broadcast_to(
        np.clip(0.5 + 0.5 * signals / np.maximum(strong, 1e-12), 0, 1), (*signals.shape[:3], 3)
    )


def _mosaic(
    images: Shaped[np.ndarray, "n height width *colors"],
) -> Shaped[np.ndarray, "_ _ *colors"]:
    """Images as one, in a square of rows and columns with white lines between."""
    zoom = -(-_CELL // images.shape[1])  # pixels of small images as squares
    images = images.repeat(zoom, 1).repeat(zoom, 2)
    side = int(np.ceil(np.sqrt(len(images))))
    gap = images.shape[1] // 24
    cells = np.ones((side**2, *images.shape[1:]), np.float32)
    cells[: len(images)] = images
    cells = np.pad(
        cells, [(0, 0), (0, gap), (0, gap)] + [(0, 0)] * (images.ndim - 3), constant_values=1
    )
    height, width = cells.shape[1:3]
    cells = cells.reshape(side, side, *cells.shape[1:]).swapaxes(1, 2)
    return cells.reshape(side * height, side * width, *images.shape[3:])[:-gap, :-gap]


def _grid(rows: int, columns: int, cell: float = 2.0):
    """A figure and its axes [rows, columns], without ticks."""
    figure = Figure(figsize=(cell * columns, cell * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, axes


def _patches(
    images: Shaped[np.ndarray, "n height width *colors"],
    places: Int[np.ndarray, "n 2"],
    field: summary.Field,
    blank: float,
) -> Shaped[np.ndarray, "n _ _ *colors"]:
    """What the units at `places` see of their images; `blank` is what lies outside the image."""
    patches = []
    for image, place in zip(images, places):
        low, high = (
            np.array(side) + np.array(field.step) * place for side in (field.low, field.high)
        )
        before, after = np.maximum(-low, 0), np.maximum(high + 1 - image.shape[:2], 0)
        padded = np.pad(
            image, [*zip(before, after)] + [(0, 0)] * (image.ndim - 2), constant_values=blank
        )
        low = low + before
        patches.append(padded[low[0] : low[0] + field.size()[0], low[1] : low[1] + field.size()[1]])
    return np.stack(patches)


# --- commands --------------------------------------------------------------------------------------------------------------------


def _read(
    model: Network, paths: list[pathlib.Path], times: int = 1
) -> UInt8[np.ndarray, "n height width 3"]:
    """Photographs, scaled and cut to `times` the network's image size."""
    size = times * model.input_shape[1], times * model.input_shape[0]
    scaled = [
        PIL.ImageOps.fit(
            PIL.Image.fromarray(photographs.read_image(path)), size, PIL.Image.Resampling.BICUBIC
        )
        for path in paths
    ]
    return np.stack([np.asarray(image) for image in scaled])


def _spread(items: Sequence, count: int) -> list:
    """`count` of the items, evenly spread; all where there are no more."""
    return [
        items[i]
        for i in np.unique(
            np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
        )
    ]


class Subject:
    """What a command looks at: a network, its variables, its stages, photographs."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        named = {"every_layer": True} if options.every_layer else {}
        fields = weights.fields_for(options.model, options.weights)
        self.model = create_model(options.model, padding=options.padding, **named, **fields)
        self.stages = options.stages or list(stage_channels(self.model))
        if not self.stages and options.command != "filters":
            raise ValueError(f"model={options.model!r} has no stages, and so no maps to look at")
        for stage in self.stages:
            _check_stage(self.model, stage, options.channels or ())
        if options.images is not None:
            found = photographs.list_photographs(options.photographs)
            self.paths = _spread(found, options.images or len(found))
        self.variables = self._variables()

    def _variables(self):
        origin, missing = self.options.weights, self.options.missing
        if origin == "random":
            image = jnp.zeros((1, *self.model.input_shape))
            return jax.jit(self.model.clone(padding="zeros").init)(jax.random.key(0), image)
        return weights.load_torchvision(
            weights.fetch(self.options.model) if origin == "imagenet" else origin,
            self.model,
            missing,
        )

    def batches(self) -> Iterator[np.ndarray]:
        """The photographs, uint8, some at a time."""
        with progress(len(self.paths), "photographs") as advance:
            for start in range(0, len(self.paths), _BATCH):
                paths = self.paths[start : start + _BATCH]
                yield _read(self.model, paths)
                advance(len(paths))

    def photographs(self) -> np.ndarray:
        return np.concatenate(list(self.batches()))

    def input(self, images: np.ndarray) -> AnyArray:
        return network_input(self.model, jnp.asarray(images))

    def channels(self, stage: str, count: int) -> list[int]:
        """The channels asked for, or `count` evenly spread ones."""
        return self.options.channels or _spread(range(stage_channels(self.model)[stage]), count)


def _filters(subject: Subject):
    name, kernel = first_filters(subject.model, subject.variables)
    filters = kernel.transpose(3, 0, 1, 2)
    figure, ((axis,),) = _grid(1, 1, 6.0)
    axis.imshow(_mosaic(_brighten(filters)))
    axis.set_title(
        f"{subject.options.model}: the {len(filters)} filters of {name}, {kernel.shape[0]}x{kernel.shape[1]}"
    )
    return figure, {
        "layer": name,
        "shape": kernel.shape,
        "norms": np.linalg.norm(filters.reshape(len(filters), -1), axis=1),
    }


def _maps(subject: Subject):
    images = subject.photographs()
    figure, axes = _grid(len(images), 1 + len(subject.stages), 3.2)
    numbers = []
    for row, image, path in zip(axes, images, subject.paths):
        row[0].imshow(image)
        row[0].set_title(path.stem, fontsize=8)
        for axis, stage in zip(row[1:], subject.stages):
            maps = np.asarray(
                activations(subject.model, subject.variables, subject.input(image[None]), stage)[0],
                np.float32,
            )
            shown = maps.transpose(2, 0, 1)[subject.channels(stage, 36)]
            axis.imshow(
                _mosaic(shown / np.maximum(shown.max((1, 2), keepdims=True), 1e-12)),
                cmap="gray",
                vmin=0,
                vmax=1,
            )
            axis.set_title(f"{stage}: {len(shown)} of {maps.shape[2]} channels", fontsize=8)
            numbers.append(
                {
                    "photograph": path.name,
                    "stage": stage,
                    "shape": maps.shape,
                    "mean": maps.mean((0, 1)),
                    "max": maps.max((0, 1)),
                    "silent_channels": (maps.max((0, 1)) <= 0).sum(),
                }
            )
    return figure, {"maps": numbers}


def _maximized(subject: Subject, stage: str, channels: list[int]):
    options = subject.options
    images, scores = maximize(
        subject.model,
        subject.variables,
        stage,
        channels,
        options.steps,
        options.jitter,
        options.total_variation,
    )
    return images, [
        {"stage": stage, "channel": channel, "noise": before, "maximized": after}
        for channel, before, after in zip(channels, *scores)
    ]


def _maximize(subject: Subject):
    figure, axes = _grid(1, len(subject.stages), 4.0)
    numbers = []
    for axis, stage in zip(axes[0], subject.stages):
        images, found = _maximized(subject, stage, subject.channels(stage, 16))
        numbers += found
        axis.imshow(_mosaic(images))
        axis.set_title(
            f"{stage}: {len(images)} of {stage_channels(subject.model)[stage]} channels", fontsize=9
        )
    return figure, {"units": numbers}


def _strongest(subject: Subject, stage: str, channels: list[int], count: int) -> list[dict]:
    """For each channel, the `count` photographs that excite it most: their numbers, activations and the units' places."""
    found = [
        peaks(subject.model, subject.variables, subject.input(batch), stage)
        for batch in subject.batches()
    ]
    values, places = (np.concatenate(parts) for parts in zip(*found))
    best = np.argsort(-values, axis=0, kind="stable")[:count]
    return [
        {
            "stage": stage,
            "channel": channel,
            "photographs": best[:, channel],
            "activations": values[best[:, channel], channel],
            "places": places[best[:, channel], channel],
        }
        for channel in channels
    ]


def _seen_and_signals(
    subject: Subject, stage: str, channel: int, found: dict, rules
) -> list[np.ndarray]:
    """The patches that a channel's strongest units see, then what each rule sends back to them, as RGB in [0, 1]."""
    field = receptive_field(subject.model, stage)
    images = _read(subject.model, [subject.paths[i] for i in found["photographs"]])
    rows = [_patches(images / np.float32(255), found["places"], field, 1.0)]
    for rule in rules:
        signals = np.asarray(
            saliency(subject.model, subject.variables, subject.input(images), stage, channel, rule)
        )
        rows.append(_brighten(_patches(signals, found["places"], field, 0.0)))
    return rows


def _named(subject: Subject, found: list[dict]) -> list[dict]:
    return [
        row | {"photographs": [subject.paths[i].name for i in row["photographs"]]} for row in found
    ]


def _top_patches(subject: Subject):
    (stage,) = subject.stages
    rules = ("deconvnet", "guided")
    found = _strongest(subject, stage, subject.channels(stage, 6), 9)
    figure, axes = _grid(1 + len(rules), len(found), 2.6)
    for column, row in zip(axes.T, found):
        for axis, patches in zip(
            column, _seen_and_signals(subject, stage, row["channel"], row, rules)
        ):
            axis.imshow(_mosaic(patches))
        column[0].set_title(f"{stage}, channel {row['channel']}", fontsize=9)
    for axis, label in zip(axes[:, 0], ("photographs", *rules)):
        axis.set_ylabel(label)
    return figure, {"channels": _named(subject, found)}


def _probabilities(
    logits: Float[AnyArray, "*images classes"],
) -> Float[np.ndarray, "*images classes"]:
    """Softmax over the last axis; one logit alone goes through a sigmoid."""
    if logits.shape[-1] == 1:
        return np.asarray(jax.nn.sigmoid(logits))
    return np.asarray(jax.nn.softmax(logits))


def _overlay(axis, image: np.ndarray, heat: np.ndarray, box, **limits):
    """An image in gray under a map of which `box` is where the centers of its outer cells lie: left, right, top, bottom."""
    axis.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=255)
    half = [
        (last - first) / max(n - 1, 1) / 2
        for first, last, n in zip(box[::2], box[1::2], heat.shape[::-1])
    ]
    extent = (box[0] - half[0], box[1] + half[0], box[3] + half[1], box[2] - half[1])
    shown = axis.imshow(
        heat, cmap="jet", alpha=0.5, extent=extent, interpolation="bilinear", **limits
    )
    axis.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    return shown


def _occlusion(subject: Subject):
    size, stride = subject.options.size, subject.options.stride
    images = subject.photographs()
    figure, axes = _grid(2, len(images), 2.8)
    numbers = []
    with progress(len(images), "photographs hidden bit by bit") as advance:
        for column, image, path in zip(axes.T, images, subject.paths):
            x = subject.input(image[None])
            probability = _probabilities(_logits(subject.model, subject.variables, x))[0]
            label = probability.argmax()
            shares = _probabilities(
                occlusion(subject.model, subject.variables, x[0], size, stride)
            )[..., label]
            column[0].imshow(image)
            column[0].set_title(f"{path.stem}\nclass {label}: {probability[label]:.2f}", fontsize=7)
            ends = [(size - 1) / 2 + stride * (n - 1) for n in shares.shape]
            heat = _overlay(
                column[1],
                image,
                shares,
                ((size - 1) / 2, ends[1], (size - 1) / 2, ends[0]),
                vmin=0,
                vmax=1,
            )
            column[1].set_title(f"class {label} with a square hidden there", fontsize=7)
            numbers.append(
                {
                    "photograph": path.name,
                    "class": label,
                    "probability": probability[label],
                    "hidden": shares,
                }
            )
            advance(1)
    figure.colorbar(heat, ax=axes[1], shrink=0.8)
    return figure, {"photographs": numbers}


def _cam(subject: Subject):
    (stage,) = subject.stages
    images = subject.photographs()
    x = subject.input(images)
    probabilities = _probabilities(_logits(subject.model, subject.variables, x))
    labels = probabilities.argmax(1)
    heat = np.asarray(grad_cam(subject.model, subject.variables, x, labels, stage))
    field = receptive_field(subject.model, stage)
    figure, axes = _grid(2, len(images), 2.4)
    numbers = []
    for column, image, path, label, probability, cam in zip(
        axes.T, images, subject.paths, labels, probabilities.max(1), heat
    ):
        column[0].imshow(image)
        column[0].set_title(f"{path.stem}\nclass {label}: {probability:.2f}", fontsize=7)
        starts = [(low + high) / 2 for low, high in zip(field.low, field.high)]
        ends = [start + step * (n - 1) for start, step, n in zip(starts, field.step, cam.shape)]
        _overlay(column[1], image, cam, (starts[1], ends[1], starts[0], ends[0]))
        column[1].set_title(f"Grad-CAM, {stage}", fontsize=7)
        numbers.append(
            {"photograph": path.name, "class": label, "probability": probability, "map": cam}
        )
    return figure, {"photographs": numbers}


def _field(subject: Subject):
    x = subject.input(subject.photographs())
    figure, axes = _grid(1, len(subject.stages), 3.2)
    numbers = []
    for axis, stage in zip(axes[0], subject.stages):
        effective = effective_receptive_field(subject.model, subject.variables, x, stage)
        rows, columns = activations(subject.model, subject.variables, x[:1], stage).shape[1:3]
        field = receptive_field(subject.model, stage)
        top, left = (
            low + step * (n // 2) for low, step, n in zip(field.low, field.step, (rows, columns))
        )
        height, width = field.size()
        axis.imshow(effective, cmap="gray", vmin=0, vmax=1)
        side, margin = effective_size(effective), 0.05 * height
        axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color="red"))
        axis.add_patch(
            Rectangle(
                (left + (width - side - 1) / 2, top + (height - side - 1) / 2),
                side,
                side,
                fill=False,
                color="orange",
            )
        )
        axis.set(
            xlim=(left - 0.5 - margin, left + width - 0.5 + margin),
            ylim=(top + height - 0.5 + margin, top - 0.5 - margin),
        )
        axis.set_title(
            f"{stage}: theoretical {height}x{width} (red),\neffective {side:.1f} (orange)",
            fontsize=8,
        )
        numbers.append({"stage": stage, "theoretical": field.size(), "effective": side})
    return figure, {"stages": numbers}


def _equivariance(subject: Subject):
    x = subject.input(
        _read(subject.model, subject.paths, times=2)
    )  # without padding, little is left of an image of the usual size
    figure = Figure(figsize=(3.6 * len(subject.stages), 3.6), layout="constrained")
    axes = figure.subplots(1, len(subject.stages), squeeze=False, sharey=True)
    numbers = []
    with progress(len(FILLS) * len(subject.stages), "stages compared") as advance:
        for axis, stage in zip(axes[0], subject.stages):
            for number, fill in enumerate(FILLS):
                advance(1)
                try:
                    error = equivariance_error(
                        subject.model.clone(padding=fill), subject.variables, x, stage
                    )
                except ValueError as reason:  # without padding, deep stages may vanish
                    numbers.append(
                        {"stage": stage, "padding": fill, "error": None, "reason": str(reason)}
                    )
                    continue
                pixels = receptive_field(subject.model, stage).step[0] * np.arange(len(error))
                axis.plot(
                    pixels,
                    np.maximum(error, _FLOOR),
                    marker=".",
                    markersize=4,
                    label=fill,
                    color=f"C{number}",
                    linestyle="-" if number < 10 else "--",
                )  # there are ten colors
                numbers.append({"stage": stage, "padding": fill, "pixels": pixels, "error": error})
            axis.set(yscale="log", xlabel="distance to the border (pixels)", title=stage)
    axes[0, 0].set_ylabel(f"relative error of shifted features (at least {_FLOOR:g})")
    axes[0, -1].legend(fontsize=8)
    return figure, {"images": x.shape, "errors": numbers}


def _levels(subject: Subject):
    """The lectures' picture of low-, mid- and high-level features: three stages; what excites 16 of their channels most."""
    stages = subject.options.stages or _spread(subject.stages, 3)
    if len(stages) > 3:
        raise ValueError(f"stages={', '.join(stages)} are more than three: low, mid and high level")
    names = {1: ("one",), 2: ("low", "high"), 3: ("low", "mid", "high")}[len(stages)]
    figure, axes = _grid(3, len(stages), 4.0)
    numbers = []
    for column, stage, level in zip(axes.T, stages, names):
        channels = subject.channels(stage, 16)
        images, units = _maximized(subject, stage, channels)
        found = _strongest(subject, stage, channels, 1)
        seen, signals = (
            np.concatenate(parts)
            for parts in zip(
                *(
                    _seen_and_signals(subject, stage, row["channel"], row, ("guided",))
                    for row in found
                )
            )
        )
        for axis, shown in zip(column, (images, seen, signals)):
            axis.imshow(_mosaic(shown))
        column[0].set_title(
            f"{level} level: {stage}, {len(channels)} of {stage_channels(subject.model)[stage]} channels",
            fontsize=10,
        )
        numbers += [unit | row for unit, row in zip(units, _named(subject, found))]
    for axis, label in zip(axes[:, 0], ("maximized", "best patch", "guided backpropagation")):
        axis.set_ylabel(label)
    return figure, {"units": numbers}


# Command -> what it does, its help, its default number of photographs (0: all, None: it needs none) and its further options.
_COMMANDS: dict[str, tuple[Callable, str, int | None, tuple[str, ...]]] = {
    "filters": (_filters, "the kernels of the first convolution", None, ()),
    "activations": (_maps, "maps of stages on photographs", 1, ("stages", "channels")),
    "maximise": (
        _maximize,
        "images that excite channels most",
        None,
        ("stages", "channels", "climb"),
    ),
    "patches": (
        _top_patches,
        "the nine patches that excite each channel most, and their deconvolution",
        0,
        ("stage", "channels"),
    ),
    "occlusion": (
        _occlusion,
        "the predicted class's probability while a gray square hides parts",
        4,
        ("square",),
    ),
    "grad-cam": (_cam, "where photographs speak for their predicted class", 6, ("stage",)),
    "field": (_field, "effective receptive fields against theoretical ones", 32, ("stages",)),
    "equivariance": (
        _equivariance,
        "the error of shifted features by distance to the border, for every padding",
        4,
        ("stages",),
    ),
    "levels": (
        _levels,
        "low-, mid- and high-level features: three stages",
        0,
        ("stages", "channels", "climb"),
    ),
}


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    top = command.Parser(
        prog="python -m cnnjax.visualize", description="Shows what the units of a network look for."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, description, images, groups) in _COMMANDS.items():
        parser = commands.add_parser(name, help=description, description=f"Shows {description}.")
        add = parser.add_argument
        parser.set_defaults(stages=None, channels=None, images=None)
        add("--model", required=True, help="a registered name, such as squeezenet1_1")
        add(
            "--weights",
            required=True,
            metavar="FILE",
            help="a safetensors or .pth file with torchvision's names, 'imagenet' or 'random'",
        )
        add(
            "--missing",
            nargs="+",
            default=(),
            metavar="MODULE",
            help="modules that the file is known not to hold",
        )
        add(
            "--padding",
            default="zeros",
            help="fill of every convolution and pool (default: %(default)s)",
        )
        add(
            "--every-layer",
            action="store_true",
            help="names the stages of a VGG by convolution: conv1_1, conv1_2, ...",
        )
        add(
            "--workdir",
            required=True,
            metavar="FOLDER",
            help="where the figure and the numbers are written",
        )
        if images is not None:
            add(
                "--photographs",
                default="",
                metavar="FOLDER",
                help="default: those that scikit-image and scikit-learn carry",
            )
            add(
                "--images",
                type=command.whole(1),
                default=images,
                metavar="N",
                help=f"photographs, evenly spread (default: {images or 'all'})",
            )
        if "stages" in groups:
            add(
                "--stages",
                nargs="+",
                metavar="STAGE",
                help="default: all, or three evenly spread for levels",
            )
        if "stage" in groups:
            add("--stage", dest="stages", nargs=1, required=True, help="a stage of the network")
        if "channels" in groups:
            add(
                "--channels",
                nargs="+",
                type=command.whole(0),
                metavar="N",
                help="channels of the stages (default: some evenly spread)",
            )
        if "climb" in groups:
            add(
                "--steps",
                type=command.whole(1),
                default=256,
                metavar="N",
                help="of gradient ascent (default: %(default)s)",
            )
            add(
                "--jitter",
                type=command.whole(0),
                metavar="PIXELS",
                help="default: a quarter of the stage's stride",
            )
            add(
                "--total-variation",
                type=_weight,
                default=0.02,
                metavar="SHARE",
                help="of the activation, what an edge across the image costs (default: %(default)s)",
            )
        if "square" in groups:
            add(
                "--size",
                type=command.whole(1),
                default=48,
                metavar="PIXELS",
                help="side of the square (default: %(default)s)",
            )
            add(
                "--stride",
                type=command.whole(1),
                default=16,
                metavar="PIXELS",
                help="of the square (default: %(default)s)",
            )
    return top.parse_args(arguments)


def _plain(value):
    """Arrays and NumPy's numbers as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return (
        np.asarray(value).tolist()
        if isinstance(value, (np.ndarray, np.generic, jax.Array))
        else value
    )


def _work(options: argparse.Namespace) -> None:
    started = time.monotonic()
    backend.start()
    try:
        subject = Subject(options)
        folder = workdir.prepare(
            options.workdir, {key: value for key, value in vars(options).items() if key != "debug"}
        )
        figure, numbers = _COMMANDS[options.command][0](subject)
    except flax.errors.FlaxError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"weights={options.weights!r} do not hold all that {options.command} needs: {reason}"
        ) from error
    workdir.write_figure(folder / f"{options.command}.png", figure)
    seconds = round(time.monotonic() - started, 1)
    workdir.write_json(
        folder / "results.json", {"kind": options.command} | _plain(numbers) | {"seconds": seconds}
    )
    print(f"see {folder / options.command}.png")


def main(arguments: list[str] | None = None) -> int:
    """The command line -> the exit code (`cnnjax.runtime.command.run`)."""
    options = _parse(arguments)
    return command.run(lambda: _work(options))


if __name__ == "__main__":
    sys.exit(main())
