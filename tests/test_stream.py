"""Streamed images: sources, splits, order, crops, and worker processes."""

import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import warnings
import weakref
import zlib

import forked
import make_tfds
import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax.benchmark import decoding, jax_side
from cnnjax.data import crops, folders, photographs, splits, stream
from cnnjax.train.data import Streamed
from cnnjax.train.parallel import Parallel
from configs import lenet_digits

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = quick.environment()


def ramp(width: int, height: int, number: int = 0, x: int = 1, y: int = 1) -> np.ndarray:
    """Returns an image whose pixels encode their place: [x * column, y * row, number]."""
    columns, rows = np.meshgrid(x * np.arange(width), y * np.arange(height))
    return np.stack([columns, rows, np.full_like(rows, number)], -1).astype(np.uint8)


def write(root: pathlib.Path, **classes: list[np.ndarray]) -> pathlib.Path:
    for name, images in classes.items():
        (root / name).mkdir(parents=True)
        for number, image in enumerate(images):
            PIL.Image.fromarray(image).save(root / name / f"{number:03}.png")
    return root


def read(
    source, *, steps=None, size=16, resize=20, batch=4, seed=0, workers=0, **options
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the batches of training steps; without steps, those of an evaluation."""
    if steps is None:
        # An evaluation has neither an order to draw nor images to leave out.
        assert not seed and not options
        batches = stream.EvaluationBatches(source, batch, size, resize)
    else:
        batches = stream.TrainingBatches(
            source, batch, steps=steps, seed=seed, size=size, resize=resize, **options
        )
    return list(stream.iterate(batches, workers))


def numbers(found) -> list[list[int]]:
    """Returns the numbers of the images in each batch."""
    return [images[:, 0, 0, 2].tolist() for images, _ in found]


def joined(parts) -> list[tuple[np.ndarray, ...]]:
    """Joins batches of which each process has a part."""
    return [tuple(map(np.concatenate, zip(*batches))) for batches in zip(*parts)]


def assert_same(found, want):
    assert len(found) == len(want)
    for pair, expected in zip(found, want):
        for array, other in zip(pair, expected):
            assert type(array) is np.ndarray and array.dtype == other.dtype
            np.testing.assert_array_equal(array, other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a source of 14 numbered ramps in three classes, 24x20 and 20x24 pixels."""
    images = []
    for number in range(14):
        width, height = (24, 20) if number % 2 else (20, 24)
        images.append(ramp(width, height, number, x=10, y=10))
    root = tmp_path_factory.mktemp("images")
    return folders.Folder(write(root, ant=images[:3], bee=images[3:8], cat=images[8:]))


LABELS = np.repeat(np.int32([0, 1, 2]), [3, 5, 6])


# ------------------------------------------------------------------ sources


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    colors = {"b/10.png": 10, "b/2.PNG": 20, "b/note.txt": 0, "a/x.jpeg": 30, "a/w.jpg": 40}
    for name, color in colors.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        kind = "JPEG" if path.suffix in (".jpg", ".jpeg") else "PNG"
        PIL.Image.new("L", (8, 9), color).save(path, format=kind)
    source = folders.Folder(tmp_path)
    assert source.classes == ("a", "b") and len(source) == 4
    assert [source[index][1] for index in range(4)] == [0, 0, 1, 1]
    assert source.labels().tolist() == [0, 0, 1, 1]
    for index, color in enumerate((40, 30, 10, 20)):
        image, _ = source[index]
        assert image.mode == "RGB" and image.size == (8, 9)
        np.testing.assert_allclose(np.asarray(image), color, atol=1)


def test_a_folders_digest_is_that_of_its_names(tmp_path):
    """The folder may be elsewhere, and each held-out part has the digest of the whole."""
    images = tmp_path / "one" / "ant"
    images.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (images / name).touch()
    source = folders.Folder(tmp_path / "one")
    digest = source.digest()
    assert [part.digest() for part in folders.hold_out(source, 1)] == [digest] * 2
    moved = (tmp_path / "one").rename(tmp_path / "two")
    assert folders.Folder(moved).digest() == digest
    (moved / "ant" / "a.png").rename(moved / "ant" / "c.png")
    assert folders.Folder(moved).digest() != digest


def test_test_images_have_a_digest_of_their_own(tmp_path):
    """A run resumes if they have changed; a sweep does not average its test error with others."""
    for split in ("train", "val"):
        write(tmp_path / split, ant=[ramp(8, 8)] * 2)
    config = lenet_digits.get_config()
    config.update({"dataset": "folder", "data_dir": str(tmp_path)})
    before = Streamed(config, Parallel("jit"))
    (tmp_path / "val" / "ant" / "000.png").unlink()
    after = Streamed(config, Parallel("jit"))
    assert after.digest == before.digest and after.test_digest != before.test_digest


def test_every_kind_of_file_is_read_by_every_reader(tmp_path):
    """Covers suffixes in either case, spaces and accents in names, and links."""
    kinds = {
        "JPEG": ("jpg", "JPEG"),
        "PNG": ("png",),
        "WEBP": ("webp", "WEBP"),
        "BMP": ("bmp", "BMP"),
    }
    (tmp_path / "images" / "Grüne Äpfel").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    count = 0
    for kind, suffixes in kinds.items():
        for suffix in suffixes:
            path = tmp_path / "images" / "Grüne Äpfel" / f"{count} é.{suffix}"
            PIL.Image.new("RGB", (8, 9), (0, 200, 0)).save(path, format=kind)
            count += 1
    PIL.Image.new("RGB", (8, 9), (0, 200, 0)).save(tmp_path / "elsewhere" / "one.png")
    (path.parent / "link.png").symlink_to(tmp_path / "elsewhere" / "one.png")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    source = folders.Folder(tmp_path / "images")
    assert source.classes == ("Grüne Äpfel", "linked") and source.passed_over == ""
    assert source.labels().tolist() == [0] * (count + 1) + [1]
    # A folder of photographs has subfolders, but links to folders are not followed.
    paths = photographs.list_photographs(tmp_path / "images")
    assert len(paths) == count + 1
    for image in [
        *(source[index][0] for index in range(count + 2)),
        *map(photographs.read_image, paths),
    ]:
        np.testing.assert_allclose(np.asarray(image), np.full((9, 8, 3), (0, 200, 0)), atol=3)


def test_what_a_folder_passes_over_is_counted(tmp_path):
    write(tmp_path, cat=[ramp(8, 8)], dog=[ramp(8, 8)] * 2)
    assert folders.Folder(tmp_path).passed_over == ""
    for name in (
        "cat/a.gif",
        "cat/b.GIF",
        "dog/a.gif",
        "dog/b.txt",
        "cat/LICENSE",
        "cat/._000.png",
    ):
        (tmp_path / name).touch()
    (tmp_path / "top.png").touch()
    # Hidden folders are neither classes nor passed over.
    for folder in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", ".git", "cat/more", "dog/more"):
        (tmp_path / folder).mkdir()
    shutil.copy(tmp_path / "cat" / "000.png", tmp_path / ".ipynb_checkpoints")
    source = folders.Folder(tmp_path)
    assert source.classes == ("cat", "dog") and source.labels().tolist() == [0, 1, 1]
    assert source.passed_over == (
        "7 files passed over: 3 .gif, 1 outside a class folder, 1 hidden, "
        "1 without a suffix, 1 .txt; 2 folders passed over: cat/more, dog/more"
    )
    assert len(photographs.list_photographs(tmp_path)) == 4


def test_what_a_folder_of_photographs_passes_over_is_told(tmp_path, caplog):
    photographs_folder = tmp_path / "photographs"
    elsewhere = tmp_path / "elsewhere"
    (photographs_folder / "more").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("a.jpg", "b.HEIC", "more/c.png", "more/d.heic", "more/e.tif", ".DS_Store"):
        (photographs_folder / name).touch()
    (elsewhere / "f.jpg").touch()
    (photographs_folder / "more" / "linked").symlink_to(elsewhere)
    with caplog.at_level("INFO", "cnnjax"):
        paths = photographs.list_photographs(photographs_folder)
        photographs.list_photographs(elsewhere)
        # Several studies of one command list the same folder, and one line tells of it.
        assert photographs.list_photographs(photographs_folder) == paths
    assert paths == [photographs_folder / "a.jpg", photographs_folder / "more" / "c.png"]
    passed_over = (
        "4 files passed over: 2 .heic, 1 hidden, 1 .tif; 1 folder passed over: more/linked; "
        "links to folders are not followed"
    )
    assert told(caplog) == [f"{photographs_folder}: {passed_over}"]
    # The position study lists photographs for every seed but reports skipped files once.
    assert photographs.find_photographs(photographs_folder) == (paths, passed_over)


def test_a_folder_without_photographs_says_what_it_has(tmp_path):
    for name in ("a.heic", "b.heic"):
        (tmp_path / name).touch()
    message = r"holds no image file; expected .*\(2 files passed over: 2 .heic\)$"
    with pytest.raises(ValueError, match=message):
        photographs.list_photographs(tmp_path)


def test_a_folders_mistakes_are_named(tmp_path):
    expected = "expected {0}/CLASS/IMAGE with .jpg, .jpeg, .png, .webp, .bmp"
    (tmp_path / "hidden" / ".git").mkdir(parents=True)
    write(tmp_path, flat=[ramp(8, 8)] * 2)
    for name, message in (
        ("none", "is not a folder"),
        ("hidden", "has no images"),
        ("flat", r"has no class folders, and images outside one \(2\)"),
    ):
        root = tmp_path / name
        with pytest.raises(ValueError, match=f"^{root} {message}; {expected.format(root)}$"):
            folders.Folder(root)
    write(tmp_path / "part", cat=[ramp(8, 8)], dog=[])
    dog = (
        f"the class folder {tmp_path}/part/dog has no images; {expected.format(tmp_path / 'part')}"
    )
    with pytest.raises(ValueError, match=rf"^{dog} \(it is empty\)$"):
        folders.Folder(tmp_path / "part")
    for name in ("a.gif", "b.gif", "c.mp4"):
        (tmp_path / "part" / "dog" / name).touch()
    with pytest.raises(ValueError, match=rf"^{dog} \(3 files passed over: 2 .gif, 1 .mp4\)$"):
        folders.Folder(tmp_path / "part")


def test_a_class_whose_name_no_report_could_hold_is_refused(tmp_path):
    write(tmp_path, cat=[ramp(8, 8)])
    (tmp_path / "cat").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(ValueError, match=r"/caf\\udce9' has a name that is not UTF-8; rename it$"):
        folders.Folder(tmp_path)
    # Unlike the name of a class, that of a file need not be UTF-8.
    write(tmp_path / "other", cat=[ramp(8, 8)])
    (tmp_path / "other" / "cat" / "000.png").rename(
        tmp_path / "other" / "cat" / os.fsdecode(b"\xe9.png")
    )
    assert folders.Folder(tmp_path / "other")[0][0].size == (8, 8)


def test_class_names_in_two_unicode_forms_are_one_name(tmp_path):
    """An archive made on macOS writes "ä" as "a" and a combining mark; elsewhere it is one."""
    composed, decomposed = "Äpfel", "A\u0308pfel"
    image = [ramp(8, 8)]
    write(tmp_path / "data" / "train", **{decomposed: image, "Birnen": image})
    write(tmp_path / "data" / "val", **{composed: image, "Birnen": image})
    sources = folders.open_splits("folder", str(tmp_path / "data"))
    # In the order of the training folders: a run that was begun on them can go on.
    assert sources["train"].classes == sources["test"].classes == (composed, "Birnen")
    for source in sources.values():
        first, last = (path.parent.name for path, _ in source.files)
        assert first.endswith("pfel") and last == "Birnen"
    write(tmp_path / "data" / "train", **{composed: image})
    with pytest.raises(
        ValueError, match=r"'A\\u0308pfel' and '\\xc4pfel' .* are the same name, 'Ä"
    ):
        folders.Folder(tmp_path / "data" / "train")


def test_pixels_of_every_kind_become_rgb(tmp_path):
    """As in torchvision, transparency and an orientation in metadata are ignored."""
    color = (200, 100, 0)
    image = PIL.Image.new("RGB", (12, 8), color)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "turned.jpg", exif=exif, quality=95)
    image.convert("CMYK").save(tmp_path / "a" / "cmyk.jpg", quality=95)
    image.quantize(4).save(tmp_path / "a" / "palette.png")
    image.quantize(4).save(tmp_path / "a" / "transparent.png", transparency=bytes(4))
    PIL.Image.new("RGBA", (12, 8), (*color, 0)).save(tmp_path / "a" / "alpha.png")
    PIL.Image.new("RGBA", (12, 8), (*color, 0)).save(
        tmp_path / "a" / "alpha.webp", exact=True, lossless=True
    )
    source = folders.Folder(tmp_path)
    assert len(source) == 6
    for index in range(6):
        pixels = np.asarray(source[index][0])
        assert pixels.shape == (8, 12, 3)
        np.testing.assert_allclose(pixels, np.full((8, 12, 3), color), atol=4)
        np.testing.assert_array_equal(photographs.read_image(source.files[index][0]), pixels)


# ------------------------------------------------------------------ splits


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "cnnjax"]


@pytest.mark.parametrize(
    "names, uses",
    [
        (["train", "val"], {"train": "train", "test": "val"}),
        (["train", "validation"], {"train": "train", "test": "validation"}),
        (["train", "valid"], {"train": "train", "test": "valid"}),
        (["train", "test"], {"train": "train", "test": "test"}),
        (["train", "val", "test"], {"train": "train", "validation": "val", "test": "test"}),
        (["train", "valid", "test"], {"train": "train", "validation": "valid", "test": "test"}),
    ],
)
def test_the_splits_of_a_folder(tmp_path, caplog, names, uses):
    counts = {"train": 2, "test": 4}
    for name in names:
        write(tmp_path / name, a=[ramp(8, 8)] * counts.get(name, 3), b=[ramp(8, 8)])
    assert folders.find_splits("folder", str(tmp_path)) == uses
    with caplog.at_level("INFO", "cnnjax"):
        sources = folders.open_splits("folder", str(tmp_path))
    assert sources.keys() == uses.keys()
    lines = []
    for use, name in uses.items():
        assert len(sources[use]) == counts.get(name, 3) + 1
        lines.append(f"{use}: {len(sources[use])} images, 2 classes in {tmp_path}/{name}")
    if uses["test"] != "test":
        lines.append(f"{uses['test']} is the test set, as there is no labeled split named test")
    assert told(caplog) == lines


def test_a_test_folder_without_classes_is_not_the_test_set(tmp_path, caplog):
    """Competitions withhold the labels of their test sets."""
    for name in ("train", "val"):
        write(tmp_path / name, a=[ramp(8, 8)], b=[ramp(8, 8)])
    shutil.copytree(tmp_path / "train" / "a", tmp_path / "test")
    assert folders.find_splits("folder", str(tmp_path)) == {"train": "train", "test": "val"}
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(
        ValueError,
        match=f"^data_dir='{tmp_path}' has no folder test or val or .*; its test has no labels$",
    ):
        folders.open_splits("folder", str(tmp_path))


def test_splits_that_do_not_fit_are_refused(tmp_path):
    where = re.escape(f"data_dir='{tmp_path}'")
    with pytest.raises(ValueError, match=f"^{where} has no folder train of images by class$"):
        folders.open_splits("folder", str(tmp_path))
    write(tmp_path / "train", a=[ramp(8, 8)] * 3, b=[ramp(8, 8)])
    with pytest.raises(ValueError, match=rf"by class; did you mean {tmp_path}\?$"):
        folders.open_splits("folder", str(tmp_path / "train"))
    with pytest.raises(
        ValueError,
        match=f"^{where} has no folder test or val or validation or valid of images by class$",
    ):
        folders.open_splits("folder", str(tmp_path))
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=f"^{tmp_path}/val has no images; expected"):
        folders.open_splits("folder", str(tmp_path))
    write(tmp_path / "val", a=[ramp(8, 8)])
    with pytest.raises(
        ValueError,
        match=rf"^{where}: the test split has other classes than the training split "
        r"\(missing classes: b; additional: none\); expected the same$",
    ):
        folders.open_splits("folder", str(tmp_path))
    write(tmp_path / "val", b=[ramp(8, 8)])
    shutil.copytree(tmp_path / "val", tmp_path / "test")
    with pytest.raises(
        ValueError,
        match=f"^n_validation=1 is not 0 or 2, the validation images that {where} has of its own$",
    ):
        folders.open_splits("folder", str(tmp_path), 1)
    assert len(folders.open_splits("folder", str(tmp_path), 2)["validation"]) == 2
    shutil.copytree(tmp_path / "val", tmp_path / "valid")
    with pytest.raises(ValueError, match=f"^{where} has val and valid; expected one of them$"):
        folders.open_splits("folder", str(tmp_path))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_damaged_images_are_named(tmp_path, suffix):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(np.uint8)
    PIL.Image.fromarray(noise).save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
    whole = buffer.getvalue()
    path = tmp_path / "a" / f"x.{suffix}"
    path.parent.mkdir()
    path.write_bytes(whole)
    source = folders.Folder(tmp_path)
    generator = np.random.default_rng(1)
    refused = 0
    for cut in (0, 1, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"^{path} is not a readable image: .*"):
            source[0]
    for _ in range(300):
        mutated = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            mutated[place] = generator.integers(256)
        path.write_bytes(mutated)
        try:
            source[0]
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50


def test_pixels_that_eight_bits_cannot_hold_are_refused(tmp_path):
    write(tmp_path, a=[np.full((8, 8), 1000, np.uint16)])
    reason = r"pixels of more than 8 bits \(Pillow's mode I;16\); expected 8"
    readers = (
        lambda: folders.Folder(tmp_path)[0],
        lambda: photographs.read_image(tmp_path / "a" / "000.png"),
    )
    for reader in readers:
        with pytest.raises(ValueError, match=f"000.png is not a readable image: {reason}"):
            reader()


@pytest.mark.parametrize("kind, channels", [(2, 3), (4, 2), (6, 4)])
def test_color_of_sixteen_bits_is_read_as_eight(kind, channels, tmp_path):
    """Pillow reduces color and gray with transparency, PNG's kinds 2, 4 and 6, when it opens it."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    path = tmp_path / "a.png"
    header = struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)
    pixel = b"\0" + struct.pack(">H", 0x4080) * channels
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixel)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert photographs.read_image(path).tolist() == [[[0x40] * 3]]


def test_more_pixels_than_pillows_limit_are_refused(tmp_path, monkeypatch):
    """Pillow itself may only warn: its filter of warnings is the user's."""
    write(tmp_path, a=[np.zeros((8, 8, 3), np.uint8)])
    path = tmp_path / "a" / "000.png"
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 63)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        reason = "it has 64 pixels; at most 63 are accepted"
        with pytest.raises(
            photographs.Damaged, match=f"^{path} is not a readable image: {reason}$"
        ):
            photographs.read_image(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert photographs.read_image(path).shape == (8, 8, 3)


def test_importing_photographs_leaves_the_users_warnings_alone():
    script = (
        "import warnings, PIL.Image, cnnjax.data.photographs\n"
        "kinds = [kind for _, _, kind, _, _ in warnings.filters]\n"
        "assert PIL.Image.DecompressionBombWarning not in kinds"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=ENVIRONMENT)


def test_images_held_out_of_a_source(folder):
    """Held-out images are balanced over classes, and the same as for data in memory."""
    rest, held = folders.hold_out(folder, 5)
    assert len(rest) == 9 and len(held) == 5 and rest.classes == held.classes == folder.classes
    parts = []
    for part in (rest, held):
        images = [part[index][0] for index in range(len(part))]
        parts.append([np.asarray(image)[0, 0, 2] for image in images])
    assert sorted(parts[0] + parts[1]) == list(range(14))
    assert parts == [sorted(part) for part in parts]
    assert [held[index][1] for index in range(5)] == LABELS[parts[1]].tolist()
    assert sorted(np.bincount(LABELS[parts[1]])) == [1, 2, 2]
    assert np.flatnonzero(splits.hold_out(LABELS, 5)).tolist() == parts[1]
    again = folders.hold_out(folder, 5)[1]
    assert [np.asarray(again[index][0])[0, 0, 2] for index in range(5)] == parts[1]
    for count in (0, 12):
        with pytest.raises(ValueError, match=f"n_validation={count} is not between 1 and 11"):
            folders.hold_out(folder, count)


def test_held_out_images_are_told(tmp_path, caplog):
    write(tmp_path / "train", a=[ramp(8, 8)] * 3, b=[ramp(8, 8)])
    write(tmp_path / "val", a=[ramp(8, 8)], b=[ramp(8, 8)])
    with caplog.at_level("INFO", "cnnjax"):
        sources = folders.open_splits("folder", str(tmp_path), 2)
    assert {use: len(source) for use, source in sources.items()} == {
        "train": 2,
        "test": 2,
        "validation": 2,
    }
    # A class with a single image keeps it for training.
    assert [sources["train"][index][1] for index in range(2)] == [0, 1]
    assert told(caplog)[-1] == "validation: 2 of the training images"


def test_folders_beside_the_splits_are_told(tmp_path, caplog):
    """Such as a misspelled one, and a test set without labels."""
    for split in ("train", "valid", "dev", ".git"):
        write(tmp_path / split, a=[ramp(8, 8)], b=[ramp(8, 8)])
    write(tmp_path, test=[ramp(8, 8)])
    with caplog.at_level("INFO", "cnnjax"):
        folders.open_splits("folder", str(tmp_path))
    assert f"{tmp_path}: 2 folders passed over: dev, test" in told(caplog)


# ------------------------------------------------------------------ tensorflow-datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Unpacks a data_dir of tensorflow-datasets; returns its path."""
    found = tmp_path_factory.mktemp("tfds")
    shutil.unpack_archive(ROOT / "tests" / "golden" / "tfds.zip", found)
    return found


READ_TFDS = """
import json, sys
import numpy as np
from cnnjax.data import folders, stream
found = {"tensorflow": False}
held_out = folders.open_splits("tfds:NAME", sys.argv[1], 6)["validation"]
found["held out"] = [held_out[index][1] for index in range(6)]
for split in ("train", "test"):
    source = folders.Tfds("NAME", sys.argv[1], split)
    found[split] = []
    for index in range(len(source)):
        image, label = source[index]
        found[split].append([np.asarray(image).tolist(), label])
    found["classes"] = source.classes
    batches = stream.iterate(stream.EvaluationBatches(source, 4, 8, 8))
    found[split + " labels"] = np.concatenate([labels for _, labels in batches]).tolist()
found["tensorflow"] = "tensorflow" in sys.modules
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_prepared_data_set_is_read_without_tensorflow(prepared):
    """Every pixel and label is read; tensorflow-datasets has shuffled the examples."""
    done = subprocess.run(
        [sys.executable, "-c", READ_TFDS.replace("NAME", make_tfds.NAME), str(prepared)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=True,
    )
    results = json.loads(done.stdout)
    assert results["tensorflow"] is False
    assert results["classes"] == ["red", "green", "blue"]
    # No image is green.
    assert np.bincount(results["held out"]).tolist() == [3, 0, 3]
    for split in ("train", "test"):
        want = [[image.tolist(), label] for image, label in make_tfds.examples(split)]
        assert len(results[split]) == len(want) and sorted(results[split]) == sorted(want)
        assert results[f"{split} labels"] == [label for _, label in results[split]]


@pytest.mark.parametrize(
    "name, folder, split, reason",
    [
        (
            make_tfds.NAME,
            "",
            "validation",
            "ValueError: Unknown split 'validation'. Should be one of ['train', 'test'].",
        ),
        ("ramps", "", "train", "DatasetNotFoundError: Dataset ramps not found."),
        (
            make_tfds.NAME,
            "none",
            "train",
            f"DatasetNotFoundError: Dataset {make_tfds.NAME} not found.",
        ),
        (
            "mnist",
            "",
            "train",
            "NotImplementedError: Random access data source for file format FileFormat.TFRECORD is "
            "not supported.",
        ),
    ],
)
def test_what_is_not_prepared_is_told_with_the_command(prepared, name, folder, split, reason):
    where = str(prepared / folder)
    with pytest.raises(ValueError) as caught:
        folders.Tfds(name, where, split)
    message = str(caught.value)
    assert message.startswith(
        f"dataset='tfds:{name}' has no split '{split}' in data_dir='{where}' that can be read "
        f"({reason}"
    )
    assert message.endswith(f"tfds build {name} --file_format=array_record --data_dir={where}")
    assert "\n" not in message


@pytest.fixture
def imagenets_way(prepared, tmp_path):
    """Copies `prepared` with the names of ImageNet's splits, train and validation.

    Returns (folder, dataset_info.json, function that adds a test split with given labels and
    encoded images).
    """
    # Imported here, since every worker of the tests collects this module.
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    where = copy / make_tfds.NAME / "1.0.0"
    info = where / "dataset_info.json"
    shard = f"{make_tfds.NAME}-{{}}.array_record-00000-of-00001"
    info.write_text(info.read_text().replace('"name": "test"', '"name": "validation"'))
    (where / shard.format("test")).rename(where / shard.format("validation"))

    def add_test(labels, images=()):
        examples = array_record_module.ArrayRecordReader(str(where / shard.format("validation")))
        writer = array_record_module.ArrayRecordWriter(
            str(where / shard.format("test")), "group_size:1"
        )
        for number, label in enumerate(labels):
            example = tf_example_pb2.Example.FromString(examples.read([number])[0])
            example.features.feature["label"].int64_list.value[:] = [label]
            if images:
                example.features.feature["image"].bytes_list.value[:] = [images[number]]
            writer.write(example.SerializeToString())
        writer.close()
        examples.close()
        entry = json.loads(info.read_text())
        entry["splits"].append(entry["splits"][-1] | {"name": "test"})
        info.write_text(json.dumps(entry))

    return copy, info, add_test


DATASET = f"tfds:{make_tfds.NAME}"


def test_the_labeled_split_is_the_test_set(imagenets_way, caplog):
    """ImageNet's labeled split is called validation; its test split has labels of -1."""
    copy, _, add_test = imagenets_way
    uses = {"train": "train", "test": "validation"}
    assert folders.find_splits(DATASET, str(copy)) == uses
    add_test([-1] * 6)
    assert folders.find_splits(DATASET, str(copy)) == uses
    with caplog.at_level("INFO", "cnnjax"):
        sources = folders.open_splits(DATASET, str(copy))
    assert sources["train"].digest() != sources["test"].digest()
    assert told(caplog) == [
        f"train: 18 images, 3 classes in dataset='{DATASET}', split 'train'",
        f"test: 6 images, 3 classes in dataset='{DATASET}', split 'validation'",
        "validation is the test set, as there is no labeled split named test",
    ]
    labels = sources["test"].labels()
    assert sorted(labels) == sorted(label for _, label in make_tfds.examples("test"))
    with pytest.raises(
        ValueError,
        match=f"^record 0 of dataset='{DATASET}', split 'test' has the label -1; expected",
    ):
        folders.Tfds(make_tfds.NAME, str(copy), "test")[0]


def test_labels_that_are_no_class_are_refused(imagenets_way):
    """A split whose first label is valid is used, but a later wrong label is refused."""
    copy, _, add_test = imagenets_way
    add_test([0, 1, 2, 0, 3, -1])
    uses = {"train": "train", "validation": "validation", "test": "test"}
    assert folders.find_splits(DATASET, str(copy)) == uses
    source = folders.open_splits(DATASET, str(copy))["test"]
    where = f"dataset='{DATASET}', split 'test' has the label"
    for options in ({}, {"steps": range(1), "batch": 6, "skip_damaged": True}):
        with pytest.raises(ValueError, match=f"^record (4|5) of {where}"):
            read(source, size=8, resize=8, **options)
    with pytest.raises(ValueError, match=f"^{where} 3; expected 0 to 2$"):
        source.labels()


def test_a_data_set_without_a_test_split_says_so(imagenets_way):
    copy, info, _ = imagenets_way
    entry = json.loads(info.read_text())
    info.write_text(json.dumps(entry | {"splits": entry["splits"][:1]}))
    where = f"dataset='{DATASET}' in data_dir='{copy}'"
    with pytest.raises(ValueError, match=f"^{where} has no split test or val or validation or"):
        folders.open_splits(DATASET, str(copy))
    unsupervised = {key: value for key, value in entry.items() if key != "supervisedKeys"}
    info.write_text(json.dumps(unsupervised))
    with pytest.raises(
        ValueError,
        match=f"^dataset='{DATASET}' is not of labeled images: its supervised keys are None$",
    ):
        folders.open_splits(DATASET, str(copy))


@pytest.mark.parametrize("pixels", ["uint16", "float32"])
def test_a_data_set_of_more_than_8_bits_is_refused(pixels, imagenets_way):
    copy, info, _ = imagenets_way
    features = info.with_name("features.json")
    changed = features.read_text().replace('"uint8"', f'"{pixels}"')
    if pixels == "float32":
        # tensorflow-datasets accepts float32 only with one channel.
        changed = changed.replace('"3"\n', '"1"\n', 1)
    features.write_text(changed)
    message = f"^dataset='{DATASET}' has images of {pixels}; expected uint8$"
    with pytest.raises(ValueError, match=message):
        folders.open_splits(DATASET, str(copy))


def test_several_labels_for_an_image_are_refused(imagenets_way):
    copy, info, _ = imagenets_way
    features = info.with_name("features.json")
    content = json.loads(features.read_text())
    names = content["featuresDict"]["features"]
    sequence = "tensorflow_datasets.core.features.sequence_feature.Sequence"
    names["label"] = {
        "pythonClassName": sequence,
        "sequence": {"feature": names["label"], "length": "-1"},
    }
    features.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^dataset='{DATASET}' is not of labeled images: "):
        folders.open_splits(DATASET, str(copy))


def test_encoded_images_are_read_like_files(imagenets_way, tmp_path):
    """tensorflow-datasets would return a palette's numbers as gray, and CMYK as RGBA."""
    copy, _, add_test = imagenets_way
    image = PIL.Image.fromarray(ramp(8, 8, number=200, x=20, y=20))
    kinds = [("RGB", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG")]
    paths = []
    for mode, image_format in [*kinds, ("CMYK", "JPEG")]:
        paths.append(tmp_path / mode)
        image.convert(mode).save(paths[-1], image_format)
    add_test([0, 1, 2, 0, 1, 2], [path.read_bytes() for path in paths])
    source = folders.Tfds(make_tfds.NAME, str(copy), "test")
    for number, path in enumerate(paths):
        np.testing.assert_array_equal(source[number][0], photographs.read_image(path))


def test_encoded_images_that_cannot_be_read_are_named(imagenets_way, tmp_path):
    copy, _, add_test = imagenets_way
    path = tmp_path / "deep.png"
    PIL.Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(path)
    add_test([0, 0], [path.read_bytes(), b"no image"])
    source = folders.Tfds(make_tfds.NAME, str(copy), "test")
    reasons = (
        r"pixels of more than 8 bits \(Pillow's mode I;16\); expected 8",
        "cannot identify image file; expected JPEG, PNG, WEBP, BMP",
    )
    for number, reason in enumerate(reasons):
        name = f"record {number} of dataset='{DATASET}', split 'test'"
        with pytest.raises(
            photographs.Damaged, match=f"^{name} is not a readable image: {reason}$"
        ):
            source[number]


# ------------------------------------------------------------------ which images, in which order


@pytest.mark.slow
@pytest.mark.parametrize("resize", [0, 20])
def test_a_stream_that_starts_later_goes_on_as_the_uninterrupted_one(folder, resize):
    whole = read(folder, resize=resize, steps=range(8))
    # An epoch has three steps.
    for start in (1, 3, 4):
        assert_same(read(folder, resize=resize, steps=range(start, 8)), whole[start:])
    other = read(folder, resize=resize, steps=range(8), seed=1)
    assert all((images != theirs).any() for (images, _), (theirs, _) in zip(whole, other))


@pytest.mark.slow
def test_workers_change_nothing(prepared):
    source = folders.Tfds(make_tfds.NAME, str(prepared), "train")
    want = read(source, size=8, resize=0, steps=range(9))
    assert_same(read(source, size=8, resize=0, steps=range(2, 9), workers=2), want[2:])


def test_every_epoch_is_a_permutation(folder):
    steps = read(folder, steps=range(12))
    for images, labels in steps:
        assert images.shape == (4, 16, 16, 3)
        assert images.dtype == np.uint8 and labels.dtype == np.int32
        np.testing.assert_array_equal(labels, LABELS[images[:, 0, 0, 2]])
    epochs = [sum(numbers(steps[start : start + 3]), []) for start in (0, 3, 6, 9)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # The two images that an epoch leaves out differ from epoch to epoch.
    assert set(sum(epochs, [])) == set(range(14))
    assert sum(numbers(read(folder, steps=range(3), seed=1)), []) != epochs[0]


@pytest.mark.slow
@pytest.mark.parametrize("resize", [0, 20])
def test_processes_share_every_batch(folder, resize):
    whole = read(folder, resize=resize, steps=range(5))
    parts = [
        read(folder, resize=resize, steps=range(5), process_index=index, process_count=2)
        for index in (0, 1)
    ]
    assert all(len(labels) == 2 for part in parts for _, labels in part)
    assert_same(joined(parts), whole)


def test_evaluation_goes_through_everything_once_in_order(folder):
    batches = read(folder)
    assert numbers(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), LABELS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"process_count": 3}, "batch_size=4 is not a multiple of 3 processes"),
        ({"resize": 15}, "resize=15 is not 0 or at least image_size=16"),
    ],
)
def test_wrong_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        read(folder, steps=range(1), **arguments)


# ------------------------------------------------------------------ damaged images passed over

DAMAGED = (2, 6, 7, 11)


@pytest.fixture(scope="module")
def harmed(folder, tmp_path_factory):
    """Copies `folder` with four of its files cut in half; returns a source."""
    root = tmp_path_factory.mktemp("harmed") / "images"
    shutil.copytree(folder.files[0][0].parents[1], root)
    source = folders.Folder(root)
    for number in DAMAGED:
        path = source.files[number][0]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return source


@pytest.mark.slow
def test_the_next_whole_image_of_the_order_takes_a_damaged_ones_place(folder, harmed):
    whole = read(folder, steps=range(12))
    skipping = read(harmed, steps=range(12), skip_damaged=True)
    orders = [np.random.default_rng([0, epoch]).permutation(14).tolist() for epoch in range(4)]
    for step, (images, _) in enumerate(whole):
        theirs, their_labels, damaged = skipping[step]
        assert theirs.shape == images.shape and damaged.dtype == np.int32
        np.testing.assert_array_equal(their_labels, LABELS[theirs[:, 0, 0, 2]])
        for place, number in enumerate(images[:, 0, 0, 2].tolist()):
            if number in DAMAGED:
                order = orders[step // 3]
                following = (order + order)[order.index(number) + 1 :]
                next_whole = next(n for n in following if n not in DAMAGED)
                assert damaged[place] == number and theirs[place, 0, 0, 2] == next_whole
            else:
                assert damaged[place] == -1
                np.testing.assert_array_equal(theirs[place], images[place])
    for start in (1, 3, 4):
        assert_same(read(harmed, steps=range(start, 12), skip_damaged=True), skipping[start:])
    assert_same(read(harmed, steps=range(2, 12), skip_damaged=True, workers=1), skipping[2:])
    parts = [
        read(harmed, steps=range(12), skip_damaged=True, process_index=index, process_count=2)
        for index in (0, 1)
    ]
    assert_same(joined(parts), skipping)


@pytest.mark.slow
def test_what_is_never_passed_over(harmed, tmp_path):
    """Evaluated images, unreadable files, and a folder of only damaged images."""
    with pytest.raises(ValueError, match="png is not a readable image: ") as evaluated:
        read(harmed)
    assert "skip_damaged" not in str(evaluated.value)
    with pytest.raises(ValueError, match="png is not a readable image: .*; skip_damaged=True"):
        read(harmed, steps=range(6))
    shutil.copytree(harmed.files[0][0].parents[1], tmp_path / "images")
    source = folders.Folder(tmp_path / "images")
    source.files[0][0].unlink()
    with pytest.raises(ValueError, match="000.png cannot be read: .*No such file"):
        read(source, steps=range(6), skip_damaged=True)
    source.files[0][0].symlink_to(source.files[0][0])
    with pytest.raises(ValueError, match="000.png cannot be read: .*symbolic links"):
        read(folders.Folder(tmp_path / "images"), steps=range(6), skip_damaged=True)
    source.files[0][0].unlink()
    for path, _ in source.files:
        path.write_bytes(b"no image")
    with pytest.raises(
        ValueError,
        match="skip_damaged=True: none of the 14 images can be decoded; .*png is not a readable "
        "image: ",
    ):
        read(source, steps=range(6), skip_damaged=True)


# ------------------------------------------------------------------ crops


def test_evaluation_sees_the_center(tmp_path):
    """The crop is the unscaled center of 24x16 pixels, as 14 * 256 / 224 is 16."""
    wide = ramp(24, 16, x=10, y=10)
    source = folders.Folder(write(tmp_path, a=[wide, wide.transpose(1, 0, 2)]))
    for resize in (0, 16):
        ((images, _),) = read(source, size=14, resize=resize)
        np.testing.assert_array_equal(images[0], wide[1:15, 5:19])
        np.testing.assert_array_equal(images[1], wide.transpose(1, 0, 2)[5:19, 1:15])
        np.testing.assert_array_equal(
            np.asarray(crops.center(source[0][0], 14, resize)), wide[1:15, 5:19]
        )


@pytest.mark.parametrize("resize", [0, 20, 40])
def test_ten_views_are_of_the_scale_of_one(tmp_path, resize):
    """Corners are cut from a larger image, whose center is the crop of one view."""
    for split in ("train", "val"):
        write(tmp_path / split, ant=[ramp(48, 40, x=5, y=5), ramp(40, 48, x=5, y=5)])
    config = lenet_digits.get_config()
    config.update({"dataset": "folder", "data_dir": str(tmp_path), "image_size": 14})
    config.update({"resize": resize, "batch_size": 2})
    data = Streamed(config, Parallel("jit"))
    ((one, _),) = data.evaluation("test")
    ((ten, _),) = data.evaluation("test", views=10)
    # 14 * 256 / 224 is 16.
    size = resize or 16
    assert one.shape == (2, 14, 14, 3) and ten.shape == (2, size, size, 3)
    border = (size - 14) // 2
    np.testing.assert_array_equal(ten[:, border:-border, border:-border], one)


def test_the_host_waits_for_streamed_steps_only_now_and_then(tmp_path, monkeypatch):
    """Batches are read while earlier steps are computed: at most eight, or two seconds of them."""
    for split in ("train", "val"):
        write(tmp_path / split, ant=[ramp(20, 20)] * 4)
    config = lenet_digits.get_config()
    config.update({"dataset": "folder", "data_dir": str(tmp_path), "image_size": 14})
    config.update({"batch_size": 2, "workers": 0})
    seconds = [0.0]
    waits = []

    def take_step(state, constants, batch, numbers, steps_per_epoch):
        assert batch[0].shape == (2, 14, 14, 3) and steps_per_epoch == 2
        # The first step compiles; four others in a row are slow.
        seconds[0] += 20 if state == 0 else 0.5 if 10 <= state < 14 else 0.1
        return state + 1

    monkeypatch.setattr("cnnjax.train.step.streamed_step", lambda parallel, recipe: take_step)
    monkeypatch.setattr("jax.block_until_ready", lambda state: waits.append(state) or state)
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    data = Streamed(config, Parallel("jit"))
    done = state = 0
    while done < 40:
        steps = range(done, 40)
        state, done = data.advance(
            recipe=None, numbers=None, constants=None, state=state, steps=steps
        )
        assert state == done
    # Eight steps from 10 on take 2.4 s, 0.3 s each: the next three calls take six.
    assert waits == [1, 2, 10, 18, 24, 30, 36, 40]


@pytest.mark.parametrize("width, height, resize", [(48, 40, 20), (12, 10, 20), (36, 64, 18)])
def test_the_center_of_a_resized_image(tmp_path, width, height, resize):
    """The ramps show the center of each output pixel in the image's own coordinates."""
    source = folders.Folder(write(tmp_path, a=[ramp(width, height, x=3, y=3)]))
    ((images, _),) = read(source, size=16, resize=resize)
    scale = min(width, height) / resize
    for channel, length in ((0, width), (1, height)):
        inner = np.arange(16) + (round(length / scale) - 16) // 2
        want = 3 * np.clip((inner + 0.5) * scale - 0.5, 0, length - 1)
        pixels = images[0, 8, :, 0] if channel == 0 else images[0, :, 8, 1]
        # The filter is cut off at the border.
        np.testing.assert_allclose(pixels[2:-2], want[2:-2], atol=0.51)


@pytest.mark.parametrize("width, height", [(200, 2), (3, 250)])
def test_a_strips_crop_is_that_of_the_whole(width, height):
    """Compares with resizing the whole, over 20 million pixels; one level may differ."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image = PIL.Image.fromarray(noise)
    scale = 512 / min(width, height)
    size = round(width * scale), round(height * scale)
    whole = image.resize(size, PIL.Image.Resampling.BILINEAR)
    room = np.array(size) - 500
    center = (room // 2).tolist()
    at_random = np.random.default_rng(1).integers(0, room + 1).tolist()
    for generator, (left, top) in ((None, center), (np.random.default_rng(1), at_random)):
        want = np.asarray(whole.crop((left, top, left + 500, top + 500))).astype(int)
        crop = np.asarray(crops.resized_crop(image, 500, 512, generator))
        assert abs(crop - want).max() <= 1


def test_training_crops_are_windows_at_every_place(folder):
    """Each unscaled crop is a window of its image, and all 5x9 places occur."""
    places = (set(), set())
    for images, _ in read(folder, steps=range(120)):
        for image in images:
            left, top, number = (image[0, 0] // [10, 10, 1]).tolist()
            whole = np.asarray(folder[number][0])
            np.testing.assert_array_equal(image, whole[top : top + 16, left : left + 16])
            places[number % 2].add((left, top))
    upright, wide = places
    assert upright == set(itertools.product(range(5), range(9)))
    assert wide == set(itertools.product(range(9), range(5)))


def measured(image: np.ndarray) -> tuple[float, ...]:
    """Measures the place of an area crop of a ramp by its slopes in the interior.

    Returns (left, top, width, height).
    """
    size = len(image)
    inner = np.arange(4, size - 4)
    fits = []
    for values in (image[size // 2, 4:-4, 0], image[4:-4, size // 2, 1]):
        slope, start = np.polyfit(inner + 0.5, values.astype(float), 1)
        fits.append((start + 0.5, slope * size))
    (left, width), (top, height) = fits
    return left, top, width, height


@pytest.mark.slow
def test_area_crops_are_of_the_published_areas_and_aspects(tmp_path):
    source = folders.Folder(write(tmp_path, a=[ramp(250, 170)]))
    batches = read(source, size=48, resize=0, batch=1, steps=range(1500))
    left, top, w, h = np.array([measured(images[0]) for images, _ in batches]).T
    area = w * h / (250 * 170)
    aspect = w / h
    assert 0.078 < area.min() < 0.12
    # The largest areas do not fit at every aspect ratio.
    assert 0.85 < area.max() < 1.01
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.35
    # Small areas fit at every ratio. With a uniform ratio instead of a uniform logarithm, this mean
    # would be 0.027.
    assert abs(np.log(aspect)[area < 0.5].mean()) < 0.015
    for start, length, room in ((left, w, 250), (top, h, 170)):
        assert start.min() > -1 and (start + length).max() < room + 1
        free = length < room - 10
        share = (start / (room - length))[free]
        assert share.min() < 0.05 and share.max() > 0.95 and abs(share.mean() - 0.5) < 0.03


def test_area_crops_are_interpolated(folder):
    """Crops are enlarged at least twice, which halves the ramps' steps of 10."""
    for images, _ in read(folder, size=48, resize=0, steps=range(3)):
        for axis, channel in ((2, 0), (1, 1)):
            assert np.abs(np.diff(images[..., channel].astype(int), axis=axis)).max() <= 6


def test_an_area_crop_that_cannot_fit_is_the_center(tmp_path):
    """No crop of 8 % of the area, at allowed aspect ratios, fits into 200x10 pixels.

    The largest crop at a ratio of 4/3 has 13x10 pixels.
    """
    source = folders.Folder(write(tmp_path, a=[ramp(200, 10)], b=[ramp(10, 200)]))
    for images, labels in read(source, size=48, resize=0, batch=2, steps=range(3)):
        for image, label in zip(images, labels):
            want = (93, 0, 13, 10) if label == 0 else (0, 93, 10, 13)
            np.testing.assert_allclose(measured(image), want, atol=0.3)


# ------------------------------------------------------------------ the benchmark of decoding


def test_the_benchmark_counts_the_photographs_that_it_used(monkeypatch):
    monkeypatch.setattr(decoding, "_COUNT", 2)
    monkeypatch.setattr(decoding, "_training_step", lambda: (8, None))
    monkeypatch.setattr(decoding, "_step_rate", lambda *arguments: 1.0)
    monkeypatch.setattr(decoding, "_ways", lambda *arguments: {})
    (results,) = decoding.measure("", 1)
    assert results["photographs"] == 2


@pytest.mark.slow
def test_the_benchmark_measures_every_way(monkeypatch):
    """Reads JPEGs of ImageNet's size; a pause of 20 ms replaces the network's step."""
    monkeypatch.setattr(decoding, "_SECONDS", 0.05)
    monkeypatch.setattr(decoding, "_COUNT", 16)
    monkeypatch.setattr(
        jax_side, "network", lambda *given: ({"step": lambda n: time.sleep(0.02 * n)}, {})
    )
    (results,) = decoding.measure("", 1, workers=(0,))
    assert results["photographs"] == 13 and results["step_batch"] == 8
    # A pause may be longer than asked for on a busy machine, but never shorter.
    assert 50 < results["step_images_per_s"] < 401
    for row in results["rows"]:
        assert row["min"] <= row["images_per_s"] <= row["max"] and row["images_per_s"] > 1
        assert row["over_step"] == pytest.approx(row["images_per_s"] / results["step_images_per_s"])
    ways = {(row["mode"], row["way"]) for row in results["rows"]}
    assert ways >= set(
        itertools.product(("training", "evaluation"), ("Pillow in a loop", "cnnjax"))
    )


@pytest.mark.slow
def test_the_benchmarks_files_are_of_imagenets_size(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_COUNT", 16)
    source = decoding.write_folder(photographs.list_photographs(), tmp_path)
    assert len(source) == 16
    for number in range(16):
        width, height = source[number][0].size
        assert abs(width * height / (500 * 375) - 1) < 0.01
    # There are thirteen photographs, so this is the first again.
    np.testing.assert_array_equal(np.asarray(source[0][0]), np.asarray(source[13][0]))


# ------------------------------------------------------------------ processes that read

WORKERS = """
import multiprocessing, os, signal, sys, threading, time
from cnnjax.data import folders, stream
if __name__ == "__main__":
    source = folders.Folder(sys.argv[1])
    options = {"size": 224, "resize": 0}
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    def disturb():
        # As a terminal or a scheduler sends them to all processes of a group.
        disturbed = set()
        while len(disturbed) < 2:
            for worker in set(multiprocessing.active_children()) - disturbed:
                for number in signals:
                    os.kill(worker.pid, number)
                disturbed.add(worker)
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)
    received = []
    for number in signals:
        signal.signal(number, lambda number, frame: received.append(number))
    threading.Thread(target=disturb, daemon=True).start()
    one = stream.iterate(stream.TrainingBatches(source, 36, range(1000), seed=0, **options), 1)
    two = stream.iterate(stream.TrainingBatches(source, 36, range(1000), seed=1, **options), 1)
    next(one), next(two)
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        time.sleep(0.01)
    assert received == [signal.SIGTERM], received
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for number in signals:
        for worker in workers:
            os.kill(worker.pid, number)
    time.sleep(0.5)
    for _ in range(10):
        next(one), next(two)
    assert all(worker.is_alive() for worker in workers)
    evaluation = stream.iterate(stream.EvaluationBatches(source, 10, 16, 20), 1)
    assert len(list(evaluation)) == 4
    assert set(multiprocessing.active_children()) == set(workers)
    # After a second, the workers' queues are full.
    time.sleep(1)
    began = time.monotonic()
    del one
    assert time.monotonic() - began < 15
    assert len(multiprocessing.active_children()) == 1
    # This stream is read to its end, and the other one is open when the program ends.
    batches = stream.TrainingBatches(source, 36, range(8), seed=0, **options)
    for images, _ in stream.iterate(batches, workers=2):
        print(images.shape)
    print(time.monotonic())
"""


@pytest.mark.slow
def test_workers_outlive_signals_and_end_at_once(colors, tmp_path):
    """Workers block signals, which the parent handles, and end quietly with their stream.

    They do so from their start, while the parent still gets its own.

    A stream ends when it is exhausted or let go of, and with the program, which leaves nothing.
    Workers that waited until their last batches are read would be killed after 25 s.
    """
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, script, colors / "train"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    ended = time.monotonic()
    # Python would report shared memory as leaked if grain freed it in a thread.
    assert (done.returncode, done.stderr) == (0, "")
    *shapes, end = done.stdout.splitlines()
    assert shapes == ["(36, 224, 224, 3)"] * 8
    assert ended - float(end) < 15


def is_running(process: int) -> bool:
    try:
        # A process that has ended and was not waited for has no command line.
        return bool(pathlib.Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.slow
def test_a_worker_does_not_outlive_its_parent(folder):
    process = forked.Popen("stream_reader", folder.files[0][0].parents[1])
    worker = int(process.stderr.readline())
    assert is_running(worker)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 40
    while is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode == -signal.SIGKILL


# ------------------------------------------------------------------ a whole run


@pytest.fixture
def colors(tmp_path):
    """Writes 36 training and 9 test images of three colors; returns the data_dir."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        noise = generator.integers(0, 100, (3, count, 36, 40, 3)).astype(np.uint8)
        for label in range(3):
            noise[label, ..., label] += 150
        write(tmp_path / "data" / split, red=noise[0], green=noise[1], blue=noise[2])
    return tmp_path / "data"


def command(data_dir, workdir, **more) -> list[str]:
    options = {
        "dataset": "folder",
        "data_dir": data_dir,
        "model": "mlp1",
        "image_size": 32,
        "resize": 32,
        "batch_size": 12,
        "epochs": 2,
        "workers": 1,
        "schedule.learning_rate": 0.001,
        **more,
    }
    return [
        "cnnjax.main",
        "--config",
        "configs/lenet_digits.py",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in options.items()),
    ]


def run(*given, **more) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own, whose end is a user's."""
    return subprocess.run(
        [sys.executable, "-m", *command(*given, **more)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.mark.slow
def test_a_run_on_a_folder(colors, tmp_path):
    """The folder has validation images for the plateau rule, and other files."""
    (colors / "val").rename(colors / "test")
    for label in ("blue", "green", "red"):
        (colors / "valid" / label).mkdir(parents=True)
        shutil.copy(colors / "test" / label / "000.png", colors / "valid" / label)
        (colors / "train" / label / "notes.txt").touch()
    (colors / "train" / ".ipynb_checkpoints").mkdir()
    done = run(colors, tmp_path / "run", **{"schedule.name": "plateau"})
    assert done.returncode == 0, done.stderr
    for noise in ("Exception ignored", "leaked", "Traceback"):
        assert noise not in done.stderr
    for line in (
        f"train: 36 images, 3 classes in {colors}/train; 3 files passed over: 3 .txt\n",
        f"validation: 3 images, 3 classes in {colors}/valid\n",
        f"test: 9 images, 3 classes in {colors}/test\n",
    ):
        assert done.stderr.count(line) == 1
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["classes"] == ["blue", "green", "red"]
    counts = {name: results[f"n_{name}"] for name in ("train", "validation", "test")}
    assert counts == {"train": 36, "validation": 3, "test": 9}
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| validation | 3 |" in report
    epoch = results["weights"]["epoch"]
    assert f"The training error is the mean over the steps of epoch {epoch}; " in report
    assert [line["step"] for line in results["history"]] == [3, 6]
    # There are three validation images.
    errors = np.array([3 * line["validation_error"] for line in results["history"]])
    np.testing.assert_allclose(errors, errors.round(), atol=1e-4)
    assert results["final"]["epoch"] == 2
    assert results["history"][1]["train_loss"] < results["history"][0]["train_loss"] < 2
    with np.load(tmp_path / "run" / "test.npz") as saved:
        assert saved["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        error = (saved["labels"] != saved["predicted"]).mean()
    assert error == pytest.approx(results["final"]["test_error"])


@pytest.mark.slow
def test_an_evaluation_of_few_images_starts_no_processes(colors):
    config = lenet_digits.get_config()
    config.update({"dataset": "folder", "data_dir": str(colors), "image_size": 32, "workers": 2})
    before = {*multiprocessing.active_children()}
    images, _ = next(Streamed(config, Parallel("jit")).evaluation("test"))
    assert images.shape == (9, 32, 32, 3)
    assert {*multiprocessing.active_children()} <= before


def test_test_images_are_cropped_one_by_one():
    """Photographs are much larger than their crops."""
    whole = []
    counts = []

    class Photographs:
        def __getitem__(self, number):
            image = PIL.Image.new("RGB", (64, 48), (number, 0, 0))
            whole.append(weakref.ref(image))
            counts.append(sum(reference() is not None for reference in whole))
            return image, 0

    data = object.__new__(Streamed)
    data._sources = {"test": Photographs()}
    data._config = types.SimpleNamespace(image_size=16, resize=20)
    images = data.test_images(np.arange(6))
    assert images.shape == (6, 16, 16, 3)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    # The last one may still be there.
    assert max(counts) <= 2


def harm(path: pathlib.Path) -> pathlib.Path:
    """Replaces a PNG by the first 400 bytes of a JPEG; returns the new path."""
    damaged = path.with_suffix(".jpg")
    PIL.Image.open(path).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:400])
    path.unlink()
    return damaged


@pytest.mark.slow
def test_damaged_images_end_a_run_or_are_counted_named_and_passed_over(colors, tmp_path):
    """A run stopped within an epoch counts them, too; a test image ends a run."""
    paths = [harm(colors / "train" / "green" / f"00{number}.png") for number in (5, 7)]
    tested = colors / "val" / "red" / "001.png"
    content = tested.read_bytes()
    tested.write_bytes(content[:-40])
    folder = tmp_path / "run"

    done = run(colors, folder, checkpoint_every_steps=2)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "is not a readable image" in line]
    assert line.startswith(tuple(f"error: {path} is not a readable image: " for path in paths))
    assert line.endswith("; skip_damaged=True trains without it")
    for noise in ("leaked", "Traceback"):
        assert noise not in done.stderr
    assert not (folder / "results.json").exists()

    # The same folder is gone on with.
    skipping = command(colors, folder, checkpoint_every_steps=2, skip_damaged=True)
    done = forked.run(*skipping, flags=quick.FLAGS)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {tested} is not a readable image: " in done.stderr
    for path in paths:
        assert done.stderr.count(f"passed over: {path} is not a readable image: ") == 1
    # Each epoch's line has the count.
    assert done.stderr.count(", 2 damaged images passed over") == 2

    tested.write_bytes(content)
    # Without the last checkpoint, the run goes on from step 4, within the second epoch. The number
    # of workers may change.
    shutil.rmtree(folder / "checkpoints" / "6")
    done = forked.run(*skipping, "--config.workers=0", flags=quick.FLAGS)
    assert done.returncode == 0 and "resuming from step 4" in done.stderr, done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert [line["damaged"] for line in results["history"]] == [2, 2]
