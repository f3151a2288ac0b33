"""PyTorch's .pth files, read and written without PyTorch.

- Zip format (PyTorch 1.6 and later): `NAME/data.pkl`, and a member `NAME/data/KEY` per storage.
- Legacy format: five pickles (magic number, protocol, system, object, list of storage keys), then
  for each storage a 64-bit count and the raw bytes.

The pickles are read by `unpickling`, which runs nothing.
"""

import mmap
import pathlib
import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from cnnjax.weights.unpickling import DTYPES, Interpreter, Storage, Tensor, Unread

_ZIP = b"PK\x03\x04"
# Protocol 2, the magic number as LONG1, STOP.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Where checkpoints keep the weights.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_STORAGE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def is_pth(path: pathlib.Path) -> bool:
    """Tells whether a file begins as `torch.save` begins it."""
    with path.open("rb") as stream:
        return stream.read(len(_LEGACY)).startswith((_ZIP, _LEGACY))


# ------------------------------------------------------------------ reading


def _member(data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """Returns the bytes of a member of a zip archive, checked against its checksum."""
    header = data[info.header_offset : info.header_offset + 30]
    if info.compress_type != zipfile.ZIP_STORED or len(header) < 30 or header[:4] != _ZIP:
        raise ValueError(f"{info.filename!r} is not stored as torch.save stores it")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
    # Slices end with the file, so a size beyond it shows as a short slice.
    content = data[start : start + info.file_size]
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise ValueError(f"{info.filename!r} is damaged")
    return content


def _read_zip(data: memoryview, archive: mmap.mmap) -> tuple[Any, dict[str, memoryview]]:
    try:
        directory = zipfile.ZipFile(archive)  # type: ignore[call-overload]  # mmap is file enough
        members = {info.filename: info for info in directory.infolist()}
    except Exception as error:  # a damaged directory raises errors of nearly every kind
        raise ValueError(f"damaged zip archive: {error}") from error
    # Members may overlap, so that small archives hold many large ones.
    if sum(info.file_size for info in members.values()) > len(data):
        raise ValueError("the archive's members are larger than the archive")
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("a zip archive that torch.save did not write: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in members and _member(data, members[f"{root}byteorder"]) != b"little":
        raise ValueError("its numbers are not little-endian")
    interpreter = Interpreter(_member(data, members[pickles[0]]))
    value = interpreter.load()
    contents = {}
    for key in interpreter.storages:
        if f"{root}data/{key}" not in members:
            raise ValueError(f"storage {key!r} is not in the archive")
        contents[key] = _member(data, members[f"{root}data/{key}"])
    return value, _checked(contents, interpreter.storages)


def _read_legacy(data: memoryview) -> tuple[Any, dict[str, memoryview]]:
    at = len(_LEGACY)
    values = []
    storages: dict[str, Storage] = {}
    for _ in ("protocol", "system", "object", "keys"):
        interpreter = Interpreter(data, at)
        values.append(interpreter.load())
        at = interpreter.at
        storages |= interpreter.storages
    protocol, system, value, keys = values
    if protocol != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("an unknown protocol, or numbers that are not little-endian")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the list of storages is damaged")
    contents = {}
    for key in keys:
        if key not in storages or key in contents or at + 8 > len(data):
            raise ValueError("the list of storages is damaged")
        if int.from_bytes(data[at : at + 8], "little") != storages[key].count:
            raise ValueError(f"storage {key!r} has another size than its tensors say")
        start = at + 8
        at = start + storages[key].count * storages[key].dtype.itemsize
        contents[key] = data[start:at]
    if contents.keys() != storages.keys():
        raise ValueError("the list of storages is damaged")
    return value, _checked(contents, storages)


def _checked(
    contents: dict[str, memoryview], storages: dict[str, Storage]
) -> dict[str, memoryview]:
    """Returns the storages' bytes.

    Raises `ValueError` if a storage has another size than it should.
    """
    for key, content in contents.items():
        wanted = storages[key].count * storages[key].dtype.itemsize
        if len(content) != wanted:
            raise ValueError(f"storage {key!r} has {len(content)} bytes instead of {wanted}")
    return contents


def _describe(value: Any) -> str:
    """Describes what is found in place of tensors, for an error."""
    if isinstance(value, Unread):
        return f"{value.name!r}, and only tensors are read; save model.state_dict() alone"
    return f"a {type(value).__name__}"


def _state_dict(value: Any) -> dict[str, Tensor]:
    """Returns the tensors by name, taken out of a checkpoint's wrappers."""
    # Twice, since a wrapper may hold another one: {"model": {"state_dict": ...}}. A hostile one
    # may hold itself.
    for name in _WRAPPERS * 2:
        if isinstance(value, dict) and isinstance(value.get(name), (dict, Unread)):
            value = value[name]
    if not isinstance(value, dict):
        raise ValueError(f"expected a state dict; it holds {_describe(value)}")
    for key, tensor in value.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"expected tensors, alone or under one of the keys {', '.join(_WRAPPERS)}; "
                f"{key[:60]!r} is {_describe(tensor)}"
            )
    return value


def _array(tensor: Tensor, content: memoryview) -> np.ndarray:
    """Returns a tensor as an array on the file's bytes."""
    dtype = tensor.storage.dtype
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    return np.ndarray(
        tensor.shape,
        dtype,
        buffer=content,
        offset=tensor.offset * dtype.itemsize,
        strides=[stride * dtype.itemsize for stride in tensor.strides],
    )


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the state dict of a .pth file; nothing in the file can run code.

    The arrays are read-only views of the mapped file: numbers are read on use, and the file's size
    bounds the memory. The formats are zip and legacy, with a state dict alone or in a checkpoint,
    under `state_dict`, `model_state_dict`, `model` or `net`. What else a checkpoint holds is passed
    over.

    Raises `ValueError` if there is no state dict, or if it holds anything but tensors.
    """
    # Mapped rather than read: a converted copy of each tensor is made anyway, and pages of a mapped
    # file are given back when memory is short.
    with path.open("rb") as stream:
        archive = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    data = memoryview(archive)
    is_zip = bytes(data[: len(_ZIP)]) == _ZIP
    value, contents = _read_zip(data, archive) if is_zip else _read_legacy(data)
    tensors = _state_dict(value)
    return {key: _array(tensor, contents[tensor.storage.key]) for key, tensor in tensors.items()}


# ------------------------------------------------------------------ writing


def _text(text: str) -> bytes:
    content = text.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def _integer(number: int) -> bytes:
    if number < 2**31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x09" + number.to_bytes(9, "little")


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _pickled_dict(items: dict[str, bytes]) -> bytes:
    """Returns the opcodes of an OrderedDict whose values are opcodes."""
    pairs = b"".join(_text(key) + value for key, value in items.items())
    return _name("collections", "OrderedDict") + b")R(" + pairs + b"u"


def _pickled_tensor(key: str, array: np.ndarray) -> bytes:
    module, storage_type = _STORAGE_NAMES[array.dtype].split(".")
    storage = _tuple(
        _text("storage"),
        _name(module, storage_type),
        _text(key),
        _text("cpu"),
        _integer(array.size),
    )
    strides = [stride // array.itemsize for stride in array.strides]
    arguments = _tuple(
        storage + b"Q",
        _integer(0),
        _tuple(*map(_integer, array.shape)),
        _tuple(*map(_integer, strides)),
        b"\x89",  # requires_grad=False
        _pickled_dict({}),
    )
    return _name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _pickled_versions(keys: list[str]) -> bytes:
    """Returns the opcodes of `_metadata`, the version of every module of a state dict.

    torchvision's MNASNet refuses a file that does not say 2 for the whole network; the other
    networks do not look. PyTorch's BatchNorm has counters since version 2.
    """
    has_counter = {key.rpartition(".")[0] for key in keys if key.endswith("num_batches_tracked")}
    versions = {"": 2}
    for key in keys:
        module = key.rpartition(".")[0]
        versions[module] = 2 if module in has_counter else 1
    pickled = {
        module: b"}" + _text("version") + _integer(version) + b"s"
        for module, version in versions.items()
    }
    return _pickled_dict(pickled)


def write(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes a state dict in the zip format of `torch.save`, with module versions."""
    # Strides are written beside the bytes. `ascontiguousarray` would turn a scalar into a vector.
    contiguous = [np.asarray(array, order="C") for array in tensors.values()]
    arrays = {str(index): array for index, array in enumerate(contiguous)}
    pickled = {
        name: _pickled_tensor(key, array) for name, (key, array) in zip(tensors, arrays.items())
    }
    attributes = b"}" + _text("_metadata") + _pickled_versions(list(tensors)) + b"s"
    program = b"\x80\x02" + _pickled_dict(pickled) + attributes + b"b."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for key, array in arrays.items():
            info = zipfile.ZipInfo(f"archive/data/{key}")
            info.file_size = array.nbytes
            with archive.open(info, "w") as stream:
                stream.write(array.reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")
