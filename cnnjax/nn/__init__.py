"""What every network is made of."""

from cnnjax.nn.conv import Conv, Dense, conv, he_normal_fan_out, uniform_fan_in
from cnnjax.nn.geometry import output_size
from cnnjax.nn.norm import BatchNorm, local_response_norm
from cnnjax.nn.padding import FILLS, align, center, check_fill, concatenate, fit_to_branch, pad
from cnnjax.nn.pooling import adaptive_avg_pool, avg_pool, global_avg_pool, max_pool
from cnnjax.nn.resize import resize

__all__ = [
    "FILLS",
    "BatchNorm",
    "Conv",
    "Dense",
    "adaptive_avg_pool",
    "align",
    "avg_pool",
    "center",
    "check_fill",
    "concatenate",
    "conv",
    "fit_to_branch",
    "global_avg_pool",
    "he_normal_fan_out",
    "local_response_norm",
    "max_pool",
    "output_size",
    "pad",
    "resize",
    "uniform_fan_in",
]
