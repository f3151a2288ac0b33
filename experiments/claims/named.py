"""Statements that are not computed here: the reason, or the publications that contradict them."""

import functools

from experiments.claims.ledger import Section, contradicted, not_computed

NAMED = Section("Named, not computed")

# (id, lectures, statement, reason)
STATEMENTS = (
    (
        "E1",
        "NUS",
        "An epoch of LeNet takes 96 s on a CPU, 6 s on a K80, 2 s on a GTX 1080",
        "needs those devices",
    ),
    (
        "E2",
        "NUS",
        "An epoch of the ConvNet takes 14 min on a CPU, 72 s on a K80, 9 s on a GTX 1080",
        "needs those devices",
    ),
    (
        "E3",
        "UBC",
        "GPUs train these networks an order of magnitude faster than CPUs",
        "needs a GPU: `python -m cnnjax.benchmark gpu`",
    ),
    (
        "E4",
        "WPI UBC",
        "A backward pass takes about twice the memory of the forward pass",
        "depends on what the compiler keeps, computes again, or overwrites",
    ),
    (
        "E5",
        "UBC",
        "ImageNet has 14 M images of 22 K classes; the challenge uses 1 K classes and counts the "
        "five likeliest",
        "facts about a data set that is not at hand",
    ),
    (
        "E6",
        "NUS",
        "LeNet-5 (1998) was the first convolutional network",
        "LeCun et al. (1989, Neural Computation 1) published one earlier, and Fukushima's "
        "Neocognitron is of 1980 (Biological Cybernetics 36)",
    ),
    ("E7", "UTSA", "Biological vision is organized in hierarchical layers (1962)", "neuroscience"),
    (
        "E8",
        "UBC",
        "ZFNet, VGG, and GoogLeNet, as their pictures are labeled, won in 2012",
        "AlexNet won in 2012, and the others belong to 2013 and 2014 (Russakovsky et al. 2015, "
        "arXiv 1409.0575)",
    ),
    ("E9", "NUS", "VGG came second in 2014; AlexNet, GoogLeNet, and ResNet won", "history"),
    (
        "E10",
        "UBC",
        "Detection and instance segmentation are further kinds of problems",
        "not built here",
    ),
    (
        "E11",
        "Inha",
        "torchvision also has models for detection, instance segmentation, keypoints, and video",
        "not built here",
    ),
    (
        "E12",
        "UBC",
        "Static graphs let a framework optimize the computation before it runs",
        "JAX's jit is an example; not measured against the frameworks of 2018",
    ),
    ("E13", "NUS", "Convolutions run fast on GPUs by cuDNN", "needs a GPU"),
    (
        "E14",
        "NUS",
        "The deeper, the better",
        "shown by the published errors (D6.1), which are not measured here",
    ),
    (
        "E15",
        "WPI",
        "Patterns get more complex with depth, so deeper layers need more filters",
        "an explanation, not a measurable statement",
    ),
    (
        "E16",
        "UTSA",
        "Perceptrons with many layers are hard to train",
        "depends on initialization and normalization, which the lecture does not name",
    ),
    (
        "E17",
        "UBC UTSA",
        "AlexNet was the first network to use ReLUs",
        "AlexNet's authors (Krizhevsky et al. 2012) cite Nair and Hinton (2010) for ReLUs, and "
        "Jarrett et al. (2009) for another rectifier; Fukushima's of 1969 is older still",
    ),
    (
        "E18",
        "UBC",
        "You need a lot of data to train a CNN",
        'the lecture itself calls this "common wisdom" and answers with transfer (D9.1)',
    ),
    (
        "E19",
        "UBC",
        "Puddle is a framework by Baidu",
        "the framework is called Paddle (Ma et al. 2019, PaddlePaddle)",
    ),
)
# Wrong by the publications in their reasons.
CONTRADICTED_IDS = ("E6", "E8", "E17", "E19")

for _id, _sources, _statement, _reason in STATEMENTS:
    _verdict = contradicted if _id in CONTRADICTED_IDS else not_computed
    NAMED.claim(_id, _sources, _statement)(functools.partial(_verdict, _reason))
