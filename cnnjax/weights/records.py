"""torchvision's published ImageNet weights: files, accuracies, preprocessing."""

import dataclasses
import difflib
import functools
import logging
import os
import pathlib

from cnnjax.runtime import files, workdir
from cnnjax.runtime.paths import expand_user, sha256
from cnnjax.runtime.progress import log_once
from cnnjax.weights import pth

V1 = "imagenet1k_v1"
V2 = "imagenet1k_v2"
# Networks whose published weights were trained on pixels normalized by 0.5 and 0.5, so that they
# convert their input. They alone have the field `transform_input`.
CONVERTING = ("googlenet", "inception_v3")
# What a training run leaves in its work directory.
WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Record:
    """One set of weights and how it was published.

    Attributes:
      network: name of the network.
      tag: `V1` or `V2`.
      file: name on torchvision's server; what follows its last dash begins the SHA-256.
      top1: top-1 accuracy in percent on ImageNet's validation set, as torchvision states it.
      top5: top-5 accuracy, likewise.
      resize: pixels of the shorter side.
      crop: pixels of the square cut from the center.
      hub: repository on the Hugging Face hub with the same numbers, if there is one.
      transform_input: whether the network was trained on pixels normalized by 0.5 and 0.5, so that
        it converts its input (a field of GoogLeNet and Inception v3).
    """

    network: str
    tag: str
    file: str
    top1: float
    top5: float
    resize: int = 256
    crop: int = 224
    hub: str | None = None
    transform_input: bool = False

    @property
    def url(self) -> str:
        """Returns the address of the file on torchvision's server."""
        return f"https://download.pytorch.org/models/{self.file}"

    @property
    def sha256(self) -> str:
        """Returns the first digits of the file's SHA-256."""
        return self.file.removesuffix(".pth").rpartition("-")[2]

    @property
    def fields(self) -> dict[str, bool]:
        """Returns the fields that a network needs to use these weights, as `fields_for`."""
        return _fields(self.transform_input) if self.network in CONVERTING else {}

    def resized(self, resize: int | None) -> "Record":
        """Returns the record with another `resize`; with None, the record itself.

        Raises `ValueError` if the crop would not fit.
        """
        if resize is None:
            return self
        if resize < self.crop:
            raise ValueError(f"resize={resize} is not at least {self.crop}, the side of the crop")
        return dataclasses.replace(self, resize=resize)


# torchvision 0.28, `torchvision.models.get_model_weights(NAME)`: file, top-1, top-5.
_V1 = {
    "alexnet": ("alexnet-owt-7be5be79", 56.522, 79.066),
    "densenet121": ("densenet121-a639ec97", 74.434, 91.972),
    "densenet161": ("densenet161-8d451a50", 77.138, 93.560),
    "densenet169": ("densenet169-b2777c0a", 75.600, 92.806),
    "densenet201": ("densenet201-c1103571", 76.896, 93.370),
    "googlenet": ("googlenet-1378be20", 69.778, 89.530),
    "inception_v3": ("inception_v3_google-0cc3c7bd", 77.294, 93.450),
    "mnasnet0_5": ("mnasnet0.5_top1_67.823-3ffadce67e", 67.734, 87.490),
    "mnasnet0_75": ("mnasnet0_75-7090bc5f", 71.180, 90.496),
    "mnasnet1_0": ("mnasnet1.0_top1_73.512-f206786ef8", 73.456, 91.510),
    "mnasnet1_3": ("mnasnet1_3-a4c69d6f", 76.506, 93.522),
    "mobilenet_v2": ("mobilenet_v2-b0353104", 71.878, 90.286),
    "resnet18": ("resnet18-f37072fd", 69.758, 89.078),
    "resnet34": ("resnet34-b627a593", 73.314, 91.420),
    "resnet50": ("resnet50-0676ba61", 76.130, 92.862),
    "resnet101": ("resnet101-63fe2227", 77.374, 93.546),
    "resnet152": ("resnet152-394f9c45", 78.312, 94.046),
    "resnext50_32x4d": ("resnext50_32x4d-7cdf4587", 77.618, 93.698),
    "shufflenet_v2_x0_5": ("shufflenetv2_x0.5-f707e7126e", 60.552, 81.746),
    "shufflenet_v2_x1_0": ("shufflenetv2_x1-5666bf0f80", 69.362, 88.316),
    "shufflenet_v2_x1_5": ("shufflenetv2_x1_5-3c479a10", 72.996, 91.086),
    "shufflenet_v2_x2_0": ("shufflenetv2_x2_0-8be3c8ee", 76.230, 93.006),
    "squeezenet1_0": ("squeezenet1_0-b66bff10", 58.092, 80.420),
    "squeezenet1_1": ("squeezenet1_1-b8a52dc0", 58.178, 80.624),
    "vgg11": ("vgg11-8a719046", 69.020, 88.628),
    "vgg11_bn": ("vgg11_bn-6002323d", 70.370, 89.810),
    "vgg13": ("vgg13-19584684", 69.928, 89.246),
    "vgg13_bn": ("vgg13_bn-abd245e5", 71.586, 90.374),
    "vgg16": ("vgg16-397923af", 71.592, 90.382),
    "vgg16_bn": ("vgg16_bn-6c64b313", 73.360, 91.516),
    "vgg19": ("vgg19-dcbb9e9d", 72.376, 90.876),
    "vgg19_bn": ("vgg19_bn-c79401a0", 74.218, 91.842),
    "wide_resnet50_2": ("wide_resnet50_2-95faca4d", 78.468, 94.086),
}
_V2 = {
    "mobilenet_v2": ("mobilenet_v2-7ebf99e0", 72.154, 90.822),
    "resnet50": ("resnet50-11ad3fa6", 80.858, 95.434),
    "resnet101": ("resnet101-cd907fc2", 81.886, 95.780),
    "resnet152": ("resnet152-f82ba261", 82.284, 96.002),
    "resnext50_32x4d": ("resnext50_32x4d-1a0047aa", 81.198, 95.340),
    "wide_resnet50_2": ("wide_resnet50_2-9ba9bcbe", 81.602, 95.758),
}
# V1 weights that were trained by torchvision's newer recipe, like all of V2.
_RESIZED_TO_232 = ("mnasnet0_75", "mnasnet1_3", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0")
# timm carries torchvision's own numbers of these families as NAME.tv_in1k and NAME.tv2_in1k. Its
# MobileNetV2 and MNASNet are other weights.
_ON_HUB = ("densenet", "inception", "resnet", "resnext", "vgg", "wide_resnet")


def _record(network: str, tag: str) -> Record:
    file, top1, top5 = (_V1 if tag == V1 else _V2)[network]
    hub = None
    if network.startswith(_ON_HUB):
        hub = f"timm/{network}.{'tv' if tag == V1 else 'tv2'}_in1k"
    resize, crop = (256, 224)
    if network == "inception_v3":
        resize, crop = (342, 299)
    elif tag == V2 or network in _RESIZED_TO_232:
        resize = 232
    return Record(
        network,
        tag,
        f"{file}.pth",
        top1,
        top5,
        resize=resize,
        crop=crop,
        hub=hub,
        transform_input=network in CONVERTING,
    )


def list_weights() -> list[Record]:
    """Returns all weights, by network and tag."""
    weights = []
    for network in _V1:
        weights.append(_record(network, V1))
        if network in _V2:
            weights.append(_record(network, V2))
    return weights


def find(name: str, tag: str = V1) -> Record:
    """Returns the record of a network's weights.

    Raises `ValueError` if the network or tag is unknown, naming near networks or the network's
    tags.
    """
    if not isinstance(name, str) or name not in _V1:
        near = difflib.get_close_matches(str(name), _V1, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see python -m cnnjax.weights"
        raise ValueError(f"model={name!r} has no published ImageNet weights; {hint}")
    tags = [V1, V2] if name in _V2 else [V1]
    if not isinstance(tag, str) or tag.lower() not in tags:
        raise ValueError(f"tag={tag!r} is not one of {name}'s: {', '.join(tags)}")
    return _record(name, tag.lower())


def of_name(path: str | os.PathLike) -> Record | None:
    """Returns the record of a published file; None if its path is not that of one.

    It is recognized by torchvision's name, or by its folder in the Hugging Face cache. The file is
    not read.
    """
    path = pathlib.Path(path)
    for record in list_weights():
        hub_folder = f"models--{record.hub.replace('/', '--')}" if record.hub else None
        if record.file == path.name or hub_folder in path.parts:
            return record
    return None


def of_file(path: str | os.PathLike) -> Record | None:
    """Returns the record of a published file; None for any other file.

    It is recognized by its path, as in `of_name`, or, whatever its name, by torchvision's SHA-256.
    """
    record = of_name(path)
    path = expand_user(path)
    # torchvision publishes .pth files only.
    if record is not None or not path.is_file() or not pth.is_pth(path):
        return record
    status = path.stat()
    digest = _digest(path, status.st_size, status.st_mtime_ns)
    for record in list_weights():
        if digest.startswith(record.sha256):
            return record
    return None


@functools.lru_cache(maxsize=16)
def _digest(path: pathlib.Path, size: int, modified: int) -> str:
    """Hashes a file once for each of its states."""
    return sha256(path)


def check_tag(record: Record, path: str | os.PathLike, argument: str) -> None:
    """Raises `ValueError` if a file holds published weights of the record's network, but others.

    `argument` is what the error calls `path`.
    """
    held = of_file(path)
    if held is not None and held.network == record.network and held != record:
        raise ValueError(
            f"tag={record.tag!r} does not fit {argument}={str(path)!r}, which holds {held.tag}"
        )


def check_sha256(path: pathlib.Path, prefix: str) -> None:
    """Raises `ValueError` if the file's SHA-256 does not begin with `prefix`."""
    digest = sha256(path)
    if not digest.startswith(prefix):
        raise ValueError(
            f"{path} is damaged or another file: its SHA-256 begins with {digest[: len(prefix)]}, "
            f"the published file's with {prefix}; remove or rename it"
        )


def transforms_input(path: str | os.PathLike) -> bool | None:
    """Tells whether the network of a weights file converts its input.

    Published files tell (`of_file`), and those in the work directories of training runs with
    GoogLeNet or Inception v3 and of combinations of such runs. None stands for all others: tensors
    do not show it.
    """
    record = of_file(path)
    if record is not None:
        return record.transform_input
    path = expand_user(path)
    if path.name != WEIGHTS:
        return None
    recorded = workdir.read_record(path.parent, "train")
    results = path.parent / "results.json"
    # A combination records the network that it made beside its scores.
    if workdir.read_record(path.parent, "combine") is not None and results.is_file():
        recorded = files.read_json(results).get("config")
    # A network of the user's own may set the field by itself.
    if recorded is None or recorded["model"] not in CONVERTING:
        return None
    return recorded["model_fields"].get("transform_input", False)


def fields_for(
    name: str, source: str | os.PathLike, transform_input: bool | None = None
) -> dict[str, bool]:
    """Returns the fields that a network needs for weights from `source`.

    GoogLeNet and Inception v3 need `transform_input` as their weights were trained. They are built
    without auxiliary heads, which only training uses, and which torchvision never trained for
    GoogLeNet. Other networks need no fields, nor do random weights.

    Args:
      name: the network.
      source: "imagenet", "random" or a file.
      transform_input: whether the network of the file converts its input; unless given, as
        `transforms_input` tells. If it does not, False is assumed, and a warning logged.
    """
    if name not in CONVERTING or source == "random":
        return {}
    if transform_input is None:
        transform_input = True if source == "imagenet" else transforms_input(source)
    if transform_input is None:
        transform_input = False
        log_once(
            logging.WARNING,
            f"{source} is not a published file of {name}: transform_input=False is assumed; if it "
            "was trained with True, use cnnjax.load_pretrained(..., transform_input=True)",
        )
    return _fields(transform_input)


def _fields(transform_input: bool) -> dict[str, bool]:
    return {"transform_input": transform_input, "aux_logits": False}


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """Returns the names of ImageNet's 1,000 classes in the order of the logits.

    Source: torchvision's `_IMAGENET_CATEGORIES` (BSD 3-Clause).
    """
    text = pathlib.Path(__file__).with_name("imagenet_classes.txt").read_text()
    return tuple(text.splitlines())
