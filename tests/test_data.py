"""Data sets are read from their original files, completely or not at all."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import tarfile
import threading

import numpy as np
import PIL.Image
import pytest

from cnnjax.data import arrays, published, sources, splits
from cnnjax.data.cifar_pickle import read_cifar_pickle
from cnnjax.runtime import errors


def test_cifar10_is_the_published_one(data_dir):
    cifar10 = arrays.load("cifar10", str(data_dir))
    for split, each in ((cifar10.train, 5000), (cifar10.test, 1000)):
        assert split.images.shape == (10 * each, 32, 32, 3) and split.images.dtype == np.uint8
        assert np.bincount(split.labels).tolist() == [each] * 10
    mean, std = arrays.normalization(cifar10.train.images)
    # The moments that are commonly published for CIFAR-10.
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=5e-5)
    np.testing.assert_allclose(std, [0.2470, 0.2435, 0.2616], atol=5e-5)


def test_mnist_is_the_published_one(data_dir):
    mnist = arrays.load("mnist", str(data_dir))
    assert mnist.train.images.shape == (60_000, 28, 28, 1)
    assert mnist.test.images.shape == (10_000, 28, 28, 1)
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    moments = arrays.normalization(mnist.train.images)
    np.testing.assert_allclose(moments, [[0.1307], [0.3081]], atol=5e-5)


def test_the_default_needs_no_file():
    digits = arrays.load("digits", "/nowhere")
    assert digits.train.images.shape == (1437, 8, 8, 1) and digits.test.images.shape == (
        360,
        8,
        8,
        1,
    )
    assert digits.train.images.max() == 255 and digits.validation is None
    # Imported here, since every worker of the tests collects this module.
    import sklearn.datasets

    original = sklearn.datasets.load_digits()
    images = np.concatenate([digits.train.images, digits.test.images])
    np.testing.assert_array_equal(images[..., 0], np.round(original.images * (255 / 16)))
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    np.testing.assert_array_equal(labels, original.target)


# ------------------------------------------------------------------ every layout, on small files

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
LABELS = RANDOM.permutation(np.arange(20) % 10).astype(np.int32)
ROWS = IMAGES.transpose(0, 3, 1, 2).reshape(20, 3072)
SMALL = dataclasses.replace(sources.DATASETS["cifar10"], counts=(15, 5))
BINARY = SMALL.layouts[0]
FINE = dataclasses.replace(sources.DATASETS["cifar100"], counts=(15, 5))


def binary(first, last, coarse=False):
    labels = LABELS[first:last, None].astype(np.uint8)
    return np.concatenate(
        [labels // 2, labels, ROWS[first:last]] if coarse else [labels, ROWS[first:last]], 1
    ).tobytes()


def python(first, last, key=b"labels"):
    return pickle.dumps(
        {b"batch_label": b"x", key: LABELS[first:last].tolist(), b"data": ROWS[first:last]},
        protocol=2,
    )


def batches(is_binary):
    make = binary if is_binary else python
    suffix = ".bin" if is_binary else ""
    parts = {f"data_batch_{n + 1}{suffix}": make(3 * n, 3 * n + 3) for n in range(5)}
    return parts | {f"test_batch{suffix}": make(15, 20)}


def fine_batches(is_binary):
    if is_binary:
        return {"train.bin": binary(0, 15, coarse=True), "test.bin": binary(15, 20, coarse=True)}
    return {"train": python(0, 15, b"fine_labels"), "test": python(15, 20, b"fine_labels")}


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def archive(path, folder, files):
    with tarfile.open(path, "w:gz") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def as_published(source, path):
    """Returns the source with the archive's own hash as the published one."""
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    layouts = []
    for layout in source.layouts:
        if layout.archive.name == path.name:
            layout = layout._replace(archive=layout.archive._replace(md5=md5))
        layouts.append(layout)
    return dataclasses.replace(source, layouts=tuple(layouts))


def assert_ours(found):
    for split, part in zip(found, (slice(0, 15), slice(15, 20))):
        np.testing.assert_array_equal(split.images, IMAGES[part])
        np.testing.assert_array_equal(split.labels, LABELS[part])


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("source, make", [(SMALL, batches), (FINE, fine_batches)])
@pytest.mark.parametrize("place", ["folder", "itself", "archive"])
def test_cifars_layouts(tmp_path, source, make, is_binary, place):
    layout = source.layouts[0 if is_binary else 1]
    if place == "archive":
        path = tmp_path / layout.archive.name
        archive(path, layout.folder, make(is_binary))
        source = as_published(source, path)
    else:
        parent = tmp_path / layout.folder if place == "folder" else tmp_path
        write(parent, make(is_binary))
    assert_ours(source.read(tmp_path))


def test_an_archive_is_decompressed_once(tmp_path, monkeypatch):
    """Its files may come in any order; as a stream, it cannot be gone back in."""
    path = tmp_path / BINARY.archive.name
    archive(path, BINARY.folder, dict(reversed(batches(True).items())))
    modes = []
    open_archive = tarfile.open

    def counted(place, mode="r"):
        modes.append(mode)
        return open_archive(place, mode)

    monkeypatch.setattr(tarfile, "open", counted)
    assert_ours(as_published(SMALL, path).read(tmp_path))
    assert modes == ["r|gz"]


def idx(values):
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()


def small_idx(url="http://localhost:1/"):
    """Creates MNIST's layout with 15 training and 5 test images.

    Returns a source that knows the files' hashes, and the compressed contents by file name.
    """
    files = {}
    for part, where in (("train", slice(0, 15)), ("t10k", slice(15, 20))):
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(IMAGES[where, ..., 0]))
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(LABELS[where].astype(np.uint8)))
    entries = tuple(
        published.File(name, (url + name,), hashlib.md5(content).hexdigest())
        for name, content in files.items()
    )
    mnist = sources.DATASETS["mnist"]
    source = dataclasses.replace(mnist, files=entries, counts=(15, 5), size=(32, 32))
    return source, files


@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", ""])
def test_mnists_layout_compressed_or_not(tmp_path, place):
    source, files = small_idx()
    write(tmp_path / place, files)
    np.testing.assert_array_equal(source.read(tmp_path)[0].images, IMAGES[:15, ..., :1])
    if place:
        for name in files:
            (tmp_path / place / name).unlink()
        plain = {name[:-3]: gzip.decompress(content) for name, content in files.items()}
        write(tmp_path / place, plain)
        np.testing.assert_array_equal(source.read(tmp_path)[1].labels, LABELS[15:])


# ------------------------------------------------------------------ damaged and foreign files


def test_a_pickle_runs_nothing(tmp_path):
    """A pickle that asks for `os.system` is refused before it can call it."""
    marker = tmp_path / "ran"
    evil = type("Evil", (), {"__reduce__": lambda self: (os.system, (f"touch {marker}",))})
    for content in ({b"data": evil(), b"labels": [1]}, evil()):
        with pytest.raises(
            ValueError,
            match="not a CIFAR batch in the Python layout: UnpicklingError: it asks for .*system",
        ) as caught:
            read_cifar_pickle(pickle.dumps(content, protocol=2), "batch", 1)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_damage_is_named(tmp_path):
    write(tmp_path / BINARY.folder, batches(True))
    path = tmp_path / BINARY.folder / "data_batch_3.bin"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], r"data_batch_3\.bin holds 9,218 bytes of data where \[3, 3073\] are 9,219"),
        (whole + b"x", "9,220 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            SMALL.read(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="lacks data_batch_3.bin; it has other batches"):
        SMALL.read(tmp_path)


def test_a_label_out_of_range_is_named(tmp_path, monkeypatch):
    files = batches(True)
    files["data_batch_2.bin"] = bytes([10]) + files["data_batch_2.bin"][1:]
    write(tmp_path / BINARY.folder, files)
    monkeypatch.setitem(sources.DATASETS, "cifar10", SMALL)
    with pytest.raises(
        ValueError,
        match="the training set of cifar10 in data_dir=.* has the label 10; expected 0 to 9",
    ):
        arrays.load("cifar10", str(tmp_path))


class Own:
    """A user's data set with the given test labels."""

    classes = ("a", "b")

    def __init__(self, loss, labels):
        self.loss = loss
        self.labels = np.array(labels)

    def read(self, data_dir):
        images = np.zeros((2, 2, 1, 1), np.uint8)
        good = arrays.Split(images, np.zeros_like(self.labels))
        return good, arrays.Split(images, self.labels)


@pytest.mark.parametrize(
    "loss, labels, wrong",
    [
        ("cross_entropy", [0, -1], -1),
        ("cross_entropy", [2, 1], 2),
        ("pixelwise", [[[0], [255]], [[1], [2]]], 2),
        ("sigmoid", [[0, 1], [2, 0]], 2),
    ],
)
def test_labels_of_any_kind_are_checked(monkeypatch, loss, labels, wrong):
    monkeypatch.setitem(sources.DATASETS, "own", Own(loss, labels))
    with pytest.raises(
        ValueError,
        match=f"^the test set of own in data_dir='x' has the label {wrong}; expected 0 to 1$",
    ):
        arrays.load("own", "x")


@pytest.mark.parametrize(
    "numbers", [slice(2), np.array([3, 0]), np.array([True, False, False, True])]
)
def test_a_split_takes_images_with_their_labels(numbers):
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    part = arrays.Split(images, 10 * np.arange(4)).take(numbers)
    assert isinstance(part, arrays.Split)
    assert part.images.ravel().tolist() == np.arange(4)[numbers].tolist()
    assert part.labels.tolist() == (10 * np.arange(4))[numbers].tolist()


def test_a_split_draws_the_same_images_of_a_seed():
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    split = arrays.Split(images, np.arange(50))
    drawn = split.draw(9, 3)
    # Studies of earlier versions drew so.
    numbers = np.random.default_rng(3).permutation(50)[:9]
    assert drawn.images.ravel().tolist() == drawn.labels.tolist() == numbers.tolist()
    assert sorted(split.draw(99, 3).labels) == list(range(50))
    # A study of more repetitions keeps the images of the first ones.
    assert split.draw(4, 3).labels.tolist() == numbers[:4].tolist()


def test_a_librarys_error_becomes_one_short_line():
    text = errors.one_line(ValueError("  wrong:\n\t8 " + 400 * "x"))
    assert text.startswith("wrong: 8 xx") and len(text) == 300


def test_how_classes_differ_is_told_in_few_words():
    many = [f"class{number:04}" for number in range(2000)]
    assert splits.describe_classes(many, tuple(many)) == ""
    assert splits.describe_classes(many, many[::-1]) == "the classes are in another order"
    change = splits.describe_classes(many, ["cat", *many[:3]])
    assert change.startswith("missing classes: class0003, class0004, ")
    assert change.endswith(", class0012 and 1,987 more; additional: cat")
    # Names are the same in both Unicode forms.
    assert splits.describe_classes(["A\u0308pfel"], ["Äpfel"]) == ""


def test_a_slice_is_the_first_training_images_and_the_whole_test_set():
    whole = arrays.load("digits")
    part = arrays.load("digits[:300]")
    np.testing.assert_array_equal(part.train.images, whole.train.images[:300])
    np.testing.assert_array_equal(part.train.labels, whole.train.labels[:300])
    np.testing.assert_array_equal(part.test.images, whole.test.images)
    assert part.classes == whole.classes
    # Validation images come from the slice.
    with_validation = arrays.load("digits[:300]", n_validation=40)
    assert len(with_validation.train.labels) == 260
    assert len(with_validation.validation.labels) == 40
    rows = [*with_validation.train.images, *with_validation.validation.images]
    assert sorted(map(bytes, rows)) == sorted(map(bytes, whole.train.images[:300]))
    # A slice has the loss of the whole data set.
    assert arrays.loss_of("camvid[:20]") == "pixelwise"


def test_wrong_slices_are_named():
    with pytest.raises(ValueError, match=r"dataset='digits\[:1438\]': digits has 1437 training"):
        arrays.load("digits[:1438]")
    for name in ("digits[:0]", "digits[5:]", "digits[:]", "digit[:5]"):
        with pytest.raises(ValueError, match="is not one of digits, .* such as cifar10"):
            arrays.check_name(name)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("digts", "; did you mean digits?"),
        ("digit[:5]", "; did you mean digits?"),
        ("folders", "; did you mean folder?"),
        ("words", ""),
    ],
)
def test_a_data_set_of_a_similar_name_is_suggested(name, hint):
    with pytest.raises(ValueError, match=re.escape(f"such as cifar10[:12000]{hint}") + "$"):
        arrays.check_name(name)


@pytest.mark.parametrize("name", ["folder", "tfds:mnist"])
def test_a_streamed_data_set_is_not_read_whole(name):
    with pytest.raises(ValueError, match=f"^dataset='{name}' is streamed and cannot be read whol"):
        arrays.load(name)


def test_a_saved_data_set_is_read_as_it_was(tmp_path):
    whole = arrays.load("digits")
    file = tmp_path / "own.npz"
    # NumPy's own labels are int64, and a path may be a string.
    train = arrays.Split(whole.train.images, whole.train.labels.astype(np.int64))
    arrays.save(dataclasses.replace(whole, train=train), str(file))
    assert len(arrays.load(file).train.labels) == len(whole.train.labels)
    again = arrays.load(f"{file}[:300]")
    np.testing.assert_array_equal(again.train.images, whole.train.images[:300])
    np.testing.assert_array_equal(again.train.labels, whole.train.labels[:300])
    assert again.train.labels.dtype == np.int32
    np.testing.assert_array_equal(again.test.images, whole.test.images)
    np.testing.assert_array_equal(again.test.labels, whole.test.labels)
    assert again.classes == whole.classes
    assert arrays.loss_of(str(file)) == "cross_entropy"


def test_saved_validation_images_are_used_or_left_out(tmp_path):
    """As those of CamVid, which also has its own."""
    data = arrays.load("digits[:300]", n_validation=40)
    images, labels = data.validation
    file = tmp_path / "own.npz"
    validation = arrays.Split(images, labels.astype(np.int64))
    arrays.save(dataclasses.replace(data, validation=validation), file)
    again = arrays.load(file, n_validation=40)
    np.testing.assert_array_equal(again.validation.images, images)
    np.testing.assert_array_equal(again.validation.labels, labels)
    assert again.validation.labels.dtype == np.int32
    np.testing.assert_array_equal(again.train.images, data.train.images)
    np.testing.assert_array_equal(again.test.images, data.test.images)
    assert arrays.load(file).validation is None
    with pytest.raises(ValueError, match="^n_validation=39 is not 0 or 40, .* has of its own$"):
        arrays.load(file, n_validation=39)
    validation = arrays.Split(images[:, :7], labels)
    with pytest.raises(ValueError, match=r"^the validation set of .* has images of \[7, 8, 1\]"):
        arrays.save(dataclasses.replace(data, validation=validation), file)


def test_a_saved_data_set_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arrays.save(arrays.load("digits[:20]"), "~/own.npz")
    assert (tmp_path / "own.npz").is_file()
    assert len(arrays.load("~/own.npz[:10]").train.labels) == 10


def test_a_file_that_is_no_saved_data_set_is_named(tmp_path, monkeypatch):
    good = arrays.load("digits[:10]")
    file = tmp_path / "own.npz"
    refused = r"own.npz' is not a file that cnnjax.data.arrays.save wrote: "
    with pytest.raises(ValueError, match=f"^dataset='{file}' cannot be read: No such file or"):
        arrays.load(str(file))
    np.savez(file, train_images=good.train.images)
    with pytest.raises(ValueError, match=f"{refused}KeyError"):
        arrays.load(str(file))
    arrays.save(good, file)

    def exhausted(*arguments, **options):
        raise MemoryError("Unable to allocate 1. TiB")

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", exhausted)
        with pytest.raises(MemoryError, match="^Unable to"):
            arrays.load(str(file))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{refused}BadZipFile"):
        arrays.load(str(file))
    # NumPy takes text for a pickle, which is not to be read.
    file.write_text("no data set")
    with pytest.raises(ValueError, match="is not a file that cnnjax.data.arrays.save wrote$"):
        arrays.load(str(file))


@pytest.mark.parametrize(
    "part, images, labels, message",
    [
        ("train", lambda x: x[:-1], None, r"has labels of int32 \[10\]; expected integers \[9\]"),
        ("train", None, lambda y: y / 2, r"has labels of float64 \[10\]; expected integers \[10\]"),
        ("train", lambda x: x[..., 0], None, r"has images of uint8 \[10, 8, 8\]; expected uint8"),
        ("test", lambda x: x / 255, None, r"has images of float64 \[360, 8, 8, 1\]; expected"),
        ("test", lambda x: x[:, :7], None, r"has images of \[7, 8, 1\]; those of the training set"),
        ("test", lambda x: x[:0], lambda y: y[:0], "has no images"),
        ("test", None, lambda y: y + 1, "has the label 10; expected 0 to 9"),
    ],
)
def test_what_cannot_be_trained_on_is_neither_saved_nor_loaded(
    part, images, labels, message, tmp_path
):
    good = arrays.load("digits[:10]")
    split = getattr(good, part)
    if images:
        split = split._replace(images=images(split.images))
    if labels:
        split = split._replace(labels=labels(split.labels))
    wrong = dataclasses.replace(good, **{part: split})
    file = tmp_path / "own.npz"
    subject = f"^the {'training' if part == 'train' else part} set of {file}"
    with pytest.raises(ValueError, match=f"{subject} {message}"):
        arrays.save(wrong, file)
    assert not file.exists()
    np.savez(
        file,
        train_images=wrong.train.images,
        train_labels=wrong.train.labels,
        test_images=wrong.test.images,
        test_labels=wrong.test.labels,
        classes=wrong.classes,
    )
    with pytest.raises(ValueError, match=f"{subject} in data_dir='data' {message}"):
        arrays.load(str(file))
    with pytest.raises(ValueError, match="own.np' does not end in .npz$"):
        arrays.save(good, tmp_path / "own.np")


def save_with_classes(data, classes, file):
    """Writes a file with classes that `arrays.save` refuses."""
    arrays.save(data, file)
    with np.load(file) as members:
        np.savez(file, **{**members, "classes": classes})


@pytest.mark.parametrize(
    "classes, value",
    [
        (np.array([b"cat", b"dog"]), r"\[b'cat', b'dog'\]"),
        # Its letters would be three classes.
        ("cat", "'cat'"),
        (10, "10"),
        ([["cat"], ["dog"]], r"\[\['cat'\], \['dog'\]\]"),
        # JSON has no NaN.
        ([0.0, np.nan], r"\[0.0, nan\]"),
    ],
)
def test_classes_are_a_list_of_text_or_numbers(classes, value, tmp_path):
    """Otherwise a run could not be recorded after its training."""
    file = tmp_path / "own.npz"
    message = f" has classes={value}; expected a one-dimensional array of text or finite numbers$"
    good = arrays.load("digits[:10]")
    with pytest.raises(ValueError, match=f"^{file}{message}"):
        arrays.save(dataclasses.replace(good, classes=classes), file)
    assert not file.exists()
    save_with_classes(good, classes, file)
    with pytest.raises(ValueError, match=f"^dataset='{file}'{message}"):
        arrays.load(str(file))


@pytest.mark.parametrize(
    "first, second, name", [("a", "a", "a"), (7, 7, "7"), ("\u00c4", "A\u0308", "\u00c4")]
)
def test_two_classes_of_one_name_are_not_saved(first, second, name, tmp_path):
    """Files that earlier versions have written are loaded, so that their runs go on."""
    file = tmp_path / "own.npz"
    good = arrays.load("digits[:10]")
    others = tuple(type(first)(number) for number in range(10, 18))
    classes = (first, second, *others)
    with pytest.raises(ValueError, match=f"^{file} has 2 classes named '{name}'; expected one$"):
        arrays.save(dataclasses.replace(good, classes=classes), file)
    assert not file.exists()
    save_with_classes(good, classes, file)
    assert arrays.load(file).classes == (name, name, *map(str, others))


def test_lists_are_saved_as_arrays_or_refused_by_name(tmp_path):
    good = arrays.load("digits[:10]")
    train = arrays.Split(good.train.images, good.train.labels.tolist())
    arrays.save(dataclasses.replace(good, train=train), tmp_path / "own.npz")
    assert arrays.load(tmp_path / "own.npz").train.labels.tolist() == train.labels
    # Python's numbers have 64 bits.
    train = arrays.Split(good.train.images.tolist(), train.labels)
    message = r"has images of int64 \[10, 8, 8, 1\]; expected uint8"
    with pytest.raises(ValueError, match=f"^the training set of .*own.npz {message}"):
        arrays.save(dataclasses.replace(good, train=train), tmp_path / "own.npz")


def test_classes_may_be_numbers(tmp_path):
    file = tmp_path / "own.npz"
    good = arrays.load("digits[:10]")
    for classes in (tuple(range(10)), tuple(np.arange(10) / 2)):
        arrays.save(dataclasses.replace(good, classes=classes), file)
        assert arrays.load(str(file)).classes == tuple(map(str, classes))


def test_a_mask_in_jpeg_is_refused(tmp_path):
    """JPEG compression changes pixel values, which are a mask's labels."""
    source = sources.CamVid("pixelwise", size=(8, 8))
    mask = PIL.Image.new("L", (8, 8), 3)
    mask.save(tmp_path / "mask.png")
    assert (source._mask(tmp_path / "mask.png") == 3).all()
    mask.save(tmp_path / "mask.jpg", quality=100)
    with pytest.raises(ValueError, match="mask.jpg is a mask in JPEG, which changes labels"):
        source._mask(tmp_path / "mask.jpg")


def test_a_damaged_gzip_and_a_wrong_header_are_named(tmp_path):
    source, files = small_idx()
    write(tmp_path / "mnist", files)
    name = "t10k-images-idx3-ubyte.gz"
    (tmp_path / "mnist" / name).write_bytes(files[name][:-3])
    with pytest.raises(ValueError, match=f"{name} has the MD5 hash .*, and the published file has"):
        source.read(tmp_path)
    with pytest.raises(ValueError, match="x begins with .*; the IDX header of unsigned bytes"):
        published.read_idx(idx(IMAGES[:15, ..., 0]), "x", (14, 32, 32))


def test_an_archive_that_is_not_the_published_one_is_not_opened(tmp_path):
    path = tmp_path / BINARY.archive.name
    with tarfile.open(path, "w:gz") as file:
        member = tarfile.TarInfo(f"{BINARY.folder}/data_batch_1.bin")
        member.type = tarfile.SYMTYPE
        member.linkname = "/etc/passwd"
        file.addfile(member)
    for content in (path.read_bytes(), path.read_bytes()[:40]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=f"^{path} has the MD5 hash .*, and the published file has c32a1d4a.*: it is "
            "damaged or another file; remove or rename it$",
        ):
            SMALL.read(tmp_path)


# ------------------------------------------------------------------ downloads


@pytest.fixture
def server(monkeypatch):
    """Serves `files` over HTTP; each response ends after `settings["cut"]` bytes.

    Yields (address, files, settings).
    """
    # Downloads here take no proxy.
    monkeypatch.setenv("no_proxy", "localhost")
    files = {}
    settings = {"cut": None}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = files.get(self.path[1:])
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: settings["cut"]])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://localhost:{running.server_address[1]}/", files, settings
        running.shutdown()


def test_absent_files_are_downloaded_once(tmp_path, server):
    address, served, _ = server
    source, files = small_idx(address)
    served |= files
    np.testing.assert_array_equal(source.read(tmp_path)[0].images, IMAGES[:15, ..., :1])
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(files)
    served.clear()
    np.testing.assert_array_equal(source.read(tmp_path)[1].labels, LABELS[15:])


def test_a_second_address_serves_where_the_first_does_not(tmp_path, server):
    address, served, _ = server
    source, files = small_idx(address)
    served |= files
    more = [file._replace(urls=("http://localhost:1/x", *file.urls)) for file in source.files]
    source = dataclasses.replace(source, files=tuple(more))
    np.testing.assert_array_equal(source.read(tmp_path)[1].labels, LABELS[15:])


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("cut", "IncompleteRead"),
        ("other", "does not match the known hash"),
        ("absent", "404 Client Error"),
        ("unreachable", "Connection refused"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(tmp_path, server, fault, reason):
    address, served, settings = server
    if fault == "unreachable":
        address = "http://localhost:1/"
    source, files = small_idx(address)
    if fault == "other":
        served |= dict.fromkeys(files, gzip.compress(b"another file"))
    elif fault == "cut":
        served |= files
        settings["cut"] = 50
    data_dir = tmp_path / "new" / "data"
    with pytest.raises(
        ValueError,
        match="train-images-idx3-ubyte.gz is not in .*mnist and could not be downloaded "
        rf"\(http://localhost[^ ]*: [^;]*{reason}.*\); put it there by hand, "
        "or name the folder that has it with data_dir$",
    ) as caught:
        source.read(data_dir)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ validation


def test_the_held_out_images_are_balanced_and_the_same_each_time():
    digits = arrays.load("digits", n_validation=101)
    again = arrays.load("digits", n_validation=101)
    assert len(digits.train.labels) == 1437 - 101 and len(digits.validation.labels) == 101
    assert set(np.bincount(digits.validation.labels)) == {10, 11}
    np.testing.assert_array_equal(digits.validation.images, again.validation.images)
    whole = arrays.load("digits").train
    mask = splits.hold_out(whole.labels, 101)
    # Both parts keep the original order.
    np.testing.assert_array_equal(digits.train.images, whole.images[~mask])
    np.testing.assert_array_equal(digits.validation.images, whole.images[mask])


@pytest.mark.parametrize("count, most", [(1, 1), (4, 2), (7, 3), (9, 5)])
def test_a_class_keeps_its_last_image(count, most):
    """Larger classes give more images once the smaller ones have only one left."""
    labels = np.random.default_rng(0).permutation(np.repeat([5, 7, 8, 9], [1, 2, 4, 6]))
    mask = splits.hold_out(labels, count)
    shares = np.bincount(labels[mask], minlength=10)[[5, 7, 8, 9]]
    assert shares.sum() == mask.sum() == count
    assert shares.max() == most and (shares < [1, 2, 4, 6]).all()
    # Each class gives `most` or `most - 1` images, or all but one.
    assert ((shares >= most - 1) | (shares == np.array([0, 1, 3, 5]))).all()


def test_a_class_that_loses_most_of_its_images_is_named(caplog):
    labels = np.repeat([0, 1], [20, 100])
    splits.hold_out(labels, 20)
    assert not caplog.records
    splits.hold_out(labels, 40)
    assert "more than half of the training images of 1 of 2 classes, such as 19 of 20" in (
        caplog.text
    )


@pytest.mark.parametrize(
    "loss, labels", [("sigmoid", [[0, 1], [1, 1]]), ("pixelwise", [[[0], [255]], [[1], [0]]])]
)
def test_images_with_several_classes_are_held_out(loss, labels, monkeypatch):
    """An image has no class of its own to balance over."""
    monkeypatch.setitem(sources.DATASETS, "own", Own(loss, labels))
    data = arrays.load("own", n_validation=1)
    assert len(data.train.images) == len(data.validation.images) == 1
    many = np.repeat(labels, 10, 0)
    mask = splits.hold_out(many, 15)
    assert mask.shape == (20,) and mask.sum() == 15
    np.testing.assert_array_equal(splits.hold_out(many, 15), mask)
    with pytest.raises(ValueError, match="not between 1 and 19: of the 20 .* images, one is kept$"):
        splits.hold_out(many, 20)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"name": "cifar11"},
            "dataset='cifar11' is not one of digits, mnist, fashion_mnist, cifar10, cifar100, "
            "camvid, camvid_scenes, tfds:NAME, folder",
        ),
        ({"name": "digits", "n_validation": -1}, "n_validation=-1 is not between 1 and 1427"),
        (
            {"name": "digits", "n_validation": 1428},
            "n_validation=1428 is not between 1 and 1427: of the 1437 training images, one of each",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        arrays.load(**arguments)


def test_normalization_is_numpys():
    mean, std = arrays.normalization(IMAGES)
    np.testing.assert_allclose(mean, (IMAGES / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, (IMAGES / 255).std((0, 1, 2)), rtol=1e-6)
