"""AlexNet and ZFNet as the lectures print them.

Sources: Krizhevsky, Sutskever and Hinton 2012; Zeiler and Fergus 2013 (arXiv 1311.2901).
"""

import flax.linen as nn

from cnnjax.models.base import Network, register
from cnnjax.nn import Conv, Dense, conv_stride, flatten, local_response_norm, max_pool, relu, sample

# Convolutions 1 to 5 as (filters, kernel, stride, padding). Section 3.5 and figure 2 of Krizhevsky
# et al.:
_ALEXNET = ((96, 11, 4, 0), (256, 5, 1, 2), (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1))
# Figure 3 of Zeiler and Fergus, whose maps are 110, 55, 26, 13 and 6 wide; the lectures' 512, 1024,
# 512 filters in convolutions 3 to 5 are those of their section 4.3 (figure 3 itself has 384, 384,
# 256).
_ZFNET = ((96, 7, 2, 1), (256, 5, 2, 0), (512, 3, 1, 1), (1024, 3, 1, 1), (512, 3, 1, 1))
# Section 3.5: the convolutions that see only the maps of their own GPU. Section 5: the layers whose
# biases start at 1.
_SPLIT, _BIASED = (2, 4, 5), (2, 4, 5, 6, 7)


class AlexNet2012(Network):
    """AlexNet of 2012 as lectures print it, with local response normalization.

    The stages `conv1`, `conv2` and `conv5`, before each max-pool, have strides 4, 8 and 16. Pools
    overlap (3x3, stride 2) and come before LRN, as in the lectures and in Caffe's CaffeNet (the
    publication normalizes first).

    Attributes:
      convolutions: (filters, kernel, stride, padding) of each convolution.
      pool_padding: padding of the max-pools after convolutions 1, 2 and 5.
      biased: numbers of the layers whose biases start at 1.
      groups: 1, as the lectures count, or 2, as the two GPUs of the publication split convolutions
        2, 4 and 5.
      dropout: rate after each dense layer but the last.
    """

    input_shape: tuple[int, int, int] = (227, 227, 3)
    convolutions: tuple[tuple[int, int, int, int], ...] = _ALEXNET
    pool_padding: tuple[int, int, int] = (0, 0, 0)
    biased: tuple[int, ...] = _BIASED
    groups: int = 1
    dropout: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.groups not in (1, 2):
            raise ValueError(f"groups={self.groups!r} is not 1 or 2")

    @nn.nowrap
    def walk(self, x, train):
        def shared(number):
            bias = nn.initializers.constant(1.0 if number in self.biased else 0.0)
            return {
                "kernel_init": nn.initializers.normal(0.01),
                "bias_init": bias,
                "dtype": self.dtype,
            }

        fill_and_sampling = {"fill": self.padding, "sampling": self.sampling}
        pools = dict(zip((1, 2, 5), self.pool_padding))
        for number, (features, size, stride, padding) in enumerate(self.convolutions, 1):
            groups = self.groups if number in _SPLIT else 1
            x = Conv(
                features,
                size,
                conv_stride(stride, self.sampling),
                padding,
                groups=groups,
                fill=self.padding,
                name=f"conv{number}",
                **shared(number),
            )(x)
            x = relu(x)
            x = sample(x, stride, **fill_and_sampling)
            if number in pools:
                x = yield f"conv{number}", x
                x = max_pool(x, 3, 2, pools[number], **fill_and_sampling)
            if number <= 2:
                x = local_response_norm(x)
        x = flatten(x)
        for number in (6, 7):
            x = Dense(4096, name=f"fc{number}", **shared(number))(x)
            x = relu(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        head = Dense(self.num_classes, name="fc8", **shared(8))
        yield "logits", head(x)


class ZFNet(AlexNet2012):
    """ZFNet as lectures print it: AlexNet with smaller first filters and more maps.

    The stages `conv1`, `conv2` and `conv5`, before each max-pool, have strides 2, 8 and 16.
    """

    input_shape: tuple[int, int, int] = (224, 224, 3)
    convolutions: tuple[tuple[int, int, int, int], ...] = _ZFNET
    pool_padding: tuple[int, int, int] = (1, 1, 0)
    biased: tuple[int, ...] = ()


register("alexnet_2012", AlexNet2012)
register("zfnet", ZFNet)
