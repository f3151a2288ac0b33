"""Start-up of the numerical backend: XLA flags, the numerics canary, the compilation cache.

`set_flags` runs on `import cnnjax` and imports nothing heavy; `start` is called once by every
command before it computes.
"""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
import warnings

from cnnjax.runtime.host import cores

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# jaxlib 0.10.2 fuses reductions into YNNPACK on the CPU by default and computes some of them
# wrongly (github.com/jax-ml/jax/issues/39103); 0.11 crashes on others (issues/39257).
# `individual_dot` keeps YNNPACK's matrix products, which are the fastest here, and gives it neither
# reductions nor convolutions.
CPU_FLAG = f"{_FLAG}=individual_dot"
# XLA aborts the process on an unknown flag, so only releases that are known to have it get it.
_FLAG_SINCE = (0, 10, 2)
_FLAG_BEFORE = (0, 13, 0)


def set_flags() -> None:
    """Appends the CPU backend's corrective flag to `XLA_FLAGS`, unless the user set it.

    Warns if jax has started its backend already, which reads the flags once.
    """
    # Of a version such as 0.13.0rc1 or 0.10.2+local, the first three numbers.
    numbers = re.findall(r"\d+", importlib.metadata.version("jaxlib"))
    version = tuple(int(number) for number in numbers[:3])
    if not _FLAG_SINCE <= version < _FLAG_BEFORE or _FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        warnings.warn(
            f"cnnjax was imported after jax had started its backend, so the XLA flag {CPU_FLAG} "
            "can no longer take effect and convolutional training on the CPU may be slow or "
            "wrong: import cnnjax before the first jax computation, or put the flag into XLA_FLAGS",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {CPU_FLAG}".strip()


def check_numerics() -> None:
    """Checks a reduction and a convolution, both known to break, against NumPy.

    Raises:
      RuntimeError: if the results differ.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    # Exact in float32: the last row's squared norm is 2^30 (the case of jax issue 39103).
    rows = np.zeros((32769, 3), np.float32)
    rows[:, 0] = np.arange(32769)
    norm = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    # Small integers, so that every order of summation and every matrix precision gives the same
    # result.
    image = np.arange(2 * 6 * 6 * 3, dtype=np.float32).reshape(2, 6, 6, 3) % 7
    kernel = np.arange(3 * 3 * 3 * 4, dtype=np.float32).reshape(3, 3, 3, 4) % 5
    conv = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    expected = sum(
        np.einsum("nhwi,io->nhwo", image[:, i : i + 4, j : j + 4], kernel[i, j])
        for i in range(3)
        for j in range(3)
    )
    for operation, result, correct in (
        ("reduction", norm[-1], 2.0**30),
        ("convolution", conv(image, kernel), expected),
    ):
        if not np.array_equal(result, correct):
            worst = float(np.max(np.abs(np.asarray(result) - correct)))
            raise RuntimeError(
                f"the {jax.default_backend()} backend of jaxlib "
                f"{importlib.metadata.version('jaxlib')} computes a {operation} wrongly "
                f"(off by {worst:g}; XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}): nothing it "
                "prints can be trusted; unset flags of your own or install another jaxlib"
            )


def _cache_dir() -> pathlib.Path | None:
    """Returns the compilation cache's folder: one per jaxlib, processor and core count.

    It is None for a user without a home folder.

    Code compiled for one processor does not run on another (jax issue 38445), and code compiled for
    one core uses one core everywhere. jax's own cache key contains neither.
    """
    try:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    except RuntimeError:
        return None
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        # All cores repeat these lines.
        models = {line for line in lines if line.startswith(("model name", "flags"))}
        host = "".join(sorted(models))
    except OSError:
        host = platform.processor()
    key = hashlib.sha256(f"{platform.machine()}{host}".encode()).hexdigest()[:12]
    return (
        home / "cnnjax" / "xla" / f"jaxlib-{importlib.metadata.version('jaxlib')}-{key}-{cores()}"
    )


def reach_devices() -> None:
    """Checks that jax finds devices of the platform that JAX_PLATFORMS names.

    Raises:
      RuntimeError: in one line, if it finds none.
    """
    import jax

    try:
        jax.devices()
    # jax raises `AssertionError` for a platform that the installed jaxlib does not have.
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise RuntimeError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: jax finds no such device "
            f"({first or 'no further reason'}); unset it, or set it to cpu"
        ) from error


@functools.cache
def start() -> None:
    """Makes the process ready to compute.

    Turns on the persistent compilation cache and checks the numerics, once.
    """
    import jax

    reach_devices()
    # The user's JAX_COMPILATION_CACHE_DIR takes precedence.
    # jax adds its options when it is imported, so mypy does not know them.
    has_cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not has_cache and (folder := _cache_dir()):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    check_numerics()
