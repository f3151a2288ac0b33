"""Multi-layer perceptrons, the baselines of the NUS lecture (CS5242, lecture 8).

They have 0.03 M and 2 M parameters on CIFAR-10.
"""

import functools

import flax.linen as nn

from cnnjax.models.base import Network, register
from cnnjax.nn import Dense, flatten, relu


class MLP(Network):
    """Perceptron: `mlp1` has one layer, `mlp3` three.

    ReLUs and dropout stand between the layers `fc1`, `fc2`, ... There are no stages, since there
    are no maps.

    Attributes:
      hidden: features of each layer but the last.
      dropout: rate after each hidden layer.
    """

    num_classes: int = 10
    input_shape: tuple[int, int, int] = (32, 32, 3)
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0

    @nn.nowrap
    def walk(self, x, train):
        x = flatten(x)
        for number, features in enumerate(self.hidden, 1):
            x = Dense(features, dtype=self.dtype, name=f"fc{number}")(x)
            x = relu(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        last = len(self.hidden) + 1
        yield "logits", Dense(self.num_classes, dtype=self.dtype, name=f"fc{last}")(x)


register("mlp1", MLP)
# The lecture prints "2 M" and no widths: two hidden layers of 512 make 1.84 M, the nearest power of
# two.
register("mlp3", functools.partial(MLP, hidden=(512, 512)))
