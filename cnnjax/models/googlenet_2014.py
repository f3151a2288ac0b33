"""GoogLeNet as published, with LRN and without BatchNorm.

Parameters have the names of torchvision's form of the network (`cnnjax.models.googlenet`).

Source: Szegedy et al. 2014 (arXiv 1409.4842), table 1 and section 5.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from cnnjax.models.base import Network, register
from cnnjax.models.googlenet import AUXILIARY, TABLE, sow_logits
from cnnjax.nn import (
    Conv,
    Dense,
    avg_pool,
    concatenate,
    conv_stride,
    flatten,
    global_avg_pool,
    local_response_norm,
    max_pool,
    relu,
    sample,
)


class NaiveInception(nn.Module):
    """Parallel 1x1, 3x3 and 5x5 convolutions and a 3x3 max-pool (figure 2a)."""

    widths: tuple[int, int, int]
    fill: str = "zeros"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        branches = []
        for number, (features, size) in enumerate(zip(self.widths, (1, 3, 5)), 1):
            y = Conv(
                features,
                size,
                padding=size // 2,
                fill=self.fill,
                dtype=self.dtype,
                name=f"branch{number}",
            )(x)
            branches.append(relu(y))
        branches.append(max_pool(x, 3, 1, padding=1, fill=self.fill))
        return concatenate(branches, self.fill)


class Inception(nn.Module):
    """`NaiveInception` with 1x1 convolutions before the large ones and after the pool.

    `widths` is a row of table 1 (figure 2b).
    """

    widths: tuple[int, int, int, int, int, int]
    fill: str = "zeros"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x):
        def conv(x, features, size, name):
            x = Conv(
                features, size, padding=size // 2, fill=self.fill, dtype=self.dtype, name=name
            )(x)
            return relu(x)

        one, reduce3, three, reduce5, five, projection = self.widths
        branch1 = conv(x, one, 1, "branch1")
        branch2 = conv(x, reduce3, 1, "branch2.0")
        branch2 = conv(branch2, three, 3, "branch2.1")
        branch3 = conv(x, reduce5, 1, "branch3.0")
        branch3 = conv(branch3, five, 5, "branch3.1")
        branch4 = max_pool(x, 3, 1, padding=1, fill=self.fill)
        branch4 = conv(branch4, projection, 1, "branch4.1")
        return concatenate([branch1, branch2, branch3, branch4], self.fill)


class Auxiliary(nn.Module):
    """A classifier on an intermediate map (section 5)."""

    num_classes: int
    dropout: float
    fill: str
    sampling: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, train):
        x = avg_pool(x, 5, 3, fill=self.fill, sampling=self.sampling)
        x = Conv(128, 1, dtype=self.dtype, fill=self.fill, name="conv")(x)
        x = relu(x)
        x = flatten(x)
        x = Dense(1024, dtype=self.dtype, name="fc1")(x)
        x = relu(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = Dense(self.num_classes, dtype=self.dtype, name="fc2")(x)
        sow_logits(self, logits)


class GoogLeNet2014(Network):
    """GoogLeNet as published, with local response normalization.

    The stages `conv1`, `conv3`, `inception3b`, `inception4e` and `inception5b` have strides 2, 4,
    8, 16 and 32. In training the auxiliary classifiers leave {"aux1": {"logits": ...}, "aux2": ...}
    in the collection "auxiliary"; the publication adds their losses with a weight of 0.3. With them
    the network needs images of at least 79 pixels.
    """

    dropout: float = 0.4
    dropout_aux: float = 0.7
    aux_logits: bool = True

    @nn.nowrap
    def walk(self, x, train):
        shared = {"fill": self.padding, "dtype": self.dtype}
        fill_and_sampling = {"fill": self.padding, "sampling": self.sampling}
        # Table 1's 56, 28, 14 and 7.
        pool = functools.partial(max_pool, window=3, stride=2, ceil=True, **fill_and_sampling)
        stride = conv_stride(2, self.sampling)
        x = Conv(64, 7, stride, padding=3, name="conv1", **shared)(x)
        x = relu(x)
        x = sample(x, 2, **fill_and_sampling)
        x = yield "conv1", x
        x = pool(x)
        x = local_response_norm(x)
        x = Conv(64, 1, name="conv2", **shared)(x)
        x = relu(x)
        x = Conv(192, 3, padding=1, name="conv3", **shared)(x)
        x = relu(x)
        x = yield "conv3", x
        x = local_response_norm(x)
        x = pool(x)
        for name, widths in TABLE.items():
            x = Inception(widths, name=name, **shared)(x)
            if name in AUXILIARY and self.aux_logits and (train or self.is_initializing()):
                auxiliary = Auxiliary(
                    self.num_classes,
                    self.dropout_aux,
                    sampling=self.sampling,
                    name=AUXILIARY[name],
                    **shared,
                )
                auxiliary(x, train)
            if name in ("inception3b", "inception4e"):
                x = yield name, x
                x = pool(x)
        x = yield "inception5b", x
        x = global_avg_pool(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


register("googlenet_2014", GoogLeNet2014)
