"""The network of the public CIFAR-10 speed record `airbench94_muon`.

Source: Jordan 2024 (github.com/KellerJordan/cifar10-airbench).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.models.base import Network, register
from cnnjax.nn import BatchNorm, Conv, Dense, max_pool
from cnnjax.nn.conv import uniform_fan_in

# Batch normalization whose running statistics forget quickly: the runs are 200 steps long.
_BatchNorm = functools.partial(BatchNorm, momentum=0.4, eps=1e-12)
# Added to the eigenvalues of the patches.
_EIGENVALUE_EPS = 5e-4
_gelu = functools.partial(nn.gelu, approximate=False)


def whitening_filters(images: jnp.ndarray) -> jnp.ndarray:
    """Returns filters that whiten 2x2 patches, and their negatives.

    Args:
      images: normalized images [n, height, width, channels].

    Returns:
      The kernel [2, 2, channels, 8 * channels]. Under its first half, patches are uncorrelated with
      unit variance; the second half is its negative.
    """
    _, height, width, channels = images.shape
    shifted = []
    for top in (0, 1):
        for left in (0, 1):
            shifted.append(images[:, top : height - 1 + top, left : width - 1 + left])
    patches = jnp.concatenate(shifted, 3).reshape(-1, 4 * channels)
    covariance = jnp.matmul(patches.T, patches, precision="highest") / len(patches)
    values, vectors = jnp.linalg.eigh(covariance)
    scales = jnp.broadcast_to(jnp.sqrt(values + _EIGENVALUE_EPS), vectors.shape)
    filters = (vectors / scales).reshape(2, 2, channels, 4 * channels)
    return jnp.concatenate([filters, -filters], 3)


def _partly_identity(key, shape, dtype=jnp.float32):
    """Returns PyTorch's initialization, with the first filters set to the identity.

    The identity is that of `torch.nn.init.dirac_`.
    """
    kernel = uniform_fan_in(shape[0] * shape[1] * shape[2])(key, shape, dtype)
    count = min(shape[2:])
    identity = (
        jnp.zeros((*shape[:3], count), dtype)
        .at[shape[0] // 2, shape[1] // 2, jnp.arange(count), jnp.arange(count)]
        .set(1)
    )
    return kernel.at[..., :count].set(identity)


def _unit_variance(key, shape, dtype=jnp.float32):
    """Draws from the uniform distribution of mean 0 and variance 1."""
    return jax.random.uniform(key, shape, dtype, -(3**0.5), 3**0.5)


class Speedrun(Network):
    """The network of a CIFAR-10 speed record: whitening, then six 3x3 convolutions.

    The convolutions stand in three groups of two, whose maps are the stages `block1`, `block2` and
    `block3`. Training sets the kernel of the 2x2 convolution `whiten` (`whitening_filters`) and
    leaves it and BatchNorm's scales unchanged.

    Attributes:
      width: channels of the first group; the others have four times as many.
    """

    # Checked to be positive, with the fields of all networks.
    _sizes = ("width",)

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (32, 32, 3)
    width: int = 64

    @nn.nowrap
    def walk(self, x, train):
        shared = {"fill": self.padding, "dtype": self.dtype}
        x = Conv(8 * x.shape[3], 2, **shared, name="whiten")(x)
        x = _gelu(x)
        for number, features in enumerate((self.width, 4 * self.width, 4 * self.width), 1):
            for layer in (1, 2):
                x = Conv(
                    features,
                    3,
                    padding=1,
                    use_bias=False,
                    kernel_init=_partly_identity,
                    **shared,
                    name=f"block{number}.conv{layer}",
                )(x)
                if layer == 1:
                    x = max_pool(x, 2, fill=self.padding, sampling=self.sampling)
                norm = _BatchNorm(
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"block{number}.norm{layer}",
                )
                x = norm(x, train)
                x = _gelu(x)
            x = yield f"block{number}", x
        # Over the 3x3 positions left of 32x32.
        x = x.max((1, 2))
        head = Dense(
            self.num_classes,
            use_bias=False,
            kernel_init=_unit_variance,
            dtype=self.dtype,
            name="fc",
        )
        # As in the record: with weights of variance 1, undivided logits would be large.
        logits = head(x) / x.shape[1]
        yield "logits", logits


register("speedrun", Speedrun)
