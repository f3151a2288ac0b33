"""Grouped and depthwise convolution, without XLA's naive loop nest on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.nn.cpu.barrier import materialize
from cnnjax.nn.cpu.conv import convolve, is_below
from cnnjax.nn.cpu.depthwise import convolve_depthwise
from cnnjax.nn.geometry import Window
from cnnjax.runtime.types import AnyArray

# Channels of an ungrouped convolution that stands for several groups.
_BLOCK_CHANNELS = 32
_BLOCK_CHANNELS_PACKED = 8
# Elements of a map for which the gain is worth compiling more convolutions.
_WORTH_PACKING = 2**19


def convolve_grouped(x: AnyArray, kernel: AnyArray, window: Window, groups: int) -> jax.Array:
    """Convolves `x`, NHWC, with `kernel`, HWIO, in the best form for the groups."""
    if groups == 1:
        return convolve(x, kernel, window)
    if groups == x.shape[3]:
        return convolve_depthwise(x, kernel, window)
    return convolve_block_diagonal(x, kernel, window, groups)


@functools.partial(jax.jit, static_argnums=(2, 3))
def convolve_block_diagonal(
    x: AnyArray, kernel: AnyArray, window: Window, groups: int
) -> jax.Array:
    """Convolves by block-diagonal grouping.

    The plain form is one convolution with `feature_group_count`, a naive loop nest
    (docs/performance.md compares the two: the rows of resnext50_32x4d, in brackets). Here the
    kernels of ungrouped convolutions of some 32 channels hold several groups on their diagonal.
    More channels waste time on zeros, and fewer make the matrix products slow. With 8 channels,
    neighboring outputs are packed as channels, unless the convolution is strided or dilated.
    """
    most = _BLOCK_CHANNELS
    can_pack = window.stride == (1, 1) and window.dilation == (1, 1)
    if can_pack and not is_below(x.size, _WORTH_PACKING):
        most = _BLOCK_CHANNELS_PACKED
    depth = kernel.shape[2]
    width = kernel.shape[3] // groups
    # The most groups that divide all groups evenly and fit into one block.
    together = 1
    for count in range(2, groups + 1):
        if groups % count == 0 and count * max(depth, width) <= most:
            together = count
    blocks = groups // together
    diagonal = np.kron(np.eye(together), np.ones((depth, width))) > 0
    outputs = []
    for inputs, weights in zip(jnp.split(x, blocks, axis=3), jnp.split(kernel, blocks, axis=3)):
        tiled = jnp.tile(weights, (1, 1, together, 1))
        # Without a barrier, each block's slice is part of the operations that read the kernel, and
        # XLA compiles these for every block anew (docs/cpu_forms.md, History).
        block_diagonal = materialize(jnp.where(diagonal[None, None], tiled, 0))
        outputs.append(convolve(inputs, block_diagonal, window))
    return jnp.concatenate(outputs, axis=3)
