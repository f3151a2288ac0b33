"""Convolution and dense layers: PyTorch's semantics and initialization, gradients that are fast on the CPU too.

XLA's CPU backend runs a convolution fast only when it is written as NHWC x HWIO -> NHWC, ungrouped, and it rewrites other
forms into that one only outside loops. The two gradients that JAX derives are of other forms, so a training step inside
`lax.scan` runs on a naive loop nest, and a grouped kernel gradient does so everywhere. `_dense_conv` therefore states its
gradients in the fast form itself. On other platforms the compiler's own choice is better and is left alone.
"""

import contextlib
import contextvars
import functools
import math
import operator
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cnnjax.nn.geometry import Both, output_size, pair, valid_counts
from cnnjax.nn.materialize import materialize
from cnnjax.nn.padding import check_fill, pad
from cnnjax.nn.sums import add_bias, channel_sum
from cnnjax.runtime.types import AnyArray

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_LARGE = 2**20  # elements: 4 MB
_TOGETHER = 32  # channels of a convolution that stands for several groups
_AS_WRITTEN = contextvars.ContextVar("as_written", default=False)
_FEW_IN, _FEW_OUT = 3, 16  # channels that leave the matrix product of a convolution half empty


def _exchanged(x, window) -> bool:
    """Whether XLA would exchange image and kernel, which leaves the fast form: on the CPU, where the window is larger than the image.

    It moves zero padding into the convolution first, so that a 3x3 window on a 2x2 map is 130 times slower (512 channels).
    """
    return jax.default_backend() == "cpu" and math.prod(window) > math.prod(x.shape[1:3])


def _apart(x, window, padded):
    """`padded`, which is `x` with a border, for a convolution with `window`: apart from it where it would be exchanged."""
    return lax.optimization_barrier(padded) if _exchanged(x, window) else padded


def _padded(x, widths, window):
    """Pads rows and columns by (low, high, between) for a convolution with `window`."""
    return _apart(x, window, lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *widths, (0, 0, 0)]))


def _native(x, kernel, stride, padding, dilation, groups=1):
    if _exchanged(x, kernel.shape[:2]):
        x, padding = _padded(x, [(p, p, 0) for p in padding], kernel.shape[:2]), (0, 0)
    return lax.conv_general_dilated(
        x,
        kernel,
        stride,
        [(p, p) for p in padding],
        rhs_dilation=dilation,
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Within it, windows are traced with the size and stride that a network gives them, for those who read them from the program."""
    token = _AS_WRITTEN.set(True)
    try:
        yield
    finally:
        _AS_WRITTEN.reset(token)


def _neighbors(x, kernel, stride, padding, dilation) -> int:
    """How many neighbors in a row of the output are best computed as if they were channels."""
    many = kernel.shape[2] > _FEW_IN and kernel.shape[3] > _FEW_OUT
    if many or (*stride, *dilation) != (1, 1, 1, 1) or _AS_WRITTEN.get():
        return 1
    width = output_size(x.shape[2], kernel.shape[1], stride[1], padding[1], dilation[1])
    best = 4 if kernel.shape[2] <= _FEW_IN and kernel.shape[3] < 64 else 2
    return next(count for count in (best, 2, 1) if width % count == 0)


def _ungrouped(x, kernel, stride, padding, dilation):
    """A convolution; with few channels, of a wider kernel that gives several neighbors at once.

    A window that is read for one of them is then read for all, and the matrix product inside has columns enough.
    """
    count = _neighbors(x, kernel, stride, padding, dilation)
    if count == 1:
        return _native(x, kernel, stride, padding, dilation)
    shifted = [
        jnp.pad(kernel, ((0, 0), (place, count - 1 - place), (0, 0), (0, 0)))
        for place in range(count)
    ]
    y = _native(x, jnp.concatenate(shifted, axis=3), (1, count), padding, dilation)
    return y.reshape(*y.shape[:2], -1, kernel.shape[3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _dense_conv(x, kernel, stride, padding, dilation):
    """An ungrouped convolution whose gradients are themselves NHWC x HWIO -> NHWC convolutions."""
    return _ungrouped(x, kernel, stride, padding, dilation)


def _dense_conv_forward(x, kernel, stride, padding, dilation):
    x = materialize(x)
    return _ungrouped(x, kernel, stride, padding, dilation), (x, kernel)


def _dense_conv_backward(stride, padding, dilation, residuals, dy):
    (x, kernel), dy = residuals, materialize(dy)
    return _input_gradient(x.shape, kernel, stride, padding, dilation, dy), _kernel_gradient(
        x, kernel.shape, stride, padding, dilation, dy
    )


def _spread(shape, kernel_shape, stride, padding, dilation, dy):
    """The output gradient, spread out by the stride and padded so that the flipped kernel turns it into the input's."""
    widths = []
    for axis in (0, 1):
        reach = dilation[axis] * (kernel_shape[axis] - 1)
        low = reach - padding[axis]
        spread = (dy.shape[axis + 1] - 1) * stride[axis] + 1
        widths.append((low, shape[axis + 1] + reach - spread - low, stride[axis] - 1))
    # Interior padding as an operation of its own: a convolution with input dilation leaves the fast path (jax issue 23783).
    return _padded(dy, widths, kernel_shape[:2])


def _input_gradient(shape, kernel, stride, padding, dilation, dy):
    """Correlates the output gradient, spread out by the stride, with the flipped kernel."""
    if stride != (1, 1) and dilation == (1, 1):
        return _strided_input_gradient(shape, kernel, stride, padding, dy)
    spread = _spread(shape, kernel.shape, stride, padding, dilation, dy)
    return _ungrouped(spread, kernel[::-1, ::-1].swapaxes(2, 3), (1, 1), (0, 0), dilation)


def _strided_input_gradient(shape, kernel, stride, padding, dy):
    """The same without the zeros of the spread: every stride-th row and column is a convolution of its own, with as many of the cells."""
    size = [-(-(shape[axis + 1] + padding[axis]) // stride[axis]) for axis in (0, 1)]

    def every(i, j):
        cells = kernel[i :: stride[0], j :: stride[1]]
        if not cells.size:
            return jnp.zeros((len(dy), *size, shape[3]), dy.dtype)
        widths = [(cells.shape[axis] - 1, size[axis] - dy.shape[axis + 1], 0) for axis in (0, 1)]
        return _ungrouped(
            _padded(dy, widths, cells.shape[:2]),
            cells[::-1, ::-1].swapaxes(2, 3),
            (1, 1),
            (0, 0),
            (1, 1),
        )

    rows = [jnp.stack([every(i, j) for j in range(stride[1])], 3) for i in range(stride[0])]
    whole = jnp.stack(rows, 2).reshape(len(dy), size[0] * stride[0], size[1] * stride[1], -1)
    return whole[:, padding[0] : padding[0] + shape[1], padding[1] : padding[1] + shape[2]]


def _batch_last(x):
    """[batch, height, width, channels] -> [channels, height, width, batch].

    A plain matrix transposition first, which reads memory in order, makes the kernel gradient of a map that is too large for the
    caches 1.1 to 1.4 times faster, and that of a smaller one up to 1.4 times slower. XLA would join the two to one again.
    """
    rows = lax.optimization_barrier(x.reshape(len(x), -1).T)
    return rows.reshape(*x.shape[1:], len(x)).transpose(2, 0, 1, 3)


def _kernel_gradient(x, shape, stride, padding, dilation, dy):
    """Correlates the input with the output gradient: the batch is summed over, so it takes the place of the channels."""
    seen, taps = (
        math.prod(shape[:3]),
        lambda: list(_taps(pad(x, padding, "zeros"), shape[:2], stride, dilation, dy.shape[1:3])),
    )
    if (
        shape[:2] == (1, 1) or stride != (1, 1) and shape[0] <= 3
    ):  # a matrix product for each row of the kernel: neither side is transposed
        cells, columns = taps(), dy.reshape(-1, shape[3])
        rows = [
            jnp.concatenate(cells[at : at + shape[1]], axis=3).reshape(len(columns), -1)
            for at in range(0, len(cells), shape[1])
        ]
        return jnp.stack(
            [lax.dot_general(row, columns, (((0,), (0,)), ((), ()))) for row in rows]
        ).reshape(shape)
    if (
        shape[2] <= _FEW_IN and seen <= shape[3]
    ):  # what the kernel sees, side by side, is smaller than the output, which stays as it is
        rows = lax.optimization_barrier(jnp.concatenate(taps(), axis=3).reshape(-1, seen).T)
        return (rows @ dy.reshape(-1, shape[3])).reshape(shape)
    needed = [
        (dy.shape[axis + 1] - 1) * stride[axis] + dilation[axis] * (shape[axis] - 1) + 1
        for axis in (0, 1)
    ]
    widths = [
        (padding[axis], needed[axis] - padding[axis] - x.shape[axis + 1], 0) for axis in (0, 1)
    ]  # a stride may leave a margin unread
    read = lambda x: _padded(x, widths, dy.shape[1:3])
    x = read(x).transpose(3, 1, 2, 0) if x.size < _LARGE else read(_batch_last(x))
    gradient = lax.conv_general_dilated(
        x,
        dy.transpose(1, 2, 0, 3),
        dilation,
        "VALID",
        rhs_dilation=stride,
        dimension_numbers=_LAYOUT,
    )
    return gradient.transpose(1, 2, 0, 3)


_dense_conv.defvjp(_dense_conv_forward, _dense_conv_backward)


def _taps(x, kernel_size, stride, dilation, size):
    """What each of a kernel's cells sees of a padded image, as strided views [batch, height', width', channels], row by row."""
    for i, j in np.ndindex(*kernel_size):
        top, left = i * dilation[0], j * dilation[1]
        yield x[
            :,
            top : top + (size[0] - 1) * stride[0] + 1 : stride[0],
            left : left + (size[1] - 1) * stride[1] + 1 : stride[1],
        ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _depthwise(x, kernel, stride, padding, dilation):
    """A convolution with one input and one output channel per group, as a sum of shifted, scaled copies of the image."""
    size = [
        output_size(
            x.shape[axis + 1], kernel.shape[axis], stride[axis], padding[axis], dilation[axis]
        )
        for axis in (0, 1)
    ]
    taps = _taps(pad(x, padding, "zeros"), kernel.shape[:2], stride, dilation, size)
    return functools.reduce(
        operator.add, (tap * scale for tap, scale in zip(taps, kernel.reshape(-1, kernel.shape[3])))
    )


def _depthwise_forward(x, kernel, stride, padding, dilation):
    return _depthwise(x, kernel, stride, padding, dilation), (x, kernel)


def _depthwise_backward(stride, padding, dilation, residuals, dy):
    (x, kernel), dy = residuals, materialize(dy)
    spread, flipped = (
        _spread(x.shape, kernel.shape, stride, padding, dilation, dy),
        kernel[::-1, ::-1],
    )
    taps = _taps(pad(x, padding, "zeros"), kernel.shape[:2], stride, dilation, dy.shape[1:3])
    return _depthwise(spread, flipped, (1, 1), (0, 0), dilation), jnp.stack(
        [channel_sum(tap, dy) for tap in taps]
    ).reshape(kernel.shape)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _grouped(x, kernel, groups, stride, padding, dilation):
    """A grouped convolution as ungrouped ones of some 32 channels, whose kernels hold several groups on their diagonal.

    Matrix products on fewer channels waste more than the zeros do, and so does compiling one convolution per group.
    """
    depth, width = kernel.shape[2], kernel.shape[3] // groups
    together = max(
        n
        for n in range(1, groups + 1)
        if groups % n == 0 and (n == 1 or n * max(depth, width) <= _TOGETHER)
    )
    diagonal = np.kron(np.eye(together), np.ones((depth, width))) > 0
    outputs = []
    for a, b in zip(
        jnp.split(x, groups // together, axis=3), jnp.split(kernel, groups // together, axis=3)
    ):
        outputs.append(
            _dense_conv(
                a,
                jnp.where(diagonal, jnp.tile(b, (1, 1, together, 1)), 0),
                stride,
                padding,
                dilation,
            )
        )
    return jnp.concatenate(outputs, axis=3)


def _zero_padded(x, kernel, stride, padding, dilation, groups):
    if jax.default_backend() != "cpu":
        return _native(x, kernel, stride, padding, dilation, groups)
    if groups == 1:
        return _dense_conv(x, kernel, stride, padding, dilation)
    if groups == x.shape[3]:
        return _depthwise(
            jnp.repeat(x, kernel.shape[3] // groups, axis=3), kernel, stride, padding, dilation
        )
    return _grouped(x, kernel, groups, stride, padding, dilation)


def conv(
    x: Float[AnyArray, "batch height width in"],
    kernel: Float[AnyArray, "rows columns in_of_group out"],
    *,
    stride: Both = 1,
    padding: Both = 0,
    dilation: Both = 1,
    groups: int = 1,
    fill: str = "zeros",
    key: Key[Array, ""] | None = None,
) -> Float[Array, "batch height_out width_out out"]:
    """Convolves `x` [batch, height, width, in] with `kernel` [height, width, in / groups, out] -> [batch, height', width', out].

    `stride`, `padding` (the amount on each side) and `dilation` are integers or (height, width) pairs; `fill` is what the
    amount is padded with (`cnnjax.nn.padding`), or what it becomes: 0 under 'none', d(k - 1) under 'full'. 'random' draws from
    `key`. Raises `ValueError` where shapes do not fit or nothing would be left.
    """
    check_fill(fill)
    stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    padding = (0, 0) if fill == "none" else pair(padding, "padding", 0)
    if fill == "full":
        padding = tuple(d * (k - 1) for d, k in zip(dilation, kernel.shape))
    if (
        x.ndim != 4
        or kernel.ndim != 4
        or x.shape[3] != kernel.shape[2] * groups
        or kernel.shape[3] % groups
    ):
        raise ValueError(
            f"a kernel of shape {kernel.shape} with groups={groups} does not fit an input of shape {x.shape}; expected "
            "[batch, height, width, in] and [height, width, in / groups, out], out divisible by groups"
        )
    geometry = [
        (x.shape[axis + 1], kernel.shape[axis], stride[axis], padding[axis], dilation[axis])
        for axis in (0, 1)
    ]
    if min(output_size(*axis) for axis in geometry) < 1:
        raise ValueError(
            f"a {kernel.shape[0]}x{kernel.shape[1]} convolution with padding={fill!r} has no output on a "
            f"{x.shape[1]}x{x.shape[2]} map: the image is too small for this network"
        )
    if fill in ("zeros", "none", "full"):
        return _zero_padded(x, kernel, stride, padding, dilation, groups)
    if fill == "partial":
        inside = np.multiply.outer(*(valid_counts(*axis) for axis in geometry))
        ratio = kernel.shape[0] * kernel.shape[1] / np.maximum(inside, 1)
        return _zero_padded(x, kernel, stride, padding, dilation, groups) * jnp.asarray(
            ratio[None, :, :, None], x.dtype
        )
    padded = _apart(
        x, kernel.shape[:2], pad(x, padding, fill, key=key)
    )  # of the fills, one-sided has zeros
    return _zero_padded(padded, kernel, stride, (0, 0), dilation, groups)


def uniform_fan_in(fan_in: int) -> Callable:
    """PyTorch's default initialization of weights and biases: uniform in +-1/sqrt(fan_in)."""
    bound = float(fan_in) ** -0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


# He et al. 2015, "fan out" as torchvision's VGG and ResNet use it.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """`conv` with parameters; PyTorch's default initialization unless `kernel_init` or `bias_init` is given."""

    features: int
    kernel_size: Both
    stride: Both = 1
    padding: Both = 0
    dilation: Both = 1
    groups: int = 1
    fill: str = "zeros"
    use_bias: bool = True
    kernel_init: Callable | None = None
    bias_init: Callable | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "batch height width in"]
    ) -> Float[Array, "batch height_out width_out {self.features}"]:
        size = pair(self.kernel_size, "kernel_size", 1)
        shape = (*size, x.shape[-1] // self.groups, self.features)
        default = uniform_fan_in(math.prod(shape[:3]))
        kernel = self.param("kernel", self.kernel_init or default, shape)
        key = (
            self.make_rng("padding")
            if self.fill == "random" and (self.has_rng("padding") or self.is_initializing())
            else None
        )
        y = conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            fill=self.fill,
            key=key,
        )
        if self.use_bias:
            y = add_bias(
                y,
                self.param("bias", self.bias_init or default, (self.features,)).astype(self.dtype),
            )
        return y


class Dense(nn.Module):
    """A fully connected layer [..., in] -> [..., features]; PyTorch's default initialization unless others are given."""

    features: int
    use_bias: bool = True
    kernel_init: Callable | None = None
    bias_init: Callable | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch in"]) -> Float[Array, "*batch {self.features}"]:
        default = uniform_fan_in(x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or default, (x.shape[-1], self.features))
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            y = add_bias(
                y,
                self.param("bias", self.bias_init or default, (self.features,)).astype(self.dtype),
            )
        return y
