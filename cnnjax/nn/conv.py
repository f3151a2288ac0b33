"""Convolution and dense layers with PyTorch's semantics and initialization.

`uniform_fan_in` is PyTorch's own initializer and the default of the layers; `he_normal_fan_out` is
that of torchvision's VGG and ResNet, among others.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from cnnjax.nn.cpu.conv import keep_padding_apart
from cnnjax.nn.cpu.grouped import convolve_grouped
from cnnjax.nn.geometry import Both, Window, check_floating, check_map, pair
from cnnjax.nn.lowering import uses_cpu_forms
from cnnjax.nn.padding import check_fill, pad
from cnnjax.nn.parameters import parameter
from cnnjax.nn.sums import add_bias
from cnnjax.runtime.types import AnyArray


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
    """Convolves a batch of maps with a kernel.

    Args:
      x: [batch, height, width, in].
      kernel: [height, width, in / groups, out].
      stride: an integer or a (height, width) pair.
      padding: the amount on each side, an integer or a (height, width) pair. It becomes 0 under
        'none', and under 'full' d(k - 1) for a dilation d and a kernel size k.
      dilation: an integer or a (height, width) pair.
      groups: number of groups that channels are divided into.
      fill: what the border is filled with (`cnnjax.nn.padding`).
      key: source of the noise of 'random'.

    Returns [batch, height', width', out].
    Raises `ValueError` if shapes do not fit, `x` and `kernel` are not of the same floating-point
    type, `fill` is unknown, 'random' has no key, a number is out of range, a map is too small for
    its border, or the output would be empty.
    """
    check_fill(fill)
    check_map(x)
    _check_shapes(x, kernel, groups)
    window = _window(kernel, stride, padding, dilation, fill)
    _check_output(x, kernel, window, fill)
    if fill in ("zeros", "none", "full"):
        return _convolve(x, kernel, window, groups)
    if fill == "partial":
        inside = window.valid_taps(x.shape, kernel.shape[:2]).clip(1)
        ratio = jnp.asarray(kernel.shape[0] * kernel.shape[1] / inside, jnp.result_type(x))
        return _convolve(x, kernel, window, groups) * ratio[None, :, :, None]
    padded = pad(x, window.padding, fill, key=key)
    if uses_cpu_forms():
        padded = keep_padding_apart(x, padded, kernel.shape[:2])
    unpadded = Window(stride=window.stride, dilation=window.dilation)
    return _convolve(padded, kernel, unpadded, groups)


def _convolve(x, kernel, window, groups):
    if uses_cpu_forms():
        return convolve_grouped(x, kernel, window, groups)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.stride,
        padding=[(amount, amount) for amount in window.padding],
        rhs_dilation=window.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _window(kernel, stride, padding, dilation, fill) -> Window:
    dilation = pair(dilation, "dilation", 1)
    if fill == "none":
        padding = 0
    if fill == "full":
        padding = tuple(d * (k - 1) for d, k in zip(dilation, kernel.shape))
    return Window(pair(stride, "stride", 1), pair(padding, "padding", 0), dilation)


def _check_shapes(x, kernel, groups):
    ranks_fit = x.ndim == kernel.ndim == 4
    if not ranks_fit or x.shape[3] != kernel.shape[2] * groups or kernel.shape[3] % groups:
        raise ValueError(
            f"a kernel of shape {kernel.shape} with groups={groups} does not fit an input of "
            f"shape {x.shape}; expected [batch, height, width, in] and "
            "[height, width, in / groups, out], out divisible by groups"
        )
    # `result_type`, because JAX reads NumPy's float64 as float32 unless jax_enable_x64 is set.
    dtypes = jnp.result_type(x), jnp.result_type(kernel)
    if dtypes[0] != dtypes[1]:
        raise ValueError(
            f"a kernel of dtype {dtypes[1]} does not fit an input of dtype {dtypes[0]}; "
            "convert one of the two"
        )


def _check_output(x, kernel, window, fill):
    if min(window.output_shape(x.shape, kernel.shape[:2])) < 1:
        raise ValueError(
            f"a {kernel.shape[0]}x{kernel.shape[1]} convolution with padding={fill!r} has no "
            f"output on a {x.shape[1]}x{x.shape[2]} map: the image is too small for this network"
        )


@functools.cache
def uniform_fan_in(fan_in: int) -> Callable:
    """Returns PyTorch's default initializer, uniform in +-1/sqrt(fan_in).

    Raises `ValueError` if there are no inputs.
    """
    if fan_in < 1:
        raise ValueError(f"fan_in={fan_in} is not a positive number of inputs")
    bound = float(fan_in) ** -0.5

    def initialize(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} is not a positive number")


# He et al. 2015, "fan out" as torchvision's VGG and ResNet use it.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """`conv` with float32 parameters.

    Attributes:
      features: channels of the output.
      kernel_size: an integer or a (height, width) pair.
      stride: as in `conv`.
      padding: as in `conv`.
      dilation: as in `conv`.
      groups: as in `conv`.
      fill: as in `conv`; 'random' draws from the random stream "padding".
      use_bias: whether a bias is added.
      kernel_init: initializer of the kernel; PyTorch's default unless given.
      bias_init: initializer of the bias; PyTorch's default unless given.
      dtype: type of the computation.

    Raises `ValueError` if `features` or `groups` is below 1, `groups` does not divide the channels,
    a parameter has another shape than the input needs, or as `conv` does.
    """

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
        check_map(x)
        _check_positive("features", self.features)
        _check_positive("groups", self.groups)
        if x.shape[-1] % self.groups or self.features % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide the {x.shape[-1]} channels of the input and "
                f"the {self.features} of the output"
            )
        size = pair(self.kernel_size, "kernel_size", 1)
        shape = (*size, x.shape[-1] // self.groups, self.features)
        default = uniform_fan_in(math.prod(shape[:3]))
        kernel = parameter(self, "kernel", self.kernel_init or default, shape)
        key = None
        if self.fill == "random" and (self.has_rng("padding") or self.is_initializing()):
            key = self.make_rng("padding")
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
        if not self.use_bias:
            return y
        bias = parameter(self, "bias", self.bias_init or default, (self.features,))
        return add_bias(y, bias.astype(self.dtype))


class Dense(nn.Module):
    """A fully connected layer with float32 parameters.

    Attributes:
      features: channels of the output.
      use_bias: whether a bias is added.
      kernel_init: initializer of the kernel; PyTorch's default unless given.
      bias_init: initializer of the bias; PyTorch's default unless given.
      dtype: type of the computation.

    Raises `ValueError` if `features` is below 1, there are no inputs, they do not have a
    floating-point type, or a parameter has another shape than the input needs.
    """

    features: int
    use_bias: bool = True
    kernel_init: Callable | None = None
    bias_init: Callable | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch in"]) -> Float[Array, "*batch {self.features}"]:
        check_floating(x)
        _check_positive("features", self.features)
        shape = (x.shape[-1], self.features)
        default = uniform_fan_in(x.shape[-1])
        kernel = parameter(self, "kernel", self.kernel_init or default, shape)
        y = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        bias = parameter(self, "bias", self.bias_init or default, (self.features,))
        return add_bias(y, bias.astype(self.dtype))
