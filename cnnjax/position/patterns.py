"""What padding alone writes into a network's features.

No readout and no training is needed. The features of a crop differ from those of the same pixels
inside a larger photograph by the effect of the padding. What these differences have in common over
photographs is a pattern of positions; the idea is Lin et al.'s (2022, arXiv 2206.01202). `strength`
defines the metrics, which are our own. The second half is arithmetic of windows: which rows a
stride leaves unread (Alsallakh et al. 2021, arXiv 2010.02178), and how often each pixel is read.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from cnnjax.inspect import Window, check_stages, receptive_field, stage_names
from cnnjax.models import Network
from cnnjax.nn import check_fill, conv, output_size
from cnnjax.position.encoder import check_images, in_batches, normalize, stage_shapes
from cnnjax.position.metrics import border_distance

# The fills that keep every position in place; under the others maps shrink, grow, or are stretched
# or shifted.
ALIGNED = (
    "zeros",
    "partial",
    "reflect",
    "symmetric",
    "replicate",
    "circular",
    "mean",
    "random",
)
_BATCH = 4


def margin(model: Network, stage: str, size: int) -> int:
    """Finds how much wider than a crop a photograph must be, on each side.

    With this margin no unit of the crop's map sees the photograph's border. It is a multiple of the
    stage's stride, so that both maps lie on one grid.

    Args:
      model: the network.
      stage: name of the stage.
      size: side of the crop in pixels.

    Returns pixels. Raises `ValueError` if there is no such stage, if its positions have no known
    field, or if its stride down differs from that to the right.
    """
    step = _stride(model, stage)
    field = receptive_field(model, stage)
    positions = stage_shapes(model.clone(padding="zeros"), size, stage)[stage][1:3]
    # How far fields reach beyond the crop: that of the first position up and to the left, that of
    # the last position down and to the right.
    before = [-low for low in field.low]
    after = [step * (n - 1) + high - (size - 1) for n, high in zip(positions, field.high)]
    reach = max(*before, *after)
    # Rounded up to a multiple of the stride.
    return -(-reach // step) * step


def _stride(model: Network, stage: str) -> int:
    """Returns the stride of a stage in pixels.

    Raises `ValueError` if that down differs from that to the right.
    """
    down, right = receptive_field(model, stage).step
    if down != right:
        raise ValueError(
            f"stage={stage!r} has a stride of {down} down and {right} to the right; "
            "expected equal ones"
        )
    return down


def common_margin(model: Network, stages: str | Sequence[str], size: int) -> int:
    """Finds the least margin that is wide enough for several stages.

    It is a multiple of the last one's stride, and so of every stage's.

    Args:
      model: the network.
      stages: names of stages, the deepest last, or a single one.
      size: side of the crop in pixels.

    Returns pixels. Raises `ValueError` as `margin`, and if no stage is named.
    """
    stages = stage_names(stages)
    widest = max(margin(model, stage, size) for stage in stages)
    step = _stride(model, stages[-1])
    return -(-widest // step) * step


@functools.partial(jax.jit, static_argnames=("model", "stages"))
def _stages(model, variables, images, stages, key):
    maps = model.apply(
        variables, normalize(images), method="stages", last=stages[-1], rngs={"padding": key}
    )
    check_stages(maps, stages)
    return [maps[stage] for stage in stages]


def features(
    model: Network,
    variables: dict,
    images: UInt8[np.ndarray, "n height width 3"],
    stages: str | Sequence[str],
) -> dict[str, Float[np.ndarray, "n _ _ _"]]:
    """Computes the named stages of images, which are normalized by ImageNet's moments.

    Args:
      model: the network.
      variables: its variables.
      images: uint8 RGB.
      stages: names of stages, in the network's order, or a single one.

    Raises `ValueError` if the images are not uint8 RGB, no stage is named, or a stage is unknown or
    comes after the last one.
    """
    check_images(images)
    stages = stage_names(stages)
    parts = []
    for start, count, batch in in_batches(images, _BATCH):
        maps = _stages(model, variables, batch, stages, jax.random.key(start))
        parts.append([np.asarray(y)[:count] for y in maps])
    return {stage: np.concatenate(maps) for stage, maps in zip(stages, zip(*parts))}


def features_inside(
    model: Network,
    variables: dict,
    context: UInt8[np.ndarray, "n height width 3"],
    size: int,
    stages: str | Sequence[str],
) -> dict[str, Float[np.ndarray, "n _ _ _"]]:
    """Computes what `features` of the central crop would be if it had no border.

    The maps are cut out of those of photographs around the crop.

    Args:
      model: the network.
      variables: its variables.
      context: the photographs, square.
      size: side of the crop in pixels.
      stages: names of stages, in the network's order, or a single one.

    Raises `ValueError` as `features`, if `context` is not square or too small, or if its margin is
    not a multiple of a stage's stride.
    """
    check_images(context)
    stages = stage_names(stages)
    border = (context.shape[1] - size) // 2
    side = size + 2 * border
    is_square = context.shape[1:3] == (side, side)
    for stage in stages:
        least = margin(model, stage, size)
        step = _stride(model, stage)
        if border < least or border % step or not is_square:
            raise ValueError(
                f"a context of {context.shape[1]}x{context.shape[2]} about a crop of size={size} "
                f"does not fit stage={stage!r}; expected a square with a margin of at least "
                f"{least}, a multiple of {step}"
            )
    shapes = stage_shapes(model.clone(padding="zeros"), size, stages[-1])
    # The padding of the photographs is outside every field.
    maps = features(model.clone(padding="zeros"), variables, context, stages)
    cut = {}
    for stage, y in maps.items():
        start = border // _stride(model, stage)
        height, width = shapes[stage][1:3]
        cut[stage] = y[:, start : start + height, start : start + width]
    return cut


class Strength(NamedTuple):
    """The strength of the padding's trace in a stage, relative to the features.

    Let d = padded - inside, m and s its mean and standard deviation (with n - 1) over the n images,
    and f = inside. Where no axis is named, means are over all of them. Without any difference, snr
    and shared are 0.

    Attributes:
      mae: mean(|d|) / mean(|f|).
      snr: mean(|m|) / mean(s); about sqrt(2 / pi) / sqrt(n) = 0.8 / sqrt(n) without any pattern.
      shared: mean(m^2 - s^2 / n) / mean(d^2): 1 if every image has the same difference, 0 if they
        have nothing in common. Subtracting s^2 / n removes the bias of m^2.
      profile: [distances], sqrt(sum(d^2) / sum(f^2)) over the positions at one distance to the
        border.
      pattern: [height, width], the root mean square of m over channels, divided by that of all f.
    """

    mae: float
    snr: float
    shared: float
    profile: Float[np.ndarray, " distances"]
    pattern: Float[np.ndarray, "height width"]


def strength(
    padded: Float[np.ndarray, "n _ _ channels"], inside: Float[np.ndarray, "n _ _ channels"]
) -> Strength:
    """Compares the features of crops with those inside their photographs.

    `padded` and `inside` are [n, height, width, channels].

    Raises `ValueError` if their shapes differ or if there are fewer than two images, whose
    differences cannot vary.
    """
    if len(padded) < 2 or padded.shape != inside.shape:
        raise ValueError(
            f"features of shapes {padded.shape} and {inside.shape} cannot be compared; expected "
            "two of one shape, of 2 images or more"
        )
    # Random weights shrink features until their squares would underflow.
    scale = np.float32(max(np.abs(inside).max(), np.finfo(np.float32).tiny))
    delta = (padded - inside) / scale
    inside = inside / scale
    mean = delta.mean(0)
    variance = delta.var(0, ddof=1)
    energy = np.square(delta).mean(0)
    features_rms = float(np.sqrt(np.square(inside).mean()))
    distance = border_distance(*mean.shape[:2]).ravel()
    # Sums over the positions at each distance; their number cancels in the ratio.
    difference_energy = np.bincount(distance, energy.mean(-1).ravel())
    feature_energy = np.bincount(distance, np.square(inside).mean(0).mean(-1).ravel())
    shared = 0.0
    snr = 0.0
    if energy.any():
        shared = float((np.square(mean) - variance / len(delta)).mean() / energy.mean())
        snr = float(np.abs(mean).mean() / np.sqrt(variance).mean())
    return Strength(
        mae=float(np.abs(delta).mean() / np.abs(inside).mean()),
        snr=snr,
        shared=shared,
        profile=np.sqrt(difference_energy / feature_energy),
        pattern=np.sqrt(np.square(mean).mean(-1)) / features_rms,
    )


# --- Blind spots ---


def unread(chain: Sequence[Window], size: int) -> dict[str, int]:
    """Counts the rows of the padded map that each strided window never reads.

    They are at the bottom; the same number of columns is unread on the right. If the number is 0,
    the window reads as much padding below as above.

    Args:
      chain: the windows.
      size: side of the image in pixels.

    Returns the number of rows by the window's name.
    Raises `ValueError` if the image is too small.
    """
    unread_rows = {}
    n = size
    for window in chain:
        if window.stride > 1:
            unread_rows[window.name] = (n + 2 * window.padding - window.kernel) % window.stride
        n = output_size(n, window.kernel, window.stride, window.padding)
        if n < 1:
            raise ValueError(f"size={size} is too small: nothing is left of it after {window.name}")
    return unread_rows


@functools.partial(jax.jit, static_argnames=("chain", "size", "fill"))
def _reads(chain, size, fill):
    def total(x):
        for window in chain:
            kernel = jnp.full((window.kernel, window.kernel, 1, 1), 1 / window.kernel**2)
            # 'partial' and 'full' change how a convolution treats its border; a max-pool pads as
            # under 'zeros'.
            window_fill = "zeros" if window.pool and fill in ("partial", "full") else fill
            x = conv(x, kernel, stride=window.stride, padding=window.padding, fill=window_fill)
        return x.sum()

    return jax.grad(total)(jnp.zeros((1, size, size, 1)))[0, :, :, 0]


def reads(chain: Sequence[Window], size: int, fill: str) -> Float[np.ndarray, "{size} {size}"]:
    """Counts how often a chain of windows reads each pixel, relative to the mean.

    Every window, pools included, averages what it reads. The gradient of the last map's sum is
    therefore proportional to the number of paths from each pixel.

    Raises `ValueError` if the fill is unknown or 'random', which depends on the image.
    """
    check_fill(fill)
    if fill == "random":
        raise ValueError(
            "fill='random' depends on the image: how often a pixel is read is not defined"
        )
    counts = np.asarray(_reads(tuple(chain), size, fill), np.float64)
    return counts / counts.mean()


def asymmetry(counts: Float[np.ndarray, "height width"]) -> float:
    """Returns the share of all reads that differs between the left and right halves.

    It is 0 if they are mirror images.
    """
    return float(np.abs(counts - counts[:, ::-1]).sum() / (2 * counts.sum()))
