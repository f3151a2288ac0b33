"""What every network is made of."""
from cnnjax.nn.conv import Conv, Dense, conv, he_normal_fan_out, uniform_fan_in
from cnnjax.nn.norm import BatchNorm, local_response_norm
from cnnjax.nn.padding import FILLS, center_crop, check_fill, concatenate, crop_to_branch, output_size, pad
from cnnjax.nn.pooling import adaptive_avg_pool, avg_pool, global_avg_pool, max_pool
from cnnjax.nn.resize import resize

__all__ = ["FILLS", "BatchNorm", "Conv", "Dense", "adaptive_avg_pool", "avg_pool", "center_crop", "check_fill", "concatenate", "conv",
           "crop_to_branch", "global_avg_pool", "he_normal_fan_out", "local_response_norm", "max_pool", "output_size", "pad", "resize",
           "uniform_fan_in"]
