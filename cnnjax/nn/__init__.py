"""The operations that networks are made of.

Each file holds an operation's definition, its checks and one plain lax call. `cnnjax.nn.cpu` holds
the forms that run fast on the CPU, and `cnnjax.nn.lowering` decides which of the two is used.
"""

from cnnjax.nn.activation import relu, relu_rule
from cnnjax.nn.conv import Conv, Dense, conv, he_normal_fan_out, uniform_fan_in
from cnnjax.nn.geometry import output_size
from cnnjax.nn.lowering import lowering
from cnnjax.nn.norm import BatchNorm, local_response_norm
from cnnjax.nn.padding import FILLS, align, center, check_fill, concatenate, fit_to_branch, pad
from cnnjax.nn.pooling import adaptive_avg_pool, avg_pool, flatten, global_avg_pool, max_pool
from cnnjax.nn.resize import linear_interpolation, resize
from cnnjax.nn.sampling import SAMPLINGS, check_sampling, conv_stride, sample
from cnnjax.nn.sums import add_bias

__all__ = [
    "FILLS",
    "SAMPLINGS",
    "BatchNorm",
    "Conv",
    "Dense",
    "adaptive_avg_pool",
    "add_bias",
    "align",
    "avg_pool",
    "center",
    "check_fill",
    "check_sampling",
    "concatenate",
    "conv",
    "conv_stride",
    "fit_to_branch",
    "flatten",
    "global_avg_pool",
    "he_normal_fan_out",
    "linear_interpolation",
    "local_response_norm",
    "lowering",
    "max_pool",
    "output_size",
    "pad",
    "relu",
    "relu_rule",
    "resize",
    "sample",
    "uniform_fan_in",
]
