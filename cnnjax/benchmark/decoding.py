"""Images per second that a stream decodes.

They are compared with a loop of Pillow's and a training step.
"""

import functools
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

from cnnjax.data import folders, photographs, stream
from cnnjax.data.crops import area_crop, center

SIZE = 224
_RESIZE = 256
MEAN_PIXELS = 500 * 375  # of ImageNet's images, most of which are 500 x 375
_QUALITY = 95  # of a JPEG
_BATCH = 32
_COUNT = 256  # files
_SECONDS = 4.0  # a burst
_STEP_BATCH = {"cpu": 8}  # images; elsewhere 256


def write_folder(paths: list[pathlib.Path], root: pathlib.Path) -> folders.Folder:
    """Writes photographs as JPEGs of ImageNet's usual size.

    Returns the folder of `_COUNT` files, made from the photographs in turn.
    """
    folder = root / "photographs"
    folder.mkdir(parents=True)
    for number in range(_COUNT):
        path = folder / f"{number:04}.jpg"
        if number >= len(paths):
            path.write_bytes((folder / f"{number % len(paths):04}.jpg").read_bytes())
            continue
        image = PIL.Image.fromarray(photographs.read_image(paths[number]))
        scale = (MEAN_PIXELS / (image.width * image.height)) ** 0.5
        size = [round(n * scale) for n in image.size]
        image.resize(size, PIL.Image.Resampling.LANCZOS).save(path, quality=_QUALITY)
    return folders.Folder(root)


class _Crops:
    """A data set of crops, as a stream makes them from each image."""

    def __init__(self, source: folders.Folder, train: bool):
        self.source = source
        self.train = train

    def __len__(self):
        return len(self.source)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        image, label = self.source[number]
        if self.train:
            image = area_crop(image, SIZE, np.random.default_rng())
        else:
            image = center(image, SIZE, _RESIZE)
        return np.array(image), label  # PyTorch wants an array that it may write to


# ------------------------------------------------------------------ ways to read


def _loop(crops: _Crops) -> Iterator[np.ndarray]:
    """Yields batches that are decoded one image after another."""
    for start in itertools.count(0, _BATCH):
        numbers = range(start, start + _BATCH)
        yield np.stack([crops[number % len(crops)][0] for number in numbers])


def _loader(crops: _Crops, workers: int) -> Iterator:
    """Makes PyTorch's DataLoader of the same crops, which yields tensors of bytes."""
    import torch

    # More images than a burst reads.
    sampler = torch.utils.data.RandomSampler(crops, replacement=True, num_samples=10**6)
    return torch.utils.data.DataLoader(
        crops,
        _BATCH,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )


def _stream(source: folders.Folder, workers: int, train: bool) -> Iterator:
    """Makes cnnjax's stream of the same crops."""
    # More images, and more steps, than a burst reads.
    part = folders.Part(source, np.arange(10**6) % len(source))
    batches: stream.TrainingBatches | stream.EvaluationBatches
    if train:
        batches = stream.TrainingBatches(
            source=part, batch_size=_BATCH, steps=range(10**4), seed=0, size=SIZE, resize=0
        )
    else:
        batches = stream.EvaluationBatches(part, _BATCH, SIZE, _RESIZE)
    return stream.iterate(batches, workers)


def _ways(
    source: folders.Folder, workers: tuple[int, ...], train: bool
) -> dict[tuple[str, int], Callable[[], float]]:
    """Returns functions that measure images per second, by (name, worker processes)."""
    crops = _Crops(source, train)
    ways: dict[tuple[str, int], Callable[[], float]] = {
        ("Pillow in a loop", 0): functools.partial(_rate, lambda: _loop(crops), 1)
    }
    # Batches made while each worker process starts, which do not count.
    skipped = {count: 4 + 4 * count for count in workers}
    for count in workers:
        make = functools.partial(_stream, source, count, train)
        ways["cnnjax", count] = functools.partial(_rate, make, skipped[count])
    if importlib.util.find_spec("torch"):
        for count in workers:
            make = functools.partial(_loader, crops, count)
            ways["PyTorch", count] = functools.partial(_rate, make, skipped[count])
    return ways


def _rate(make: Callable[[], Iterator], skipped: int) -> float:
    """Measures a stream's images per second.

    The first `skipped` batches do not count: they are made while processes start.
    """
    batches = iter(make())
    for _ in range(skipped):
        next(batches)
    count = 0
    began = time.perf_counter()
    while (seconds := time.perf_counter() - began) < _SECONDS:
        next(batches)
        count += _BATCH
    if hasattr(batches, "close"):
        batches.close()
    return count / seconds


# ------------------------------------------------------------------ the measurement


def measure(
    photographs_folder: str, rounds: int, workers: tuple[int, ...] = (0, 1, 2, 4)
) -> Iterator[dict]:
    """Measures every way to read images, in training and evaluation, in turns.

    ResNet-50's training step on this device is measured beside them. Yields the results so far
    after each round.
    """
    paths = photographs.list_photographs(photographs_folder)
    step_batch, take_step = _training_step()
    steps: list[float] = []
    rates: dict[tuple[str, str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = write_folder(paths, pathlib.Path(folder))
        size = sum(path.stat().st_size for path, _ in source.files) / len(source)
        ways = {}
        for mode in ("training", "evaluation"):
            for (name, count), measured in _ways(source, workers, mode == "training").items():
                ways[mode, name, count] = measured
        for _ in range(rounds):
            steps.append(_step_rate(step_batch, take_step))
            for way, measured in ways.items():
                rates.setdefault(way, []).append(measured())
            yield {
                "photographs": min(len(paths), _COUNT),
                "kilobytes": round(size / 1000),
                "step_batch": step_batch,
                "step_images_per_s": statistics.median(steps),
                "rounds": len(steps),
                "rows": [_row(way, rates, steps) for way in rates],
            }


def _training_step() -> tuple[int, Callable]:
    """Prepares ResNet-50's training step and returns it with its number of images."""
    from cnnjax.benchmark import jax_side

    device = jax.default_backend()
    batch = _STEP_BATCH.get(device, 256)
    dtype = "float32" if device == "cpu" else "bfloat16"
    passes, _ = jax_side.network("resnet50", batch, dtype)
    passes["step"](2)
    return batch, passes["step"]


def _step_rate(batch: int, take_step: Callable) -> float:
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        take_step(1)
        count += batch
    return count / (time.perf_counter() - began)


def _row(way: tuple[str, str, int], rates: dict, steps: list[float]) -> dict:
    """Makes the row of one way; ratios are medians of ratios within a round."""
    mode, name, workers = way
    own = rates[way]
    loop = rates[mode, "Pillow in a loop", 0]
    return {
        "mode": mode,
        "way": name,
        "workers": workers,
        "images_per_s": statistics.median(own),
        "min": min(own),
        "max": max(own),
        "over_loop": statistics.median(a / b for a, b in zip(own, loop)),
        "over_step": statistics.median(a / b for a, b in zip(own, steps)),
    }
