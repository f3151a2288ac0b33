"""What the position study decides where the literature is silent, as every report prints it.

It also names where the study departs from the authors' code
(github.com/SenJia/Position-Information).
"""

from cnnjax.position.encoder import FEATURE_SIZE
from cnnjax.position.metrics import CONSTANT
from cnnjax.position.readout import STRENGTHS

DECISIONS = (
    "Readouts are fitted to photographs, as the authors' are, where `fitted_to` is left as it is. "
    "Photographs are cropped to squares; the authors squash whole images.",
    "Noise images are Gaussian with mean 127.5 and standard deviation 64 where `noise` is left as "
    "it is, another one for each seed; the authors have one dark image with mean 25 and standard "
    "deviation 24.",
    "Inputs are RGB / 255 standardized by ImageNet's mean and standard deviation, with random "
    "weights too: a black image then differs from the zeros of the padding. The authors' inputs "
    "are pixels from 0 to 1, as here where `pixels` is 'unit'.",
    "The stages are VGG's five blocks, each before its max-pool, as in the authors' code, and "
    "ResNet's stem before its max-pool and its layers, of which the authors read the layers alone. "
    "Where `stages` is empty, all paddings use the stages that every padding reaches at this image "
    "size.",
    f"Every stage is resized to {FEATURE_SIZE}x{FEATURE_SIZE} (bilinear, corners aligned), as in "
    "the authors' code; where `registered`, all stages are sampled at the same pixels instead. The "
    "channels of all stages are joined. Each channel is standardized over "
    "the training images; the authors' features are raw, as here for the authors' readout where "
    "`standardize` is False.",
    "'none' pads nothing anywhere (residual skips are cropped to their branch). The readout itself "
    "is padded only by `readout_padding`, with zeros, before the features are standardized.",
    "The readout's `kernel` is 1 by default; the authors' is 3.",
    "Readout 'sgd' is the authors' head: convolution, BatchNorm, sigmoid; SGD with learning rate "
    "0.1 (a tenth after two thirds of the steps), momentum 0.9, weight decay 1e-4, mean squared "
    "error at the image's size. A batch has 32 images, or all training images where there are "
    "fewer (24 by default), for `sgd_steps` steps (540 by default); the authors' 15 epochs on "
    "10,553 images are some 5,000 steps.",
    "Where `depth` is above 1, readout 'sgd' has that many convolutions, each but the last "
    "followed by BatchNorm and ReLU; 'exact' keeps one.",
    "Readout 'exact' is the ridge solution on the readout's own grid. Each target's strength is "
    f"chosen from {STRENGTHS[0]:g} to {STRENGTHS[-1]:g} on held-out images of the kind that the "
    "readout is fitted to.",
    "Predictions are upsampled to the image's size (bilinear, corners aligned; not aligned in the "
    "authors' code, and here where `align_corners` is False) and scored there, image by image. "
    "Where `shuffled`, targets are made, and predictions scored, on the readout's own grid; all "
    "seeds share one permutation, which the first seed draws.",
    "SPC is Spearman's rank correlation; a map whose range is under "
    f"{CONSTANT:g} of the target's counts as constant and scores 0. SPC is blind to amplitude: "
    "read it beside R2, the share of the target's variance explained (0 for a constant, negative "
    "for worse).",
    "Targets span 0 to 1, stripes included. In the paper's tables stripes span -1 to 1, so its "
    "errors on HS and VS are twice as large.",
    "Each seed draws its own division of the photographs (training, held-out and test are "
    "disjoint), its own crops, its own random weights and its own start of the SGD readout. From a "
    "part with more photographs than crops, it draws them at random. Mean and sample standard "
    "deviation are over images and seeds together.",
)
