"""The form of operations: plain lax calls, or forms for XLA's CPU backend."""

import contextlib

import jax

FORMS = ("auto", "reference", "cpu", "onnx")
# A user context is part of jit's cache key: a function is traced again when the form changes.
_FORM = jax.make_user_context("auto")


def lowering(form: str) -> contextlib.AbstractContextManager:
    """Chooses the form of the operations that are traced inside a `with` block.

    Values and gradients are the same in every form, up to the rounding of sums. Only values that
    are not finite spread further on the CPU: to neighboring groups and positions, where they are
    multiplied by zeros.

    Args:
      form: "auto" takes the forms of `cnnjax.nn.cpu` where jax's default backend is the CPU,
        "reference" plain lax calls everywhere, "cpu" the forms of `cnnjax.nn.cpu` everywhere.
        "onnx" is "reference" with pools as sums and maxima of shifted views: jax2onnx does not
        convert `lax.reduce_window` to a pool that onnxruntime runs.

    Raises `ValueError` if `form` is none of these.
    """
    if form not in FORMS:
        raise ValueError(f"lowering={form!r} is not one of {', '.join(FORMS)}")
    return _FORM(form)


def uses_cpu_forms() -> bool:
    """Tells whether operations are traced in the forms of `cnnjax.nn.cpu`."""
    if _FORM.value == "auto":
        return jax.default_backend() == "cpu"
    return _FORM.value == "cpu"


def unrolls_pools() -> bool:
    """Tells whether pools are traced as sums and maxima of shifted views."""
    return _FORM.value == "onnx" or uses_cpu_forms()
