"""Files from strangers.

Whatever a file contains, a reader returns what it promises or raises a one-line `ValueError`, in
bounded memory and time, and runs nothing. CNNJAX_FUZZ sets the number of mutated files per reader,
and CNNJAX_FUZZ_SEED the seed of the mutations.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import struct
import sys
import tarfile
import time
import warnings
import zlib

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from test_data import BINARY, SMALL, archive, as_published, binary, idx, python

from cnnjax import weights
from cnnjax.data import photographs, published, sources, stream
from cnnjax.data.cifar_pickle import read_cifar_pickle
from cnnjax.data.folders import Folder
from cnnjax.models import create_model
from cnnjax.runtime import workdir
from cnnjax.train import checkpoints
from cnnjax.weights import preprocessing

CASES = int(os.environ.get("CNNJAX_FUZZ", 100))
SEED = int(os.environ.get("CNNJAX_FUZZ_SEED", 0))
# Limit of the processor time for one file.
_SECONDS = 20.0
# Pillow's MAX_IMAGE_PIXELS is about 90 million, each of 4 bytes in Pillow and 3 in the array.
_MOST_PIXELS_MB = 800

# ------------------------------------------------------------------ watching what a reader does

_FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.startfile",
    "ctypes.",
    "socket.",
    "shutil.",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.link",
    "os.symlink",
)
_armed = []
_seen = []


def _audit(event: str, arguments: tuple) -> None:
    if not _armed:
        return
    mode = arguments[1] if event == "open" else None
    is_writing = isinstance(mode, str) and set(mode) & set("wax+")
    if is_writing or event.startswith(_FORBIDDEN):
        _seen.append((event, arguments))


sys.addaudithook(_audit)


def _memory(field: str) -> float:
    """Returns this process's memory in MB: current for "VmRSS", peak for "VmHWM"."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(field))
    return int(kilobytes) / 1024


class Watch:
    """Reads files and counts refusals.

    Fails if a reader writes, runs something, or raises anything but a one-line `ValueError`.
    """

    def __init__(self, most_mb: float):
        self.refused = self.read = 0
        self.most_mb = most_mb
        self.before = _memory("VmRSS")
        # Writing 5 resets the peak "VmHWM"; see proc(5).
        pathlib.Path("/proc/self/clear_refs").write_text("5")

    def __call__(self, reader, *arguments):
        began = time.process_time()
        result = None
        _armed.append(True)
        try:
            result = reader(*arguments)
            self.read += 1
        except ValueError as error:
            assert "\n" not in str(error) and str(error), repr(error)
            self.refused += 1
        finally:
            _armed.clear()
        seen = _seen.copy()
        _seen.clear()
        assert not seen, seen
        assert time.process_time() - began < _SECONDS
        return result

    def end(self):
        assert _memory("VmHWM") - self.before < self.most_mb


# ------------------------------------------------------------------ mutants

_EXTREME = [
    0,
    1,
    127,
    128,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def mutants(seeds: list[bytes], cases: int):
    """Yields files with a few changes, mostly near an end, where headers are.

    Some files are cut off, joined with another, or replaced by random bytes.
    """
    generator = np.random.default_rng([SEED, zlib.crc32(seeds[0])])
    below = lambda n: int(generator.integers(max(n, 1)))
    for _ in range(cases):
        data = bytearray(seeds[below(len(seeds))])
        if not below(50):
            data = bytearray(generator.bytes(below(300)))
        for _ in range(1 + below(4)):
            size = len(data)
            near = min(size, int(generator.choice([16, 64, 256, size + 1])))
            from_the_end = not below(4)
            at = below(near)
            if from_the_end:
                at = max(size - 1 - at, 0)
            kind = below(9)
            if kind <= 2:
                data[at : at + 1] = bytes([below(256)])
            elif kind == 3:
                data[at : at + 1] = bytes([(data[at] if size else 0) ^ 1 << below(8)])
            elif kind == 4:
                width = int(generator.choice([1, 2, 4, 8]))
                value = _EXTREME[below(len(_EXTREME))] % 2 ** (8 * width)
                data[at : at + width] = value.to_bytes(width, ("little", "big")[below(2)])
            elif kind == 5:
                del data[at : at + 1 + below(16)]
            elif kind == 6:
                data[at:at] = data[at : at + 1 + below(64)] * (1 + below(3))
            elif kind == 7:
                other = seeds[below(len(seeds))]
                data[at:] = other[min(at, below(len(other))) :]
            else:
                if not below(2):
                    at = below(size)
                del data[at:]
        yield bytes(data)


# ------------------------------------------------------------------ readers
# Each function returns seed files, a function that writes a file and returns its reader, and the
# allowed memory in MB.


def idx_files(folder):
    values = np.arange(5 * 4 * 3).reshape(5, 4, 3).astype(np.uint8)

    def check(content):
        assert published.read_idx(content, "x", (5, 4, 3)).shape == (5, 4, 3)

    return [idx(values)], lambda mutant: lambda: check(mutant), 50


def gzipped(folder):
    content = gzip.compress(idx(np.zeros((5, 4, 3), np.uint8)))
    file = published.File("x.gz", (), hashlib.md5(content).hexdigest())
    path = folder / "x.gz"

    def place(mutant):
        path.write_bytes(mutant)
        return lambda: published.read_idx(published.read(path, file, 76), "x", (5, 4, 3))

    return [content], place, 50


def archives(folder):
    path = folder / BINARY.archive.name
    batches = {f"data_batch_{number}.bin": binary(0, 3) for number in range(1, 6)}
    archive(path, BINARY.folder, batches | {"test_batch.bin": binary(15, 20)})
    content = path.read_bytes()
    source = as_published(SMALL, path)

    def place(mutant):
        path.write_bytes(mutant)
        return lambda: source.read(folder)

    return [content, gzip.decompress(content)], place, 50


def cifar_binary(folder):
    def check(content):
        found = published.read_cifar_binary(content, "x", 3)
        assert found.images.shape == (3, 32, 32, 3) and found.labels.shape == (3,)

    return [binary(0, 3)], lambda mutant: lambda: check(mutant), 50


def cifar_pickle(folder):
    def check(content):
        found = read_cifar_pickle(content, "x", 3)
        assert found.images.shape == (3, 32, 32, 3) and found.images.dtype == np.uint8
        assert found.labels.shape == (3,)

    content = {
        b"batch_label": b"batch 1",
        b"labels": [1, 2, 3],
        b"data": np.zeros((3, 3072), np.uint8),
        b"filenames": [b"a.png", b"b.png"],
    }
    seeds = [python(0, 3), *(pickle.dumps(content, protocol) for protocol in (2, 3, 4))]
    return seeds, lambda mutant: lambda: check(mutant), 50


def encoded(image: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures(data_dir: pathlib.Path | None) -> list[bytes]:
    """Returns a photograph in every accepted file format and in some others."""
    image = PIL.Image.open(photographs.list_photographs()[0]).resize((40, 30)).convert("RGB")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a photograph"
    files = [
        encoded(image, "JPEG", exif=exif),
        encoded(image, "JPEG", progressive=True),
        encoded(image.convert("L"), "JPEG"),
        encoded(image.convert("CMYK"), "JPEG"),
        encoded(image, "PNG"),
        encoded(image.quantize(16), "PNG", transparency=bytes(8)),
        encoded(image.convert("RGBA"), "PNG"),
        encoded(image.convert("I;16"), "PNG"),
        encoded(image, "WEBP"),
        encoded(image, "BMP"),
        encoded(image, "WEBP", lossless=True),
        encoded(image.convert("1"), "BMP"),
        encoded(image.convert("L"), "EPS"),
        encoded(image, "GIF"),
        encoded(image, "TIFF"),
        encoded(image, "PPM"),
    ]
    if data_dir:
        files.append(next((data_dir / "bsds500").rglob("*.jpg")).read_bytes())
    return files


def camvid_masks(folder):
    mask = np.arange(24 * 32).reshape(24, 32).astype(np.uint8) % 12
    source = sources.CamVid("pixelwise", size=(24, 32))
    path = folder / "mask.png"

    def place(content):
        path.write_bytes(content)
        return check

    def check():
        found = source._mask(path)
        assert found.shape == (24, 32) and found.dtype == np.uint8

    image = PIL.Image.fromarray(mask)
    seeds = [encoded(image, "PNG"), encoded(image, "PNG", optimize=True)]
    return seeds, place, _MOST_PIXELS_MB


def images(folder):
    path = folder / "x.jpg"

    def place(content):
        path.write_bytes(content)
        return check

    def check():
        size = photographs.image_size(path)
        found = photographs.read_image(path)
        assert found.shape == (*size, 3) and found.dtype == np.uint8

    return pictures(_data()), place, _MOST_PIXELS_MB


def folders(folder):
    (folder / "train" / "cat").mkdir(parents=True)
    path = folder / "train" / "cat" / "x.png"
    path.touch()
    source = Folder(folder / "train")

    def place(content):
        path.write_bytes(content)
        return check

    def check():
        image, label = source[0]
        assert image.mode == "RGB" and label == 0

    return pictures(None), place, _MOST_PIXELS_MB


def weight_files(folder):
    model = create_model("lenet5", num_classes=2)
    variables = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32), weights.variable_shapes(model)
    )
    path = folder / "w.safetensors"
    weights.save_torchvision(variables, path)
    small = {
        "conv1.weight": np.zeros((2, 1, 2, 2), np.float32),
        "fc.bias": np.zeros(2, np.float16),
        "n": np.zeros((), np.int64),
    }

    def place(content):
        path.write_bytes(content)
        return check

    def check():
        assert all(isinstance(value, np.ndarray) for value in weights.read(path).values())

    golden = pathlib.Path(__file__).parent / "golden"
    pth = [(golden / name).read_bytes() for name in ("kinds.pth", "kinds_legacy.pth")]
    seeds = [path.read_bytes(), safetensors.numpy.save(small, {"format": "pt"}), b"", *pth]
    return seeds, place, 50


def _data() -> pathlib.Path | None:
    folder = os.environ.get("CNNJAX_DATA")
    return folder and pathlib.Path(folder)


def is_json_of(content: bytes, original: bytes) -> bool:
    """Tells whether a file is JSON of the same value as another one."""
    try:
        return json.loads(content) == json.loads(original)
    except ValueError:
        return False


def checkpoint_files(folder):
    """Replaces one file of a checkpoint, which must then be reported as damaged."""
    with checkpoints.Checkpoints(folder / "checkpoints") as saved:
        saved.save(1, {"w": np.arange(6.0)}, {"history": [{"loss": 0.5}]})
    paths = sorted((folder / "checkpoints" / "1").rglob("*"))
    whole = {path: path.read_bytes() for path in paths if path.is_file()}
    generator = np.random.default_rng(SEED)
    changed = []

    def place(mutant):
        for path in changed:
            path.write_bytes(whole[path])
        path = list(whole)[int(generator.integers(len(whole)))]
        changed[:] = [path]
        path.write_bytes(mutant)
        # Not in `check`, where an error of JSON would count as a refusal.
        is_same = mutant == whole[path] or (
            path.name == "manifest.json" and is_json_of(mutant, whole[path])
        )

        def check():
            damage = checkpoints._damage(folder / "checkpoints" / "1")
            if damage is not None:
                raise ValueError(damage)
            assert is_same

        return check

    return [content for content in whole.values() if content], place, 50


READERS = (
    idx_files,
    gzipped,
    archives,
    cifar_binary,
    cifar_pickle,
    camvid_masks,
    images,
    folders,
    weight_files,
    checkpoint_files,
)


@pytest.mark.slow
@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_mutants_are_read_or_refused(make, tmp_path):
    seeds, place, most_mb = make(tmp_path)
    with warnings.catch_warnings():
        # Pillow warns about odd metadata.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        watch = Watch(most_mb)
        for number, mutant in enumerate(mutants(seeds, CASES)):
            try:
                watch(place(mutant))
            except BaseException:
                mutant_path = tmp_path / f"mutant-{number}"
                mutant_path.write_bytes(mutant)
                print(f"the file is {mutant_path}")
                raise
        watch.end()
    assert watch.refused > CASES / 20
    # Checksums refuse nearly every change of these.
    assert watch.read > 0 or make in (gzipped, archives, checkpoint_files)
    print(f"{make.__name__}: {watch.read} read, {watch.refused} refused")


# ------------------------------------------------------------------ attacks


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


_NESTED = b"K\x01q\x00" + b"(h\x00h\x00h\x00%bq\x00" * 40


@pytest.mark.parametrize(
    "content",
    [
        # A memo index of 2^31.
        pickled(b"K\x01r" + struct.pack("<I", 2**31 - 1)),
        # Nested lists that stand for 3^40 numbers.
        pickled(b"}(C\x04data" + _NESTED % ((b"l",) * 40) + b"C\x06labels]K\x01au"),
        # Nested tuples as a key, which take 3^40 hashes.
        pickled(b"}" + _NESTED % ((b"t",) * 40) + b"K\x01s"),
        # An array of objects at an address that the file chooses.
        pickled(b"}(C\x04datacnumpy\nndarray\n(K\x01\x85C\x01OC\x08AAAAAAAAtRC\x06labels]K\x01au"),
        # Lengths far beyond the end of the file.
        pickled(b"\x8e" + struct.pack("<Q", 2**40)),
        pickled(b"\x96" + struct.pack("<Q", 2**34)),
        pickled(b"c_codecs\nencode\n}X\x08\x00\x00\x00__code__K\x01sb"),
        b"I" + b"9" * 10**6 + b"\n.",
        b"(" * 10**5,
        b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5,
    ],
    ids=[
        "memo",
        "lists",
        "tuples",
        "pointer",
        "bytes",
        "bytearray",
        "build",
        "digits",
        "marks",
        "depth",
    ],
)
def test_pickles_that_attack(content):
    watch = Watch(100)
    watch(lambda: read_cifar_pickle(content, "x", 1))
    watch.end()
    assert watch.refused == 1


@pytest.mark.slow
def test_bombs_are_not_opened(tmp_path):
    """Compression bombs, paths outside the folder, and an oversized batch are refused."""
    bomb = gzip.compress(bytes(2**20), 9) * 1000
    source = dataclasses.replace(sources.DATASETS["mnist"], folders=("mnist",))
    (tmp_path / "mnist").mkdir()
    for file in source.files:
        (tmp_path / "mnist" / file.name).write_bytes(bomb)
    climbing = tmp_path / BINARY.archive.name
    with tarfile.open(climbing, "w:gz") as file:
        for name in ("../out", "/out", f"{BINARY.folder}/../../out"):
            file.addfile(tarfile.TarInfo(name))
    watch = Watch(60)
    watch(lambda: source.read(tmp_path))
    watch(lambda: SMALL.read(tmp_path))
    climbing.write_bytes(bomb)
    watch(lambda: SMALL.read(tmp_path))
    long = tmp_path / BINARY.folder / "data_batch_1.bin"
    long.parent.mkdir()
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ):
        (long.parent / f"{name}.bin").touch()
    # A sparse file of a terabyte takes no room on the disk.
    os.truncate(long, 2**40)
    watch(lambda: SMALL.read(tmp_path))
    watch.end()
    assert watch.refused == 4


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width: int, height: int, *more: bytes) -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        + b"".join(more)
    )


_TEXT = chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(2**27), 9))


@pytest.mark.parametrize(
    "content",
    [
        png(12_000, 12_000, chunk(b"IDAT", zlib.compress(bytes(12_000 * 1_501)))),
        png(2**31 - 1, 2**31 - 1),
        png(8, 8, *[_TEXT] * 100),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(touch ran) system\n"
        b"%%EOF\n",
    ],
    ids=["large", "overflow", "text", "postscript"],
)
def test_images_that_attack(content, tmp_path):
    path = tmp_path / "cat" / "x.jpg"
    path.parent.mkdir()
    path.write_bytes(content)
    watch = Watch(200)
    for reader in (photographs.read_image, sources.CamVid("pixelwise")._mask):
        watch(lambda: reader(path))  # noqa: B023 - called at once
    watch(lambda: Folder(tmp_path)[0])
    watch.end()
    assert watch.refused == 3


@pytest.mark.slow
@pytest.mark.parametrize("width, height", [(20_000, 1), (1, 20_000)])
def test_a_strip_is_cropped_in_bounded_memory(width, height, tmp_path):
    """Resizing all of this image, a file of 138 bytes, would take gigabytes."""
    row_bytes = 1 + -(-width // 8)
    content = chunk(b"IDAT", zlib.compress(bytes(row_bytes * height)))
    path = tmp_path / "cat" / "x.png"
    path.parent.mkdir()
    path.write_bytes(png(width, height, content, chunk(b"IEND", b"")))
    source = Folder(tmp_path)
    watch = Watch(100)
    crops = [{"size": 224, "resize": resize} for resize in (256, 0)]
    trained = [stream.TrainingBatches(source, 1, range(3), seed=0, **crop) for crop in crops]
    evaluated = [stream.EvaluationBatches(source, 1, **crop) for crop in crops]
    for batches in trained + evaluated:
        for images, _ in watch(list, stream.iterate(batches)):
            assert images.shape == (1, 224, 224, 3) and not images.any()
    pixels = watch(preprocessing.resize_and_crop, source[0][0], weights.records.find("resnet18"))
    assert pixels.shape == (224, 224, 3) and not pixels.any()
    watch.end()
    assert watch.read == 5


def test_weights_that_attack(tmp_path):
    path = tmp_path / "w.safetensors"
    model = create_model("lenet5")
    watch = Watch(100)
    weights.variable_shapes(model)

    def tensor(name="conv1.weight", dtype="F32", shape=(1,), size=4):
        header = json.dumps(
            {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
        ).encode()
        return struct.pack("<Q", len(header)) + header + bytes(size)

    attacks = [struct.pack("<Q", size) + b"{}" for size in (2**63, 2**64 - 1, 2**40)]
    attacks += [
        tensor("a\n\x1b[31mb"),
        tensor(dtype="C64", size=8),
        tensor(dtype="F8_E4M3", size=1),
        tensor(dtype="X\nY"),
        tensor(shape=[2**63, 2]),
        tensor(shape=[2**62, 0], size=0),
        tensor(shape=[1] * 100),
        tensor(shape=[2**40, 0], size=0),
        tensor("../../etc/passwd"),
        b"\x80\x04K\x01.",
    ]
    for content in attacks:
        path.write_bytes(content)
        watch(lambda: weights.load_torchvision(path, model))
    watch.end()
    assert watch.refused == len(attacks)


def test_a_changed_config_is_refused(tmp_path):
    """A work directory is refused and unchanged if its config.json differs."""
    config = {"kind": "train", "seed": 0, "model_fields": {"padding": "zeros"}, "freeze": []}
    folder = tmp_path / "run"
    path = folder / "config.json"
    folder.mkdir()
    (folder / "results.json").write_text("{}")
    for mutant in mutants([json.dumps(config, indent=1).encode()], CASES):
        path.write_bytes(mutant)
        try:
            workdir.prepare(folder, config)
            assert json.loads(mutant) == config
        except ValueError as error:
            assert "\n" not in str(error) and path.read_bytes() == mutant
