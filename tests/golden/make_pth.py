"""Makes the .pth files and the photographs' pixels that PyTorch and torchvision give.

    pip install torch==2.13.0 torchvision==0.28.0 numpy pillow
    python tests/golden/make_pth.py FOLDER_OF_SCIKIT_IMAGES_DATA

- `kinds.pth`, `kinds_legacy.pth`: tensors of every type, strided, shared, empty and repeated, in
  both formats of `torch.save`; `test_pth.py` states their values.
- `checkpoint.pth`: such a file of a training run, with the weights under `state_dict`.
- `model.pth`: a whole module, which names a class.
- `preprocessed.npz`: every 16th pixel of what torchvision's ImageNet transforms make of
  photographs.
"""

import collections
import pathlib
import sys

import numpy as np
import PIL.Image
import torch
import torchvision

FOLDER = pathlib.Path(__file__).parent
# Photograph -> (resize, crop): torchvision's V1, V2 and Inception v3.
PHOTOGRAPHS = {
    "chelsea.png": (256, 224),
    "coffee.png": (232, 224),
    "motorcycle_left.png": (342, 299),
    "camera.png": (256, 224),
}


def kinds() -> collections.OrderedDict:
    """Tensors of 0, 1, 2, ... seen in many ways."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = collections.OrderedDict(base=base)
    tensors["transposed"] = base.t()
    tensors["sliced"] = base[1:3, ::2]
    for name in ("float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8"):
        tensors[name] = torch.arange(5).to(getattr(torch, name))
    tensors["bool"] = torch.tensor([True, False, True])
    tensors["scalar"] = torch.tensor(3.0)
    tensors["empty"] = torch.zeros(0, 3)
    tensors["repeated"] = torch.ones(1).expand(7)
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2))
    return tensors


def save_files() -> None:
    tensors = kinds()
    torch.save(tensors, FOLDER / "kinds.pth")
    torch.save(tensors, FOLDER / "kinds_legacy.pth", _use_new_zipfile_serialization=False)
    layer = torch.nn.DataParallel(torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    checkpoint = {
        "epoch": 3,
        "best": 0.25,
        "state_dict": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, FOLDER / "checkpoint.pth")
    torch.save(torch.nn.Linear(2, 2), FOLDER / "model.pth")


def save_pixels(photographs: pathlib.Path) -> None:
    pixels = {}
    for name, (resize, crop) in PHOTOGRAPHS.items():
        transform = torchvision.transforms._presets.ImageClassification(
            crop_size=crop, resize_size=resize
        )
        image = PIL.Image.open(photographs / name).convert("RGB")
        pixels[name] = transform(image).permute(1, 2, 0).numpy()[::16, ::16]
    np.savez_compressed(FOLDER / "preprocessed.npz", **pixels)


if __name__ == "__main__":
    save_files()
    save_pixels(pathlib.Path(sys.argv[1]))
