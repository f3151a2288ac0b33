"""Trained weights from torchvision's records and files, without PyTorch.

Data flow one way: `records` says what is published, `download` finds or fetches a file, `files`
reads its tensors (safetensors; .pth by `pth` and `unpickling`), `torchvision` turns them into a
network's variables, `pretrained` does all of this in one call, and `preprocessing` prepares
photographs.

`python -m cnnjax.weights` lists the published weights.
"""

from typing import TYPE_CHECKING

from cnnjax.runtime import lazy
from cnnjax.weights.records import (
    Record,
    fields_for,
    find,
    imagenet_classes,
    list_weights,
    of_file,
)

if TYPE_CHECKING:
    from cnnjax.weights.download import fetch
    from cnnjax.weights.files import read
    from cnnjax.weights.preprocessing import preprocess
    from cnnjax.weights.pretrained import load_pretrained
    from cnnjax.weights.torchvision import (
        head,
        load_torchvision,
        save_torchvision,
        torchvision_keys,
        variable_shapes,
    )

__all__ = [
    "Record",
    "fetch",
    "fields_for",
    "find",
    "head",
    "imagenet_classes",
    "list_weights",
    "load_pretrained",
    "load_torchvision",
    "of_file",
    "preprocess",
    "read",
    "save_torchvision",
    "torchvision_keys",
    "variable_shapes",
]

__getattr__, __dir__ = lazy.attributes(
    __name__,
    {
        "fetch": "download",
        "head": "torchvision",
        "load_pretrained": "pretrained",
        "load_torchvision": "torchvision",
        "preprocess": "preprocessing",
        "read": "files",
        "save_torchvision": "torchvision",
        "torchvision_keys": "torchvision",
        "variable_shapes": "torchvision",
    },
)
