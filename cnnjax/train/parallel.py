"""Run a per-device function: by `jit` on one device, else `pmap` or `shard_map`.

No other module depends on which of them is used. A per-device function takes the axis name (None
on one device) and then arguments of three kinds:

- replicated: the same on every device (the state, the data set); `replicate` places them.
- shared: divided over the devices along their first axis (batches); `share` places them.
- plain: host values.

Whichever way is used, each device has its own gradients until the function averages them.
"""

import functools
import math
from collections.abc import Callable

import flax.jax_utils
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
WAYS = ("auto", "jit", "pmap", "shard_map")


def _automatic_way() -> str:
    if jax.device_count() == 1:
        return "jit"
    return "pmap" if hasattr(jax, "pmap") else "shard_map"


def _gather_arrays(array: np.ndarray | np.integer) -> np.ndarray:
    """Collects one array from each process, on every process, along a new first axis."""
    try:
        return multihost_utils.process_allgather(array)
    except ValueError as error:
        # jaxlib's error for a peer that is gone.
        raise RuntimeError(str(error)) from error


class Parallel:
    """Places values on the devices and compiles functions of them, in one of `WAYS`.

    "auto" is `jit` on one device and `pmap` on several, or `shard_map` where jax has no `pmap`.

    Attributes:
      way: "jit", "pmap" or "shard_map".
      size: the number of devices, of all processes together.
      axis_name: the name of the axis of devices; None on one device.

    Raises:
      ValueError: for another way, for "jit" with several processes, and for "pmap" where jax has
        none.
    """

    def __init__(self, way: str = "auto"):
        if way not in WAYS:
            raise ValueError(f"parallel={way!r} is not one of {', '.join(WAYS)}")
        if way == "pmap" and not hasattr(jax, "pmap"):
            raise ValueError("parallel='pmap': this jax has no pmap; use 'shard_map' or 'auto'")
        self.way = _automatic_way() if way == "auto" else way
        if self.way == "jit" and jax.process_count() > 1:
            raise ValueError(
                f"parallel='jit' runs on one device of one process, and there are "
                f"{jax.process_count()} processes"
            )
        self.size = 1
        self.axis_name = None
        if self.way != "jit":
            self.size = jax.device_count()
            self.axis_name = AXIS
        if self.way == "shard_map":
            mesh = Mesh(np.array(jax.devices()), (AXIS,))
            self._everywhere = NamedSharding(mesh, PartitionSpec())
            self._divided = NamedSharding(mesh, PartitionSpec(AXIS))

    def __eq__(self, other):
        return isinstance(other, Parallel) and self.way == other.way

    def __hash__(self):
        return hash(self.way)

    def round_up(self, batch_size: int) -> int:
        """Rounds a batch size up to a multiple of the devices, which share it evenly."""
        return math.ceil(batch_size / self.size) * self.size

    @staticmethod
    def gather(number: int) -> list[int]:
        """Collects one number from each process, on every process.

        What depends on a clock or a signal must be decided from these, so that all processes decide
        the same.

        Raises:
          RuntimeError: if another process is gone.
        """
        if jax.process_count() == 1:
            return [number]
        return _gather_arrays(np.int32(number)).ravel().tolist()

    @staticmethod
    def from_first_process(numbers: list[float]) -> list[float]:
        """Returns the numbers of the first process, on every process.

        Every process computes the scores by itself, and their last bits may differ. What depends on
        scores must be decided from these, so that all processes decide the same.

        Raises:
          RuntimeError: if another process is gone.
        """
        if jax.process_count() == 1:
            return numbers
        # As pairs of int32, since jax would round float64 to float32.
        bits = np.array(numbers, np.float64).view(np.int32)
        return _gather_arrays(bits)[0].view(np.float64).tolist()

    def replicate(self, tree):
        """Places host or device arrays on every device."""
        if self.way == "jit":
            return jax.device_put(tree)
        if self.way == "pmap":
            return flax.jax_utils.replicate(tree)

        def place(x):
            return jax.make_array_from_process_local_data(
                self._everywhere, np.asarray(x), np.shape(x)
            )

        return jax.tree.map(place, tree)

    def share(self, tree):
        """Divides this process's part of a batch over its devices.

        Args:
          tree: host arrays; the length of their first axis is a multiple of the number of devices.
        """
        if self.way == "jit":
            return jax.device_put(tree)
        if self.way == "pmap":
            count = jax.local_device_count()
            return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)
        place = functools.partial(jax.make_array_from_process_local_data, self._divided)
        return jax.tree.map(place, tree)

    def fetch(self, tree):
        """Copies a replicated tree to the host."""

        def first(x):
            shard = np.asarray(x.addressable_shards[0].data)
            return shard[0] if self.way == "pmap" else shard

        return jax.tree.map(first, tree)

    def fetch_shared(self, tree):
        """Copies this process's part of a divided tree to the host, in order."""

        def join(x):
            shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            parts = [np.asarray(shard.data) for shard in shards]
            if self.way == "pmap":
                parts = [part.reshape(-1, *part.shape[2:]) for part in parts]
            return np.concatenate(parts)

        return jax.tree.map(join, tree)

    def compile(
        self,
        function: Callable,
        replicated: int,
        shared: int = 0,
        plain: int = 0,
        shares_output: bool = False,
        donate: bool = False,
    ) -> Callable:
        """Compiles a per-device function.

        Args:
          function: called with the axis name, then the replicated, the shared and the plain
            arguments.
          replicated: the number of replicated arguments.
          shared: the number of shared arguments.
          plain: the number of plain arguments.
          shares_output: whether the output is divided over the devices; otherwise it is replicated.
          donate: whether the output may reuse the first argument's memory.
        """
        function = functools.partial(function, self.axis_name)
        donated = (0,) if donate else ()
        if self.way == "jit":
            return jax.jit(function, donate_argnums=donated)
        if self.way == "pmap":
            return jax.pmap(
                function,
                AXIS,
                in_axes=(0,) * (replicated + shared) + (None,) * plain,
                donate_argnums=donated,
            )
        on_all = PartitionSpec()
        divided = PartitionSpec(AXIS)
        # With check_vma, JAX would sum the gradients of replicated values itself. Without it,
        # collectives differentiate as under pmap.
        mapped = jax.shard_map(
            function,
            mesh=self._everywhere.mesh,
            in_specs=(on_all,) * replicated + (divided,) * shared + (on_all,) * plain,
            out_specs=divided if shares_output else on_all,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donated)
