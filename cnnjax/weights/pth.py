"""PyTorch's .pth files, read and written without PyTorch.

A .pth file is a pickle, and a pickle is a program: it may name any function and have it called. So
Python's `pickle` is not used. `_Interpreter` knows the few opcodes and the few names that a state
dict is made of and refuses everything else; no name is looked up, and nothing in the file is
called.

- Zip format (PyTorch 1.6 and later): `NAME/data.pkl`, and a member `NAME/data/KEY` per storage.
- Legacy format: five pickles (magic number, protocol, system, object, list of storage keys), then
  for each storage a 64-bit count and the raw bytes.
"""

import dataclasses
import mmap
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

_ZIP = b"PK\x03\x04"
# Protocol 2, the magic number as LONG1, STOP.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# A state dict takes about 200 bytes of pickle per tensor. The limit bounds the memory of small
# objects, which is many times the bytes that ask for them.
_MOST_PICKLE_BYTES = 4 << 20
_MOST_NAME_BYTES = 200
_MOST_DIMENSIONS = 16
_MOST_KEY = 2**31  # of the integer keys that optimizers use
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights

_DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_STORAGE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CONSTANTS = (
    "torch.float32",
    "torch.float16",
    "torch.bfloat16",
    "torch.float64",
    "torch.int64",
    "torch.int32",
    "torch.uint8",
    "torch.bool",
)


def is_pth(path: pathlib.Path) -> bool:
    """Whether a file begins as `torch.save` begins it."""
    with path.open("rb") as stream:
        return stream.read(len(_LEGACY)).startswith((_ZIP, _LEGACY))


# ------------------------------------------------------------------ what a state dict is made of


@dataclasses.dataclass(frozen=True)
class _Name:
    """A function, class or constant that the pickle names; it is not looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """`count` numbers of one type, found in the file under `key`."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _are_counts(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and all(_is_count(value) for value in values)


def _rebuild_tensor(storage=None, offset=None, shape=None, strides=None, *rest) -> _Tensor:
    """Makes a tensor. Raises `ValueError` unless it lies inside its storage."""
    if not (isinstance(storage, _Storage) and _is_count(offset)):
        raise ValueError("a tensor has no storage or no offset")
    if not (_are_counts(shape) and _are_counts(strides) and len(shape) == len(strides)):
        raise ValueError("a tensor has no shape or no strides")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor has more than {_MOST_DIMENSIONS} dimensions")
    size = 1
    last = offset
    for length, stride in zip(shape, strides):
        size *= length
        last += (length - 1) * stride
    if size and last >= storage.count:
        raise ValueError(f"a tensor reaches beyond the {storage.count} numbers of its storage")
    # A stride of 0 repeats numbers: what is repeated without end would fill the memory.
    if size > max(storage.count, 2**16):
        raise ValueError(f"a tensor repeats {storage.count} numbers as {size}")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor=None, *rest) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError("a parameter is not a tensor")
    return tensor


def _ordered_dict(pairs=(), *rest) -> dict:
    """Makes a dictionary, of the pairs that Python 2 wrote as an OrderedDict's argument."""
    made: dict = {}
    if not isinstance(pairs, (list, tuple)):
        raise ValueError("an OrderedDict is not made of pairs")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("an OrderedDict is not made of pairs")
        key, value = pair
        made[_checked_key(key)] = value
    return made


def _size(lengths=(), *rest) -> tuple:
    if not _are_counts(lengths):
        raise ValueError("a torch.Size is not made of lengths")
    return tuple(lengths)


_FUNCTIONS: dict[str, Callable] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
    "torch.Size": _size,
}
_NAMES = {*_FUNCTIONS, *_DTYPES, *_CONSTANTS}


def _checked_key(key: Any) -> str | int:
    """Returns a dictionary's key: text or a small number, since hashing others can take forever."""
    if isinstance(key, str) or (_is_count(key) and key < _MOST_KEY):
        return key
    raise ValueError(f"a dictionary has a key of type {type(key).__name__}")


def _storage(identity: Any) -> _Storage:
    """Makes a storage of ('storage', type, key, device, count[, view])."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise ValueError("the pickle refers to something that is not a storage")
    _, kind, key, _, count, *view = identity
    if not isinstance(kind, _Name) or kind.name not in _DTYPES:
        raise ValueError("a storage has an unknown type")
    if not isinstance(key, str) or not _is_count(count):
        raise ValueError("a storage has no key or no count")
    if view and view[0] is not None:
        raise ValueError("a storage is a view of another, as PyTorch before 0.4 wrote them")
    return _Storage(key, _DTYPES[kind.name], count)


# ------------------------------------------------------------------ the pickle


class _Interpreter:
    """Runs the opcodes of pickle's protocol 2 that state dicts are written with."""

    def __init__(self, data: memoryview, at: int = 0):
        self.data = data
        self.at = at
        self.end = min(len(data), at + _MOST_PICKLE_BYTES)
        self.stack: list = []
        self.marked: list[list] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def load(self) -> Any:
        """Runs the pickle and returns its value; `at` is then the position behind it."""
        while True:
            opcode = self._bytes(1)
            if opcode == b".":
                return self._pop()
            self._step(opcode)

    def _step(self, opcode: bytes) -> None:
        push = self.stack.append
        match opcode:
            case b"\x80":  # PROTO
                self._bytes(1)
            case b"N":
                push(None)
            case b"\x88":
                push(True)
            case b"\x89":
                push(False)
            case b"J":  # BININT
                push(self._number("<i"))
            case b"K":  # BININT1
                push(self._number("<B"))
            case b"M":  # BININT2
                push(self._number("<H"))
            case b"\x8a":  # LONG1
                push(int.from_bytes(self._bytes(self._number("<B")), "little", signed=True))
            case b"G":  # BINFLOAT
                push(self._number(">d"))
            case b"X" | b"T":  # BINUNICODE, and BINSTRING of Python 2
                push(self._bytes(self._number("<I")).decode())
            case b"U":  # SHORT_BINSTRING of Python 2
                push(self._bytes(self._number("<B")).decode())
            case b"]":  # EMPTY_LIST
                push([])
            case b"}":  # EMPTY_DICT
                push({})
            case b")":  # EMPTY_TUPLE
                push(())
            case b"\x85" | b"\x86" | b"\x87":  # TUPLE1, TUPLE2, TUPLE3
                items = [self._pop() for _ in range(opcode[0] - 0x84)]
                push(tuple(reversed(items)))
            case b"(":  # MARK
                self.marked.append(self.stack)
                self.stack = []
            case b"t":  # TUPLE
                items = self._pop_to_mark()
                self.stack.append(tuple(items))
            case b"a":  # APPEND
                item = self._pop()
                self._top(list).append(item)
            case b"e":  # APPENDS
                items = self._pop_to_mark()
                self._top(list).extend(items)
            case b"s":  # SETITEM
                value = self._pop()
                key = self._pop()
                self._top(dict)[_checked_key(key)] = value
            case b"u":  # SETITEMS
                items = self._pop_to_mark()
                self._set_items(items)
            case b"q" | b"r":  # BINPUT, LONG_BINPUT
                index = self._number("<B" if opcode == b"q" else "<I")
                self.memo[index] = self._top(object)
            case b"h" | b"j":  # BINGET, LONG_BINGET
                index = self._number("<B" if opcode == b"h" else "<I")
                if index not in self.memo:
                    raise ValueError("the pickle recalls a value that it never stored")
                push(self.memo[index])
            case b"c":  # GLOBAL
                push(self._name())
            case b"R":  # REDUCE
                self._call()
            case b"b":  # BUILD: an OrderedDict's attributes, the modules' versions; not needed
                self._pop()
                self._top(dict)
            case b"Q":  # BINPERSID
                self._refer_to_storage()
            case _:
                raise ValueError(f"the pickle has opcode {opcode!r}, which no state dict needs")

    def _bytes(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise ValueError("the pickle is cut short, or longer than any state dict's")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _line(self) -> str:
        text = bytearray()
        while (byte := self._bytes(1)) != b"\n":
            text += byte
            if len(text) > _MOST_NAME_BYTES:
                raise ValueError(f"the pickle has a name of more than {_MOST_NAME_BYTES} bytes")
        return text.decode()

    def _pop(self) -> Any:
        if not self.stack:
            raise ValueError("the pickle takes a value that it never made")
        return self.stack.pop()

    def _pop_to_mark(self) -> list:
        if not self.marked:
            raise ValueError("the pickle looks for a mark that it never made")
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise ValueError(f"the pickle changes something that is not a {kind.__name__}")
        return self.stack[-1]

    def _set_items(self, items: list) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise ValueError("a dictionary has a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            target[_checked_key(key)] = value

    def _name(self) -> _Name:
        module = self._line()
        name = f"{module}.{self._line()}"
        if name not in _NAMES:
            raise ValueError(
                f"it asks for {name!r}, and only tensors are read; save model.state_dict() alone"
            )
        return _Name(name)

    def _call(self) -> None:
        arguments = self._pop()
        function = self._pop()
        if not isinstance(function, _Name) or function.name not in _FUNCTIONS:
            raise ValueError("the pickle calls something that is not a function")
        if not isinstance(arguments, tuple):
            raise ValueError("the pickle calls a function without a tuple of arguments")
        self.stack.append(_FUNCTIONS[function.name](*arguments))

    def _refer_to_storage(self) -> None:
        storage = _storage(self._pop())
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("a storage has two types or two sizes")
        self.stack.append(storage)


# ------------------------------------------------------------------ reading


def _member(data: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """Returns the bytes of a member of a zip archive, checked against its checksum."""
    header = data[info.header_offset : info.header_offset + 30]
    if info.compress_type != zipfile.ZIP_STORED or len(header) < 30 or header[:4] != _ZIP:
        raise ValueError(f"{info.filename!r} is not stored as torch.save stores it")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length
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
    interpreter = _Interpreter(_member(data, members[pickles[0]]))
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
    storages: dict[str, _Storage] = {}
    for _ in ("protocol", "system", "object", "keys"):
        interpreter = _Interpreter(data, at)
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
    contents: dict[str, memoryview], storages: dict[str, _Storage]
) -> dict[str, memoryview]:
    """Returns the storages' bytes. Raises `ValueError` unless all have the size they should."""
    for key, content in contents.items():
        wanted = storages[key].count * storages[key].dtype.itemsize
        if len(content) != wanted:
            raise ValueError(f"storage {key!r} has {len(content)} bytes instead of {wanted}")
    return contents


def _state_dict(value: Any) -> dict[str, _Tensor]:
    """Returns the tensors by name, taken out of a checkpoint's wrapper."""
    for name in _WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(name), dict):
            value = value[name]
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} instead of a state dict")
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, _Tensor):
            raise ValueError(f"{str(key)[:60]!r} is a {type(tensor).__name__} instead of a tensor")
    return value


def _array(tensor: _Tensor, content: memoryview) -> np.ndarray:
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

    The arrays are read-only views of the mapped file: numbers are read when they are used, and the
    memory taken is bounded by the file's size. Zip and legacy formats are read, a state dict alone
    or under `state_dict`, `model_state_dict` or `model`.

    Raises `ValueError` for anything else.
    """
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
    """Writes a state dict in the zip format of `torch.save`, with the modules' versions."""
    arrays = {str(index): array for index, array in enumerate(tensors.values())}
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
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")
