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
        branches = [
            relu(
                Conv(
                    features,
                    size,
                    padding=size // 2,
                    fill=self.fill,
                    dtype=self.dtype,
                    name=f"branch{number}",
                )(x)
            )
            for number, (features, size) in enumerate(zip(self.widths, (1, 3, 5)), 1)
        ]
        return concatenate([*branches, max_pool(x, 3, 1, padding=1, fill=self.fill)], self.fill)


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
            return relu(
                Conv(
                    features, size, padding=size // 2, fill=self.fill, dtype=self.dtype, name=name
                )(x)
            )

        one, reduce3, three, reduce5, five, projection = self.widths
        return concatenate(
            [
                conv(x, one, 1, "branch1"),
                conv(conv(x, reduce3, 1, "branch2.0"), three, 3, "branch2.1"),
                conv(conv(x, reduce5, 1, "branch3.0"), five, 5, "branch3.1"),
                conv(max_pool(x, 3, 1, padding=1, fill=self.fill), projection, 1, "branch4.1"),
            ],
            self.fill,
        )


class Auxiliary(nn.Module):
    """A classifier on an intermediate map (section 5)."""

    num_classes: int
    dropout: float
    fill: str
    sampling: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, train):
        x = relu(
            Conv(128, 1, dtype=self.dtype, fill=self.fill, name="conv")(
                avg_pool(x, 5, 3, fill=self.fill, sampling=self.sampling)
            )
        )
        x = flatten(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(
            relu(Dense(1024, dtype=self.dtype, name="fc1")(x))
        )
        sow_logits(self, Dense(self.num_classes, dtype=self.dtype, name="fc2")(x))


class GoogLeNet2014(Network):
    """GoogLeNet as published.

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
        policy = {"fill": self.padding, "sampling": self.sampling}
        # Table 1's 56, 28, 14 and 7.
        pool = functools.partial(max_pool, window=3, stride=2, ceil=True, **policy)
        x = relu(Conv(64, 7, conv_stride(2, self.sampling), padding=3, name="conv1", **shared)(x))
        x = sample(x, 2, **policy)
        x = yield "conv1", x
        x = local_response_norm(pool(x))
        x = relu(Conv(64, 1, name="conv2", **shared)(x))
        x = relu(Conv(192, 3, padding=1, name="conv3", **shared)(x))
        x = yield "conv3", x
        x = pool(local_response_norm(x))
        for name, widths in TABLE.items():
            x = Inception(widths, name=name, **shared)(x)
            if name in AUXILIARY and self.aux_logits and (train or self.is_initializing()):
                Auxiliary(
                    self.num_classes,
                    self.dropout_aux,
                    sampling=self.sampling,
                    name=AUXILIARY[name],
                    **shared,
                )(x, train)
            if name in ("inception3b", "inception4e"):
                x = yield name, x
                x = pool(x)
        x = yield "inception5b", x
        x = nn.Dropout(self.dropout, deterministic=not train)(global_avg_pool(x))
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


register("googlenet_2014", GoogLeNet2014)
