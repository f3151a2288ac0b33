"""CIFAR's pickles, read by an unpickler that runs nothing and builds nothing but arrays.

It subclasses the standard library's unpickler in Python, which is private: files of a few bytes can
make the public one, in C, reserve gigabytes.
"""

import io
import pickle

import numpy as np

from cnnjax.data.published import from_planes
from cnnjax.data.splits import Split
from cnnjax.runtime.errors import one_line


class _Inert:
    """A stand-in for NumPy's objects in a pickle, which keeps their state."""

    state = ()

    def __init__(self, *arguments):
        pass


def _encode_latin1(text, encoding):
    """Stands in for `codecs.encode`, which pickles of Python 3 in protocol 2 call."""
    return text.encode("latin1")


class _ArraysOnly(pickle._Unpickler):
    """An unpickler that builds plain containers and `_Inert` arrays only.

    A file from strangers can neither run code nor reach into memory. Nor can it exhaust memory or
    time:

    - It is the unpickler written in Python. Its memo grows with what is put there, while a file of
      9 bytes can make the unpickler in C reserve gigabytes.
    - It turns tuples into lists. Nested tuples as keys of a dictionary can take exponential time to
      hash.
    """

    _ALLOWED = {
        ("_codecs", "encode"): _encode_latin1,
        ("numpy.core.multiarray", "_reconstruct"): _Inert,
        ("numpy._core.multiarray", "_reconstruct"): _Inert,
        ("numpy", "ndarray"): _Inert,
        ("numpy", "dtype"): _Inert,
    }

    def find_class(self, module, name):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only NumPy arrays are allowed"
            )
        return self._ALLOWED[module, name]

    def _build(self):
        state = self.stack.pop()
        if type(self.stack[-1]) is not _Inert:
            raise pickle.UnpicklingError("it gives a state to an object that is not an array")
        self.stack[-1].state = state

    def _list_to_mark(self):
        # `pop_mark` replaces the stack, so `self.append` is looked up after it.
        items = self.pop_mark()
        self.append(items)

    def _list_of_last(self, count):
        first = len(self.stack) - count
        self.stack[first:] = [self.stack[first:]]

    dispatch = pickle._Unpickler.dispatch | {
        pickle.BUILD[0]: _build,
        pickle.TUPLE[0]: _list_to_mark,
        pickle.EMPTY_TUPLE[0]: lambda self: self._list_of_last(0),
        pickle.TUPLE1[0]: lambda self: self._list_of_last(1),
        pickle.TUPLE2[0]: lambda self: self._list_of_last(2),
        pickle.TUPLE3[0]: lambda self: self._list_of_last(3),
    }
    # A bytearray would be allocated at its declared length before its bytes are read.
    del dispatch[pickle.BYTEARRAY8[0]]


def read_cifar_pickle(data: bytes, name: str, count: int, key: bytes = b"labels") -> Split:
    """Reads a batch in CIFAR's Python layout without running what the pickle holds.

    The layout is a dictionary of an array of bytes and a list of labels.

    Args:
      data: the file's bytes.
      name: the file's name, for errors.
      count: the expected number of images.
      key: the dictionary's key of the labels.

    Raises:
      ValueError: for any other content.
    """
    try:
        batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        labels = batch[key]
        _, shape, _, is_fortran, pixels = batch[b"data"].state
        if shape != [count, 3072] or type(pixels) is not bytes or len(pixels) != count * 3072:
            raise ValueError(f"its pixels are not an array of {count} x 3072 bytes")
        is_list = type(labels) is list and len(labels) == count
        if not is_list or not all(type(label) is int and 0 <= label < 256 for label in labels):
            raise ValueError(f"its labels are not a list of {count} whole numbers from 0 to 255")
    except Exception as error:
        # A damaged pickle can raise any exception.
        reason = one_line(error)
        raise ValueError(
            f"{name} is not a CIFAR batch in the Python layout: {type(error).__name__}: {reason}"
        ) from error
    rows = np.frombuffer(pixels, np.uint8)
    if is_fortran:
        rows = rows.reshape(3072, count).T
    rows = rows.reshape(count, 3072)
    return Split(from_planes(rows), np.asarray(labels, np.int32))
