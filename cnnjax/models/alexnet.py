"""AlexNet in torchvision's form, one tower without normalization.

Source: Krizhevsky 2014 (arXiv 1404.5997).
"""

import flax.linen as nn

from cnnjax.models.base import Network, register
from cnnjax.nn import Conv, Dense, adaptive_avg_pool, conv_stride, flatten, max_pool, relu, sample

# (index in torchvision's `features`, filters, kernel, stride, padding, does a 3x3 max-pool of
# stride 2 follow?)
_TABLE = (
    (0, 64, 11, 4, 2, True),
    (3, 192, 5, 1, 2, True),
    (6, 384, 3, 1, 1, False),
    (8, 256, 3, 1, 1, False),
    (10, 256, 3, 1, 1, True),
)


class AlexNet(Network):
    """AlexNet as in torchvision: one tower, no local response normalization.

    The stages `conv1`, `conv2` and `conv5`, before each max-pool, have strides 4, 8 and 16.
    """

    dropout: float = 0.5

    @nn.nowrap
    def walk(self, x, train):
        fill_and_sampling = {"fill": self.padding, "sampling": self.sampling}
        for number, (index, features, size, stride, padding, pooled) in enumerate(_TABLE, 1):
            x = Conv(
                features,
                size,
                conv_stride(stride, self.sampling),
                padding,
                fill=self.padding,
                dtype=self.dtype,
                name=f"features.{index}",
            )(x)
            x = relu(x)
            x = sample(x, stride, **fill_and_sampling)
            if pooled:
                x = yield f"conv{number}", x
                x = max_pool(x, 3, 2, **fill_and_sampling)
        x = adaptive_avg_pool(x, 6)
        x = flatten(x)
        for layer in (1, 4):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = Dense(4096, dtype=self.dtype, name=f"classifier.{layer}")(x)
            x = relu(x)
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name="classifier.6")(x)


register("alexnet", AlexNet)
