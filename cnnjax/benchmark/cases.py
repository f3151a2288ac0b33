"""The networks, convolutions, passes and sides of the benchmarks.

Nothing here imports jax: commands and sides set its environment first.
"""

from typing import NamedTuple

ONEDNN_LIBRARY = "ONEDNN_LIBRARY"  # environment variable with the path of oneDNN's library


class Convolution(NamedTuple):
    """A convolution of square images with a square kernel."""

    batch: int
    size: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    groups: int

    @property
    def output_size(self) -> int:
        """Returns the height and width of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def flops(self) -> float:
        """Counts the operations of the forward pass, two for each multiply-add."""
        taps = self.kernel**2 * self.inputs // self.groups
        return 2.0 * self.batch * self.output_size**2 * taps * self.outputs


# The lectures' networks as PyTorch builds them: image side, channels, then features, kernel and
# padding of a convolution with its ReLU, "pool", or the features of a linear layer.
SPECIFICATIONS: dict[str, tuple[int, int, tuple]] = {
    "tutorial_net": (32, 3, ((6, 5, 0), "pool", (16, 5, 0), "pool", 120, 84, 10)),
    "lenet": (28, 1, ((50, 3, 1), "pool", (100, 3, 1), "pool", 100, 10)),
    "convnet": (
        32,
        3,
        (
            (64, 3, 1),
            (64, 3, 1),
            "pool",
            (128, 3, 1),
            (128, 3, 1),
            "pool",
            (256, 3, 1),
            (256, 3, 1),
            "pool",
            (512, 3, 1),
            "pool",
            4096,
            4096,
            10,
        ),
    ),
}
NETWORKS = {  # name -> images in a batch
    "cpu": {"tutorial_net": 64, "lenet": 128, "convnet": 64, "resnet18": 8, "mobilenet_v2": 8},
    "gpu": {"resnet50": 256, "vgg16": 128, "convnet": 64},
}
BATCH = 8  # of other networks
# Batch, size, inputs, outputs, kernel, stride, padding, groups.
LAYERS = {
    "tutorial_net.conv1": Convolution(64, 32, 3, 6, 5, 1, 0, 1),
    "lenet.conv1": Convolution(128, 28, 1, 50, 3, 1, 1, 1),
    "lenet.conv2": Convolution(128, 14, 50, 100, 3, 1, 1, 1),
    "convnet.conv1a": Convolution(64, 32, 3, 64, 3, 1, 1, 1),
    "convnet.conv1b": Convolution(64, 32, 64, 64, 3, 1, 1, 1),
    "convnet.conv2b": Convolution(64, 16, 128, 128, 3, 1, 1, 1),
    "convnet.conv3b": Convolution(64, 8, 256, 256, 3, 1, 1, 1),
    "resnet18.conv1": Convolution(8, 224, 3, 64, 7, 2, 3, 1),
    "resnet18.layer1.0.conv1": Convolution(8, 56, 64, 64, 3, 1, 1, 1),
    "resnet18.layer2.0.conv1": Convolution(8, 56, 64, 128, 3, 2, 1, 1),
    "resnet18.layer2.0.downsample.0": Convolution(8, 56, 64, 128, 1, 2, 0, 1),
    "resnet50.layer1.1.conv1": Convolution(8, 56, 256, 64, 1, 1, 0, 1),
    "resnet50.layer1.1.conv3": Convolution(8, 56, 64, 256, 1, 1, 0, 1),
    "densenet121.features.denseblock1.denselayer1.conv2": Convolution(8, 56, 128, 32, 3, 1, 1, 1),
    "resnext50_32x4d.layer1.0.conv2": Convolution(8, 56, 128, 128, 3, 1, 1, 32),
    "mobilenet_v2.features.2.conv.1.0": Convolution(8, 112, 96, 96, 3, 2, 1, 96),
    "mobilenet_v2.features.3.conv.1.0": Convolution(8, 56, 144, 144, 3, 1, 1, 144),
    "mobilenet_v2.features.4.conv.1.0": Convolution(8, 56, 144, 144, 3, 2, 1, 144),
}
SIDES = {
    "cpu": ("cnnjax", "stock", "torch", "torch.compile"),
    "gpu": ("cnnjax", "torch", "torch.compile"),
    "layers": ("cnnjax", "stock", "torch"),
    "compile": ("cnnjax", "stock"),
}
# Measured only if named: cnnjax with oneDNN's convolutions.
MORE_SIDES = {"cpu": ("oneDNN",), "layers": ("oneDNN",)}
# A step is one call. Training takes many steps in one call where the side can, as cnnjax does
# with data that live on the device.
_NETWORK_PASSES = ("forward", "step", "training")
PASSES = {
    "cpu": _NETWORK_PASSES,
    "gpu": _NETWORK_PASSES,
    "layers": ("forward", "input gradient", "kernel gradient"),
    "compile": ("compile",),
}
# Side of the square matrices whose product shows the machine's peak.
PRODUCT = {"cpu": 2048, "gpu": 8192, "layers": 2048}
RATE = 1e-3  # learning rate of training steps
MOMENTUM = 0.9
