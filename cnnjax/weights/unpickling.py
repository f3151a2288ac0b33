"""A pickle's state dict, read without running the pickle.

A pickle is a program: it may name any function and have it called. So Python's `pickle` is not
used. `Interpreter` knows the few opcodes that occur in checkpoints and refuses all others. Of the
names, it knows those that tensors are made with; objects of any other become `Unread`, which keeps
nothing. No name is looked up, and nothing in the file is called.
"""

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# A state dict takes about 200 bytes of pickle per tensor. The limit bounds the memory of small
# objects, which take many times the bytes that describe them.
_MOST_PICKLE_BYTES = 4 << 20
_MOST_NAME_BYTES = 200
_MOST_DIMENSIONS = 16

DTYPES = {
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


# ------------------------------------------------------------------ what a state dict is made of


@dataclasses.dataclass(frozen=True)
class _Name:
    """A known function, class or constant that the pickle names; it is not looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class Unread:
    """Stands for an unknown function or class, and for all that is made with it.

    Beside the weights, a checkpoint may hold any objects, such as the command's options. What the
    pickle adds to such an object is dropped.
    """

    name: str

    def append(self, item: Any) -> None:
        """Drops an item of a list."""

    def extend(self, items: Any) -> None:
        """Drops items of a list."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Drops an item of a dictionary."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """`count` numbers of one type, found in the file under `key`."""

    key: str
    dtype: np.dtype
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _are_counts(values: Any) -> bool:
    return isinstance(values, (tuple, list)) and all(_is_count(value) for value in values)


def _rebuild_tensor(storage=None, offset=None, shape=None, strides=None, *rest) -> Tensor:
    """Makes a tensor.

    Raises `ValueError` if it does not lie inside its storage.
    """
    if not (isinstance(storage, Storage) and _is_count(offset)):
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
    # A stride of 0 repeats numbers; without a limit, the repetitions would fill the memory.
    if size > max(storage.count, 2**16):
        raise ValueError(f"a tensor repeats {storage.count} numbers as {size}")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor=None, *rest) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter is not a tensor")
    return tensor


def _ordered_dict(pairs=(), *rest) -> dict:
    """Makes a dictionary from the pairs that Python 2 passed to OrderedDict."""
    made: dict = {}
    if not isinstance(pairs, (list, tuple)):
        raise ValueError("an OrderedDict is not made of pairs")
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("an OrderedDict is not made of pairs")
        _put(made, *pair)
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
_NAMES = {*_FUNCTIONS, *DTYPES, *_CONSTANTS}


def _put(target: dict | Unread, key: Any, value: Any) -> None:
    """Puts an item into a dictionary if its key is text; drops it otherwise.

    A state dict has no other keys. Optimizers, whose state lies beside the weights, number their
    parameters; before PyTorch 1.6, by their addresses in memory. Such keys are not hashed, since
    hashing a hostile one can take forever.
    """
    if isinstance(key, str):
        target[key] = value


def _storage(identity: Any) -> Storage:
    """Makes a storage from ('storage', type, key, device, count[, view])."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise ValueError("the pickle refers to something that is not a storage")
    _, kind, key, _, count, *view = identity
    if not isinstance(kind, _Name) or kind.name not in DTYPES:
        raise ValueError("a storage has an unknown type")
    if not isinstance(key, str) or not _is_count(count):
        raise ValueError("a storage has no key or no count")
    if view and view[0] is not None:
        raise ValueError("a storage is a view of another, as PyTorch before 0.4 wrote them")
    return Storage(key, DTYPES[kind.name], count)


# ------------------------------------------------------------------ the pickle


class Interpreter:
    """Runs the opcodes of pickle's protocol 2 that state dicts are written with."""

    def __init__(self, data: memoryview, at: int = 0):
        self.data = data
        self.at = at
        self.end = min(len(data), at + _MOST_PICKLE_BYTES)
        self.stack: list = []
        self.marked: list[list] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """Runs the pickle and returns its value; `at` is then the position after it."""
        while True:
            opcode = self._bytes(1)
            if opcode == b".":
                return self._pop()
            if opcode not in _STEPS:
                raise ValueError(f"the pickle has opcode {opcode!r}, which no state dict needs")
            _STEPS[opcode](self)

    def _bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("the pickle is cut short")
        if count > self.end - self.at:
            raise ValueError(
                f"the pickle is longer than {_MOST_PICKLE_BYTES >> 20} MiB, more than any state "
                "dict needs; save model.state_dict() alone"
            )
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

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _push_integer(self) -> None:
        content = self._bytes(self._number("<B"))
        self._push(int.from_bytes(content, "little", signed=True))

    def _push_text(self, form: str) -> None:
        """Pushes the text that follows its length, a number of struct's format `form`."""
        self._push(self._bytes(self._number(form)).decode())

    def _push_tuple(self, length: int) -> None:
        items = [self._pop() for _ in range(length)]
        self._push(tuple(reversed(items)))

    def _pop(self) -> Any:
        if not self.stack:
            raise ValueError("the pickle takes a value that it never made")
        return self.stack.pop()

    def _mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _pop_to_mark(self) -> list:
        if not self.marked:
            raise ValueError("the pickle looks for a mark that it never made")
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], (kind, Unread)):
            raise ValueError(f"the pickle changes something that is not a {kind.__name__}")
        return self.stack[-1]

    def _push_marked_tuple(self) -> None:
        items = self._pop_to_mark()
        self._push(tuple(items))

    def _append(self) -> None:
        item = self._pop()
        self._top(list).append(item)

    def _extend(self) -> None:
        items = self._pop_to_mark()
        self._top(list).extend(items)

    def _set_item(self) -> None:
        value = self._pop()
        key = self._pop()
        _put(self._top(dict), key, value)

    def _set_items(self) -> None:
        items = self._pop_to_mark()
        target = self._top(dict)
        if len(items) % 2:
            raise ValueError("a dictionary has a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            _put(target, key, value)

    def _store(self, form: str) -> None:
        index = self._number(form)
        self.memo[index] = self._top(object)

    def _recall(self, form: str) -> None:
        index = self._number(form)
        if index not in self.memo:
            raise ValueError("the pickle recalls a value that it never stored")
        self._push(self.memo[index])

    def _name(self) -> _Name | Unread:
        module = self._line()
        name = f"{module}.{self._line()}"
        return _Name(name) if name in _NAMES else Unread(name)

    def _call(self) -> None:
        arguments = self._pop()
        function = self._pop()
        if not isinstance(arguments, tuple):
            raise ValueError("the pickle calls a function without a tuple of arguments")
        if isinstance(function, Unread):
            self._push(function)
            return
        if not isinstance(function, _Name) or function.name not in _FUNCTIONS:
            raise ValueError("the pickle calls something that is not a function")
        self._push(_FUNCTIONS[function.name](*arguments))

    def _make_object(self) -> None:
        """Leaves an unknown class, which stands for its objects, and drops the arguments."""
        self._pop()
        if not self.stack or not isinstance(self.stack[-1], Unread):
            raise ValueError("the pickle makes an object of something that is not a class")

    def _set_attributes(self) -> None:
        """Drops attributes, such as an OrderedDict's versions of modules; none are needed."""
        self._pop()
        self._top(dict)

    def _refer_to_storage(self) -> None:
        storage = _storage(self._pop())
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("a storage has two types or two sizes")
        self._push(storage)


# What each opcode does; STOP ends the pickle (see `load`).
_STEPS: dict[bytes, Callable[[Interpreter], Any]] = {
    b"\x80": lambda self: self._bytes(1),  # PROTO
    b"N": lambda self: self._push(None),
    b"\x88": lambda self: self._push(True),
    b"\x89": lambda self: self._push(False),
    b"J": lambda self: self._push(self._number("<i")),  # BININT
    b"K": lambda self: self._push(self._number("<B")),  # BININT1
    b"M": lambda self: self._push(self._number("<H")),  # BININT2
    b"\x8a": Interpreter._push_integer,  # LONG1
    b"G": lambda self: self._push(self._number(">d")),  # BINFLOAT
    b"X": lambda self: self._push_text("<I"),  # BINUNICODE
    b"T": lambda self: self._push_text("<I"),  # BINSTRING of Python 2
    b"U": lambda self: self._push_text("<B"),  # SHORT_BINSTRING of Python 2
    b"]": lambda self: self._push([]),  # EMPTY_LIST
    b"}": lambda self: self._push({}),  # EMPTY_DICT
    b")": lambda self: self._push(()),  # EMPTY_TUPLE
    b"\x85": lambda self: self._push_tuple(1),  # TUPLE1
    b"\x86": lambda self: self._push_tuple(2),  # TUPLE2
    b"\x87": lambda self: self._push_tuple(3),  # TUPLE3
    b"(": Interpreter._mark,  # MARK
    b"t": Interpreter._push_marked_tuple,  # TUPLE
    b"a": Interpreter._append,  # APPEND
    b"e": Interpreter._extend,  # APPENDS
    b"s": Interpreter._set_item,  # SETITEM
    b"u": Interpreter._set_items,  # SETITEMS
    b"q": lambda self: self._store("<B"),  # BINPUT
    b"r": lambda self: self._store("<I"),  # LONG_BINPUT
    b"h": lambda self: self._recall("<B"),  # BINGET
    b"j": lambda self: self._recall("<I"),  # LONG_BINGET
    b"c": lambda self: self._push(self._name()),  # GLOBAL
    b"R": Interpreter._call,  # REDUCE
    b"\x81": Interpreter._make_object,  # NEWOBJ
    b"b": Interpreter._set_attributes,  # BUILD
    b"Q": Interpreter._refer_to_storage,  # BINPERSID
}
