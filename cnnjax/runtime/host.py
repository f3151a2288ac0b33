"""What results and times depend on: versions, processor, devices."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform


def cores() -> int:
    """Counts the CPU cores that this process may use."""
    # macOS and Windows have no `sched_getaffinity`.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> dict[str, str]:
    """Returns the versions of the packages on which results depend, if they are installed."""
    versions = {}
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")
    # Installations without extras lack these: studies fit with scikit-learn, and read photographs
    # included in it and in scikit-image.
    extras = ("scikit-learn", "scikit-image", "pillow")
    for name in packages + extras:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def processor_name() -> str:
    """Names the processor's model."""
    # On systems without this file, such as macOS, ask Python.
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def machine() -> dict:
    """Describes what times depend on: processor, device, and jax's version."""
    import jax

    return {
        "processor": processor_name(),
        "threads": cores(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def describe() -> dict:
    """Describes the environment that produces a result: versions, devices, flags."""
    import jax

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "cpus": cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        # jax adds its options when it is imported, so mypy does not know them.
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    }
