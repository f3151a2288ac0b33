"""The moments of ImageNet's pixels."""

import numpy as np

# Per channel, of pixels between 0 and 1. Images are normalized by them for torchvision's weights.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MOMENTS = (np.array(MEAN, np.float32), np.array(STD, np.float32))
