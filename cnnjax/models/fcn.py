"""Fully convolutional networks: a score for every class at every pixel.

Each of the named stages of any network is scored by a 1x1 convolution. The scores of the deepest
stage are interpolated bilinearly to the grid of the next and added to its own, and so on; the sum
is interpolated to the pixels. Unlike in section 4.2, the interpolation is not learned.

Source: Long et al. 2015 (arXiv 1411.4038).
"""

import string

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cnnjax.inspect import located, receptive_fields
from cnnjax.models.base import Network, create_model, register
from cnnjax.nn import (
    BatchNorm,
    Conv,
    Dense,
    conv_stride,
    global_avg_pool,
    linear_interpolation,
    max_pool,
    relu,
    sample,
)


class SceneNet(Network):
    """A narrow VGG with BatchNorm for images of a few hundred pixels.

    The stages `block1` ... `block4` have strides 2, 4, 8 and 16.
    """

    input_shape: tuple[int, int, int] = (180, 240, 3)
    blocks: tuple[tuple[int, ...], ...] = ((16,), (32, 32), (64, 64), (128,))

    @nn.nowrap
    def walk(self, x, train):
        fill_and_sampling = {"fill": self.padding, "sampling": self.sampling}
        for number, block in enumerate(self.blocks, 1):
            x = x if number == 1 else max_pool(x, 2, **fill_and_sampling)
            for index, features in enumerate(block):
                letter = string.ascii_lowercase[index]
                # The first convolution halves the map, as the pools do before the other blocks.
                stride = 2 if (number, index) == (1, 0) else 1
                x = Conv(
                    features,
                    3,
                    conv_stride(stride, self.sampling),
                    padding=1,
                    fill=self.padding,
                    use_bias=False,
                    dtype=self.dtype,
                    name=f"conv{number}{letter}",
                )(x)
                norm = BatchNorm(
                    axis_name=self.axis_name, dtype=self.dtype, name=f"bn{number}{letter}"
                )
                x = norm(x, train)
                x = relu(x)
                x = sample(x, stride, **fill_and_sampling)
            x = yield f"block{number}", x
        x = global_avg_pool(x)
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


def grids(
    encoder: Network, shape: tuple[int, int, int], stages: tuple[str, ...]
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Finds where the positions of stages lie in images of `shape`.

    They are followed through the traced network, so that maps that the fill 'none' shrinks are
    placed where they belong.

    Returns for each stage the rows and the columns, in pixels, of its fields' centers.
    Raises `ValueError` if a stage's positions cannot be located in the image, as after GroupNorm
    and under padding='interpolate'.
    """
    places = []
    for stage, (field, output) in zip(stages, receptive_fields(encoder, stages, shape)):
        field = located(field, stage)
        rows, columns = (
            field.step[axis] * np.arange(output[1 + axis])
            + (field.low[axis] + field.high[axis]) / 2
            for axis in (0, 1)
        )
        places.append((rows, columns))
    return tuple(places)


def place(
    x: Float[Array, "batch height width channels"],
    known: tuple[np.ndarray, np.ndarray],
    to: tuple[np.ndarray, np.ndarray],
) -> Float[Array, "batch rows columns channels"]:
    """Interpolates maps from (rows, columns) `known` to other rows and columns.

    Interpolation is bilinear; beyond the map, the nearest position on its edge counts.
    """
    rows = jnp.asarray(linear_interpolation(to[0], known[0]), x.dtype)
    columns = jnp.asarray(linear_interpolation(to[1], known[1]), x.dtype)
    # An accelerator would interpolate in TF32 or bfloat16 by default, which have three digits.
    lines = jnp.einsum("ah,nhwc->nawc", rows, x, precision="highest")
    return jnp.einsum("bw,nawc->nabc", columns, lines, precision="highest")


class FCN(Network):
    """Segmentation: scores of each pixel from stages of another network.

    The output is [batch, height, width, num_classes]. The stages are those of the encoder, whose
    parameters keep their names. If padding leaves a map smaller than the image ('none'), the map
    lies where its fields' centers are, and pixels beyond it take the scores of the nearest
    position. padding='interpolate', which stretches maps, is refused.

    Attributes:
      encoder: name of the network. Its `walk` runs outside `apply`: it may use the network's fields
        and make modules, but not call `self.param`, `self.make_rng` or `self.is_initializing`. A
        network with a field `aux_logits` is built without auxiliary classifiers.
      scored: the stages that are scored, in the network's order.
    """

    encoder: str = "scene_net"
    scored: tuple[str, ...] = ("block2", "block3", "block4")
    input_shape: tuple[int, int, int] = (180, 240, 3)

    def __post_init__(self):
        if not self.scored:
            raise ValueError("scored=() is not a tuple of at least one of the encoder's stages")
        super().__post_init__()

    @nn.nowrap
    def backbone(self) -> Network:
        encoder = create_model(
            self.encoder,
            padding=self.padding,
            sampling=self.sampling,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        # Auxiliary classifiers would score whole images, and only in training.
        fields = {"aux_logits": False} if hasattr(encoder, "aux_logits") else {}
        return encoder.clone(parent=None, **fields)

    @nn.nowrap
    def walk(self, x, train):
        encoder = self.backbone()
        maps = {}
        shape = x.shape[1:]
        walk = encoder.walk(x, train)  # the encoder's modules become this network's own
        scored_so_far = []
        name, y = next(walk)
        while name != "logits":
            maps[name] = yield name, y
            scored_so_far = [stage for stage in maps if stage in self.scored]
            # What follows the last scored stage is not computed.
            if scored_so_far == list(self.scored):
                break
            name, y = walk.send(maps[name])
        if scored_so_far != list(self.scored):
            raise ValueError(
                f"scored={self.scored!r} are not stages of {self.encoder}, in their order; "
                f"they are {', '.join(maps)}"
            )
        stage_grids = dict(zip(self.scored, grids(encoder, shape, tuple(self.scored))))
        # From the deepest stage on, the sum is interpolated to the grid of the next finer stage.
        scores = None
        grid = None
        for stage in reversed(self.scored):
            score = Conv(self.num_classes, 1, dtype=self.dtype, name=f"score.{stage}")(maps[stage])
            if scores is None:
                scores = score
            else:
                scores = score + place(scores, grid, stage_grids[stage])
            grid = stage_grids[stage]
        height, width = shape[:2]
        pixels = (np.arange(height), np.arange(width))
        yield "logits", place(scores, grid, pixels)


register("scene_net", SceneNet)
register("fcn", FCN)
