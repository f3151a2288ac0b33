"""oneDNN's convolutions as a side of the benchmarks.

oneDNN 3 is the library behind PyTorch's convolutions on CPUs. Compiled programs call it through
`jax.ffi`. Its C interface is called by ctypes, so that nothing has to be compiled: XLA calls a
Python function for each convolution, and that function calls the library, which takes maps in NHWC
and kernels in an order of its own. The names of structures and functions are those of `dnnl.h` and
of `xla/ffi/api/c_api.h`. Float32 only.
"""

import contextlib
import ctypes
import functools
import os
import threading
import traceback
from ctypes import POINTER, c_int, c_int64, c_size_t, c_void_p

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.benchmark.cases import ONEDNN_LIBRARY
from cnnjax.nn import Conv, add_bias
from cnnjax.nn.geometry import Both, Window, pair

_TARGET = "cnnjax_onednn_convolution"
_FORWARD, _INPUT_GRADIENT, _KERNEL_GRADIENT = range(3)  # passes

# ------------------------------------------------------------------ oneDNN

# Values of dnnl_types.h.
_CPU = _IN_ORDER = _ANY_FORMAT = _DIRECT = 1
_FLOAT32 = 3
_FORWARD_TRAINING = 64
_QUERY_ARGUMENT = 255
_SRC, _DST, _WEIGHTS, _DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS = 1, 17, 33, 129, 145, 161
_ARGUMENTS = {  # of each pass: two inputs and the result
    _FORWARD: (_SRC, _WEIGHTS, _DST),
    _INPUT_GRADIENT: (_DIFF_DST, _WEIGHTS, _DIFF_SRC),
    _KERNEL_GRADIENT: (_SRC, _DIFF_DST, _DIFF_WEIGHTS),
}


class _Argument(ctypes.Structure):
    _fields_ = [("arg", c_int), ("memory", c_void_p)]


@functools.cache
def load(path: str) -> ctypes.CDLL:
    """Loads the library.

    Raises `OSError` if it is not oneDNN.
    """
    library = ctypes.CDLL(path)
    if not hasattr(library, "dnnl_convolution_forward_primitive_desc_create"):
        raise OSError(f"{path} does not export the functions of oneDNN")
    library.dnnl_primitive_desc_query_md.restype = c_void_p
    library.dnnl_memory_desc_get_size.restype = c_size_t
    return library


class Primitive:
    """One pass of a convolution, prepared for one thread.

    Args:
      convolution_pass: 0 for the forward pass, 1 for the input's gradient, 2 for the kernel's.
      x_shape: [batch, height, width, in].
      kernel_shape: [rows, columns, in / groups, out].
      window: the kernel's stride, padding and dilation.
      groups: number of groups.

    Raises `RuntimeError` if the library does not support it.
    """

    def __init__(
        self,
        convolution_pass: int,
        x_shape: tuple[int, ...],
        kernel_shape: tuple[int, ...],
        window: Window,
        groups: int,
    ):
        self._library = load(os.environ[ONEDNN_LIBRARY])
        self._engine = self._create("dnnl_engine_create", _CPU, c_size_t(0))
        self._stream = self._create("dnnl_stream_create", self._engine, _IN_ORDER)
        description = self._describe(convolution_pass, x_shape, kernel_shape, window, groups)
        names = _ARGUMENTS[convolution_pass]
        formats = {
            name: c_void_p(
                self._library.dnnl_primitive_desc_query_md(description, _QUERY_ARGUMENT, name)
            )
            for name in names
        }
        memories = {name: self._memory(form) for name, form in formats.items()}
        weights = names[2] if convolution_pass == _KERNEL_GRADIENT else _WEIGHTS
        library_format = formats[weights]
        hwio_format = self._kernel_format(kernel_shape, groups)
        # The kernel is put into the library's format in memory of this primitive.
        self._kernel = np.empty(self._library.dnnl_memory_desc_get_size(library_format), np.uint8)
        self._set(memories[weights], self._kernel.ctypes.data)
        callers_kernel = self._memory(hwio_format)
        convolution = self._step(description, memories)
        # The caller's kernel is HWIO: it is reordered before a pass that reads it, and the gradient
        # after the pass that writes it.
        if convolution_pass == _KERNEL_GRADIENT:
            reorder = self._reorder(library_format, hwio_format, memories[weights], callers_kernel)
            self._steps = [convolution, reorder]
        else:
            reorder = self._reorder(hwio_format, library_format, callers_kernel, memories[weights])
            self._steps = [reorder, convolution]
        self._memories = [callers_kernel if name == weights else memories[name] for name in names]

    def __call__(self, *addresses: int) -> None:
        """Computes from two inputs into a result, all float32.

        Arguments are the addresses of the values.
        """
        for memory, address in zip(self._memories, addresses):
            self._set(memory, address)
        for primitive, arguments in self._steps:
            self._check(
                self._library.dnnl_primitive_execute(
                    primitive, self._stream, len(arguments), arguments
                )
            )

    def _describe(self, convolution_pass, x_shape, kernel_shape, window, groups) -> c_void_p:
        batch, height, width, inputs = x_shape
        rows_out, columns_out = window.output_shape(x_shape, kernel_shape[:2])
        x = self._map_format(batch, height, width, inputs)
        y = self._map_format(batch, rows_out, columns_out, kernel_shape[3])
        kernel_dims = _kernel_dims(kernel_shape, groups)
        kernel = self._create(
            "dnnl_memory_desc_create_with_tag",
            len(kernel_dims),
            _dims(kernel_dims),
            _FLOAT32,
            _ANY_FORMAT,
        )
        after = _padding_after((height, width), kernel_shape[:2], (rows_out, columns_out), window)
        dilation = [amount - 1 for amount in window.dilation]
        geometry = [_dims(part) for part in (window.stride, dilation, window.padding, after)]
        name = "dnnl_convolution_{}_primitive_desc_create"
        forward = self._create(
            name.format("forward"),
            self._engine,
            _FORWARD_TRAINING,
            _DIRECT,
            *(x, kernel, None, y),
            *geometry,
            None,
        )
        tensors: tuple
        if convolution_pass == _INPUT_GRADIENT:
            tensors = (x, kernel, y)
            name = name.format("backward_data")
        elif convolution_pass == _KERNEL_GRADIENT:
            tensors = (x, kernel, None, y)
            name = name.format("backward_weights")
        else:
            return forward
        return self._create(name, self._engine, _DIRECT, *tensors, *geometry, forward, None)

    def _reorder(self, source, target, source_memory, target_memory) -> tuple:
        engine = self._engine
        description = self._create(
            "dnnl_reorder_primitive_desc_create", source, engine, target, engine, None
        )
        return self._step(description, {_SRC: source_memory, _DST: target_memory})

    def _step(self, description, memories) -> tuple:
        """Makes a primitive and the arguments for executing it."""
        arguments = [_Argument(name, memory) for name, memory in memories.items()]
        primitive = self._create("dnnl_primitive_create", description)
        return primitive, (_Argument * len(arguments))(*arguments)

    def _map_format(self, batch, height, width, channels) -> c_void_p:
        strides = (height * width * channels, 1, width * channels, channels)
        return self._format((batch, channels, height, width), strides)

    def _kernel_format(self, kernel_shape, groups) -> c_void_p:
        _, columns, depth, outputs = kernel_shape
        strides: tuple = (1, outputs, columns * depth * outputs, depth * outputs)
        if groups > 1:
            strides = (outputs // groups, *strides)
        return self._format(_kernel_dims(kernel_shape, groups), strides)

    def _format(self, dims, strides) -> c_void_p:
        name = "dnnl_memory_desc_create_with_strides"
        return self._create(name, len(dims), _dims(dims), _FLOAT32, _dims(strides))

    def _memory(self, form) -> c_void_p:
        return self._create("dnnl_memory_create", form, self._engine, None)

    def _set(self, memory, address: int) -> None:
        self._check(self._library.dnnl_memory_set_data_handle(memory, c_void_p(address)))

    def _create(self, name: str, *arguments) -> c_void_p:
        result = c_void_p()
        self._check(getattr(self._library, name)(ctypes.byref(result), *arguments), name)
        return result

    def _check(self, status: int, name: str = "a call") -> None:
        if status:
            raise RuntimeError(f"{name} of oneDNN failed with status {status}")


def _padding_after(shape, taps, outputs, window: Window) -> list[int]:
    """Returns the padding below and to the right that fits the outputs exactly.

    The library demands it: where no window reaches the last positions, it is less than that above
    and to the left, or negative.

    Args:
      shape: (height, width) of the input.
      taps: (rows, columns) of the kernel.
      outputs: (height, width) of the output.
      window: the kernel's stride, padding and dilation.
    """
    after = []
    for axis in range(2):
        kernel_reach = window.dilation[axis] * (taps[axis] - 1) + 1
        reach = (outputs[axis] - 1) * window.stride[axis] + kernel_reach
        after.append(reach - shape[axis] - window.padding[axis])
    return after


def _dims(values) -> ctypes.Array:
    # DNNL_MAX_NDIMS
    return (c_int64 * 12)(*values)


def _kernel_dims(kernel_shape, groups) -> tuple[int, ...]:
    rows, columns, depth, outputs = kernel_shape
    if groups == 1:
        return outputs, depth, rows, columns
    return groups, outputs // groups, depth, rows, columns


# ------------------------------------------------------------------ XLA


class _Struct(ctypes.Structure):
    """The fields with which most structures of the interface begin."""

    _fields_ = [("struct_size", c_size_t), ("extension", c_void_p)]


class _Buffer(_Struct):
    _fields_ = [("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", c_void_p)]


class _Buffers(_Struct):
    _fields_ = [
        ("size", c_int64),
        ("types", c_void_p),
        ("buffers", POINTER(POINTER(_Buffer))),
    ]


class _Text(ctypes.Structure):
    _fields_ = [("ptr", c_void_p), ("len", c_size_t)]


class _Attributes(_Struct):
    _fields_ = [
        ("size", c_int64),
        ("types", c_void_p),
        ("names", c_void_p),
        ("attributes", POINTER(POINTER(_Text))),
    ]


class _Version(_Struct):
    _fields_ = [("major", c_int), ("minor", c_int)]


class _Api(_Struct):
    _fields_ = [("version", _Version)]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("version", _Version)]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("type", c_int),
        ("next", c_void_p),
        ("metadata", POINTER(_Metadata)),
    ]


class _Frame(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


@functools.cache
def _primitive(case: str, thread: int) -> Primitive:
    """Returns a thread's own primitive, since one must not run twice at the same time."""
    convolution_pass, *numbers = map(int, case.split())
    # Stride, padding and dilation, each for rows and columns.
    s_rows, s_columns, p_rows, p_columns, d_rows, d_columns, groups = numbers[8:]
    window = Window(
        stride=(s_rows, s_columns), padding=(p_rows, p_columns), dilation=(d_rows, d_columns)
    )
    return Primitive(convolution_pass, tuple(numbers[:4]), tuple(numbers[4:8]), window, groups)


@ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))
def _handle(frame):
    """Answers a call of a compiled program."""
    frame = frame.contents
    if frame.extension:  # XLA asks once which version of the interface this is for.
        asked = frame.extension.contents.metadata.contents.version
        own = frame.api.contents.version
        asked.major, asked.minor = own.major, own.minor
        return None
    try:
        text = frame.attributes.attributes[0].contents
        case = ctypes.string_at(text.ptr, text.len).decode()
        buffers = frame.arguments.buffers
        _primitive(case, threading.get_ident())(
            buffers[0].contents.data,
            buffers[1].contents.data,
            frame.results.buffers[0].contents.data,
        )
    except BaseException:
        # An error cannot be raised through XLA, and the result would be wrong.
        traceback.print_exc()
        os._exit(1)
    return None


@functools.cache
def _register() -> None:
    address = ctypes.cast(_handle, c_void_p).value
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(address), platform="cpu")


def _call(convolution_pass, x_shape, kernel_shape, window, groups, result_shape, *tensors):
    _register()
    geometry = (*window.stride, *window.padding, *window.dilation)
    numbers = (convolution_pass, *x_shape, *kernel_shape, *geometry, groups)
    case = " ".join(map(str, numbers))
    # Made here first, so that an error can be raised.
    _primitive(case, threading.get_ident())
    result = jax.ShapeDtypeStruct(result_shape, jnp.float32)
    return jax.ffi.ffi_call(_TARGET, result)(*tensors, case=case)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, window, groups):
    height, width = window.output_shape(x.shape, kernel.shape[:2])
    shape = (x.shape[0], height, width, kernel.shape[3])
    return _call(_FORWARD, x.shape, kernel.shape, window, groups, shape, x, kernel)


def _convolve_forward(x, kernel, window, groups):
    return _convolve(x, kernel, window, groups), (x, kernel)


def _convolve_backward(window, groups, saved, dy):
    x, kernel = saved
    shapes = (x.shape, kernel.shape, window, groups)
    dx = _call(_INPUT_GRADIENT, *shapes, x.shape, dy, kernel)
    dkernel = _call(_KERNEL_GRADIENT, *shapes, kernel.shape, x, dy)
    return dx, dkernel


_convolve.defvjp(_convolve_forward, _convolve_backward)


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: Both = 1,
    padding: Both = 0,
    dilation: Both = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolves float32 maps, as `cnnjax.nn.conv` does with zero padding.

    Raises `TypeError` if a type is not float32.
    """
    if x.dtype != jnp.float32 or kernel.dtype != jnp.float32:
        raise TypeError(f"{x.dtype} and {kernel.dtype}: oneDNN is called for float32 only")
    window = Window(
        stride=pair(stride, "stride", 1),
        padding=pair(padding, "padding", 0),
        dilation=pair(dilation, "dilation", 1),
    )
    return _convolve(x, kernel, window, groups)


# ------------------------------------------------------------------ networks


def _replace(next_method, arguments, options, context):
    layer = context.module
    if not isinstance(layer, Conv) or layer.is_initializing() or layer.fill != "zeros":
        return next_method(*arguments, **options)
    y = conv(
        arguments[0],
        layer.get_variable("params", "kernel"),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    return add_bias(y, layer.get_variable("params", "bias")) if layer.use_bias else y


def replaced() -> contextlib.AbstractContextManager[None]:
    """Traces every convolution of a network as a call of oneDNN, within the context."""
    return nn.intercept_methods(_replace)
