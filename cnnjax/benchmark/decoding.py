"""Images a second that a stream decodes, beside those that a training step takes and a loop of Pillow's decodes."""

import importlib.util
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import PIL.Image

from cnnjax.data import photographs, stream

SIZE, _RESIZE = 224, 256
MEAN_PIXELS, _QUALITY = 500 * 375, 95  # of ImageNet's images, most of which are 500 x 375
_BATCH, _COUNT = 32, 256
_SECONDS = 4.0  # a burst
_STEP_BATCH = {"cpu": 8}  # images; elsewhere 256


def write_folder(paths: list[pathlib.Path], root: pathlib.Path) -> stream.Folder:
    """Photographs as JPEGs of ImageNet's usual size -> the folder of them, `_COUNT` files, the photographs taken in turn."""
    (root / "photographs").mkdir(parents=True)
    for number in range(_COUNT):
        path = root / "photographs" / f"{number:04}.jpg"
        if number >= len(paths):
            path.write_bytes((root / "photographs" / f"{number % len(paths):04}.jpg").read_bytes())
            continue
        image = PIL.Image.fromarray(photographs.read_image(paths[number]))
        scale = (MEAN_PIXELS / (image.width * image.height)) ** 0.5
        image.resize([round(n * scale) for n in image.size], PIL.Image.Resampling.LANCZOS).save(
            path, quality=_QUALITY
        )
    return stream.Folder(root)


def _rate(made: Callable[[], Iterator], skipped: int) -> float:
    """Images a second of a stream's batches, after those that were made ahead while its processes started."""
    found = iter(made())
    for _ in range(skipped):
        next(found)
    count, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < _SECONDS:
        next(found)
        count += _BATCH
    getattr(found, "close", lambda: None)()
    return count / seconds


class _Crops:
    """What a stream does to each image."""

    def __init__(self, source: stream.Folder, train: bool):
        self.source, self.train = source, train

    def __len__(self):
        return len(self.source)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        image, label = self.source[number]
        if self.train:
            image = stream.area_crop(image, SIZE, np.random.default_rng())
        else:
            image = stream.center(image, SIZE, _RESIZE)
        return np.array(image), label  # PyTorch wants one that it may write to


def _loop(crops: _Crops) -> Iterator[np.ndarray]:
    for start in itertools.count(0, _BATCH):
        yield np.stack([crops[number % len(crops)][0] for number in range(start, start + _BATCH)])


def _loader(crops: _Crops, workers: int) -> Iterator:
    """PyTorch's DataLoader of the same images and crops, which makes tensors of bytes of them."""
    import torch

    sampler = torch.utils.data.RandomSampler(crops, replacement=True, num_samples=10**6)
    return torch.utils.data.DataLoader(
        crops,
        _BATCH,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )


def _ways(
    source: stream.Folder, workers: tuple[int, ...], train: bool
) -> dict[tuple[str, int], Callable]:
    """(name, worker processes) -> a function that measures images a second."""
    crops, endless = _Crops(source, train), stream.Part(source, np.arange(10**6) % len(source))
    found: dict[tuple[str, int], Callable] = {
        ("Pillow in a loop", 0): lambda: _rate(lambda: _loop(crops), 1)
    }
    for count in workers:
        found["cnnjax", count] = lambda count=count: _rate(
            lambda: stream.batches(
                endless,
                _BATCH,
                0,
                SIZE,
                resize=0 if train else _RESIZE,
                train=train,
                steps=range(10**4),
                workers=count,
            ),
            4 + 4 * count,
        )
    if importlib.util.find_spec("torch"):
        for count in workers:
            found["PyTorch", count] = lambda count=count: _rate(
                lambda: _loader(crops, count), 4 + 4 * count
            )
    return found


def _row(
    mode: str, way: str, workers: int, found: list[float], loop: list[float], steps: list[float]
) -> dict:
    return {
        "mode": mode,
        "way": way,
        "workers": workers,
        "images_per_s": statistics.median(found),
        "min": min(found),
        "max": max(found),
        "over_loop": statistics.median(a / b for a, b in zip(found, loop)),
        "over_step": statistics.median(a / b for a, b in zip(found, steps)),
    }


def measure(
    photographs_folder: str, rounds: int, workers: tuple[int, ...] = (0, 1, 2, 4)
) -> Iterator[dict]:
    """Images a second of every way to read, in training and evaluation, in turns; and of ResNet-50's training step on this device.

    Yields what is known after each round.
    """
    from cnnjax.benchmark import sides

    paths, device = photographs.list_photographs(photographs_folder), jax.default_backend()
    batch = _STEP_BATCH.get(device, 256)
    functions, _ = sides._jax_network(
        "resnet50", batch, "float32" if device == "cpu" else "bfloat16"
    )
    functions["step"](2)
    steps: list[float] = []
    rates: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = write_folder(paths, pathlib.Path(folder))
        size = round(sum(path.stat().st_size for path, _ in source.files) / len(source) / 1000)
        ways = {
            (mode, *way): measured
            for mode in ("training", "evaluation")
            for way, measured in _ways(source, workers, mode == "training").items()
        }
        for _ in range(rounds):
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < _SECONDS:
                functions["step"](1)
                count += batch
            steps.append(count / (time.perf_counter() - began))
            for way, measured in ways.items():
                rates.setdefault(way, []).append(measured())
            yield {
                "photographs": len(paths),
                "kilobytes": size,
                "step_batch": batch,
                "step_images_per_s": statistics.median(steps),
                "rounds": len(steps),
                "rows": [
                    _row(*way, found, rates[way[0], "Pillow in a loop", 0], steps)
                    for way, found in rates.items()
                ],
            }
