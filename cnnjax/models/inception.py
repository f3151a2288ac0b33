"""Inception v3 in torchvision's structure and names.

Source: Szegedy et al. 2015 (arXiv 1512.00567), table 1 and figures 5 to 7.
"""

import functools
from typing import ClassVar

import flax.linen as nn
from jax.typing import DTypeLike

from cnnjax.models.base import Network, register
from cnnjax.models.googlenet import ConvNorm, normalize_by_half, sow_logits
from cnnjax.nn import (
    Dense,
    align,
    avg_pool,
    concatenate,
    conv_stride,
    global_avg_pool,
    max_pool,
    sample,
)
from cnnjax.nn.geometry import pair

# torchvision truncates at +-2, twenty standard deviations away.
_normal = nn.initializers.normal(0.1)

# A block is a tuple of branches side by side, and a branch is a tuple of steps. A step is one of:
#   - a convolution, (name, filters, kernel) or (name, filters, kernel, stride);
#   - a pool, `_AVERAGE` or `_MAXIMUM`;
#   - a tuple of steps side by side.
# A strided step is unpadded and comes last in its branch.
_AVERAGE = "3x3 average, stride 1"
_MAXIMUM = "3x3 maximum, stride 2"


def block_a(pool: int) -> tuple:
    """Returns the branches of figure 5, except that one branch keeps its 5x5 convolution.

    `pool` counts the filters after the average pool.
    """
    return (
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        (_AVERAGE, ("branch_pool", pool, 1)),
    )


def block_c(width: int) -> tuple:
    """Returns the branches of figure 6: n x n convolutions as 1 x n and n x 1, n = 7.

    `width` counts the filters of all convolutions of a branch but the last.
    """
    return (
        (("branch1x1", 192, 1),),
        (("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1))),
        (
            ("branch7x7dbl_1", width, 1),
            ("branch7x7dbl_2", width, (7, 1)),
            ("branch7x7dbl_3", width, (1, 7)),
            ("branch7x7dbl_4", width, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ),
        (_AVERAGE, ("branch_pool", 192, 1)),
    )


# Figure 10, where the resolution falls, twice.
_BLOCK_B = (
    (("branch3x3", 384, 3, 2),),
    (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)),
    (_MAXIMUM,),
)
_BLOCK_D = (
    (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)),
    (
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2),
    ),
    (_MAXIMUM,),
)
# Figure 7: the last convolutions spread over two parallel ones.
_BLOCK_E = (
    (("branch1x1", 320, 1),),
    (("branch3x3_1", 384, 1), (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))),
    (
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
    ),
    (_AVERAGE, ("branch_pool", 192, 1)),
)

TABLE = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _BLOCK_E,
    "Mixed_7c": _BLOCK_E,
}


class Block(nn.Module):
    """The branches of an Inception block, joined along their channels."""

    branches: tuple
    fill: str
    sampling: str
    dtype: DTypeLike
    axis_name: str | None

    @nn.nowrap
    def apply_step(self, step, x, train):
        """Applies one step of a branch."""
        if isinstance(step[0], tuple):
            return concatenate([self.apply_step(part, x, train) for part in step], self.fill)
        if step == _AVERAGE:
            return avg_pool(x, 3, 1, padding=1, fill=self.fill)
        if step == _MAXIMUM:
            return max_pool(x, 3, conv_stride(2, self.sampling), fill=self.fill)
        name, features, size, *strides = step
        height, width = pair(size, "size", 1)
        if strides:
            stride = conv_stride(strides[0], self.sampling)
            padding = (0, 0)
        else:
            stride = 1
            padding = (height // 2, width // 2)
        return ConvNorm(
            features,
            size,
            stride,
            padding,
            kernel_init=_normal,
            fill=self.fill,
            dtype=self.dtype,
            axis_name=self.axis_name,
            name=name,
        )(x, train)

    @nn.compact
    def __call__(self, x, train):
        maps = []
        for branch in self.branches:
            y = x
            for step in branch[:-1]:
                y = self.apply_step(step, y, train)
            maps.append(y)
        strided = self.branches[-1] == (_MAXIMUM,)
        if strided:
            # The strided last steps must see the same positions; an unpadded branch lost some.
            maps = align(maps, self.fill)
        y = concatenate(
            [self.apply_step(branch[-1], y, train) for branch, y in zip(self.branches, maps)],
            self.fill,
        )
        # All branches keep the same positions.
        return sample(y, 2 if strided else 1, sampling=self.sampling, fill=self.fill)


class Auxiliary(nn.Module):
    """A classifier on the last map of stride 16 (figure 8)."""

    num_classes: int
    fill: str
    sampling: str
    dtype: DTypeLike
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(
            ConvNorm, fill=self.fill, dtype=self.dtype, axis_name=self.axis_name
        )
        x = avg_pool(x, 5, 3, fill=self.fill, sampling=self.sampling)
        x = conv(128, 1, kernel_init=_normal, name="conv0")(x, train)
        x = conv(768, 5, kernel_init=_normal, name="conv1")(x, train)
        x = global_avg_pool(x)
        head = Dense(
            self.num_classes, kernel_init=nn.initializers.normal(0.001), dtype=self.dtype, name="fc"
        )
        sow_logits(self, head(x))


class InceptionV3(Network):
    """Inception v3: larger than GoogLeNet, with 7x7 convolutions split into 1x7 and 7x1.

    The stages `Conv2d_2b_3x3`, `Conv2d_4a_3x3`, `Mixed_5d`, `Mixed_6e` and `Mixed_7c` have strides
    2, 4, 8, 16 and 32. In training the auxiliary classifier leaves {"AuxLogits": {"logits": ...}}
    in the collection "auxiliary"; by convention its loss is added with a weight of 0.4
    (`auxiliary_weight`), and it needs images of at least 299 pixels. With `aux_logits=False` there
    is neither the classifier nor its parameters.
    """

    auxiliary_weight: ClassVar[float] = 0.4

    input_shape: tuple[int, int, int] = (299, 299, 3)
    dropout: float = 0.5
    aux_logits: bool = True
    # Whether the input is converted first, which torchvision's ImageNet weights need.
    transform_input: bool = False

    @nn.nowrap
    def walk(self, x, train):
        if self.transform_input:
            x = normalize_by_half(x)
        fill_and_sampling = {"fill": self.padding, "sampling": self.sampling}
        shared = {**fill_and_sampling, "dtype": self.dtype, "axis_name": self.axis_name}
        conv = functools.partial(ConvNorm, kernel_init=_normal, **shared)
        x = conv(32, 3, 2, name="Conv2d_1a_3x3")(x, train)
        x = conv(32, 3, name="Conv2d_2a_3x3")(x, train)
        x = conv(64, 3, padding=1, name="Conv2d_2b_3x3")(x, train)
        x = yield "Conv2d_2b_3x3", x
        x = max_pool(x, 3, 2, **fill_and_sampling)
        x = conv(80, 1, name="Conv2d_3b_1x1")(x, train)
        x = conv(192, 3, name="Conv2d_4a_3x3")(x, train)
        x = yield "Conv2d_4a_3x3", x
        x = max_pool(x, 3, 2, **fill_and_sampling)
        for name, branches in TABLE.items():
            x = Block(branches, name=name, **shared)(x, train)
            if name in ("Mixed_5d", "Mixed_6e", "Mixed_7c"):
                x = yield name, x
            if name == "Mixed_6e" and self.aux_logits and (train or self.is_initializing()):
                Auxiliary(self.num_classes, name="AuxLogits", **shared)(x, train)
        x = global_avg_pool(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        head = Dense(self.num_classes, kernel_init=_normal, dtype=self.dtype, name="fc")
        yield "logits", head(x)


register("inception_v3", InceptionV3)
