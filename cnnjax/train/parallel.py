"""How a per-device function is run: by `jit` on one device, by `pmap` or `shard_map` on many.
Nothing else knows.

A per-device function takes the axis name (None on one device) and then arguments of three kinds:
replicated ones (the state, the data set: placed by `replicate`), shared ones (batches: placed by
`share`, the first axis divided over the devices) and plain host values. In all three ways its
gradients are the device's own until it averages them itself.
"""

import functools
from collections.abc import Callable

import flax.jax_utils
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
WAYS = ("auto", "jit", "pmap", "shard_map")


class Parallel:
    """One of `WAYS`; "auto" is `jit` on one device and `pmap` on many. Raises `ValueError` for
    another, or `jit` over processes."""

    def __init__(self, way: str = "auto"):
        if way not in WAYS:
            raise ValueError(f"parallel={way!r} is not one of {', '.join(WAYS)}")
        self.way = way if way != "auto" else "jit" if jax.device_count() == 1 else "pmap"
        if self.way == "jit" and jax.process_count() > 1:
            raise ValueError(
                f"parallel='jit' runs on one device of one process, and there are "
                f"{jax.process_count()} processes"
            )
        self.size = 1 if self.way == "jit" else jax.device_count()
        self.axis_name = None if self.way == "jit" else AXIS
        if self.way == "shard_map":
            mesh = Mesh(np.array(jax.devices()), (AXIS,))
            self._everywhere, self._divided = (
                NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(AXIS))
            )

    def __eq__(self, other):
        return isinstance(other, Parallel) and self.way == other.way

    def __hash__(self):
        return hash(self.way)

    @staticmethod
    def gather(number: int) -> list[int]:
        """A number of each process, on every process; what they decide by a clock or a signal, they
        must decide alike."""
        if jax.process_count() == 1:
            return [number]
        try:
            return multihost_utils.process_allgather(np.int32(number)).ravel().tolist()
        except ValueError as error:  # what jaxlib makes of a peer that is gone, here
            raise RuntimeError(str(error)) from error

    def replicate(self, tree):
        """Host or device arrays -> the same on every device."""
        if self.way == "jit":
            return jax.device_put(tree)
        if self.way == "pmap":
            return flax.jax_utils.replicate(tree)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                self._everywhere, np.asarray(x), np.shape(x)
            ),
            tree,
        )

    def share(self, tree):
        """This process's part of a batch, host arrays -> divided over the devices; the first axis
        must be a multiple of them."""
        if self.way == "jit":
            return jax.device_put(tree)
        if self.way == "pmap":
            return jax.tree.map(
                lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), tree
            )
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._divided, x), tree
        )

    def fetch(self, tree):
        """A replicated tree -> host arrays."""

        def first(x):
            shard = np.asarray(x.addressable_shards[0].data)
            return shard[0] if self.way == "pmap" else shard

        return jax.tree.map(first, tree)

    def fetch_shared(self, tree):
        """A divided tree -> host arrays of this process's part, in order."""

        def join(x):
            shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            parts = [np.asarray(shard.data) for shard in shards]
            return np.concatenate(
                [part.reshape(-1, *part.shape[2:]) for part in parts]
                if self.way == "pmap"
                else parts
            )

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
        """Compiles `function(axis_name, *replicated, *shared, *plain)`, whose output is replicated
        unless `shares_output`.

        With `donate`, the first argument's memory is given to the output.
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
        whole, part = PartitionSpec(), PartitionSpec(AXIS)
        # Unchecked, collectives differentiate as under pmap; checked, JAX would sum the gradients
        # of replicated values on its own.
        mapped = jax.shard_map(
            function,
            mesh=self._everywhere.mesh,
            in_specs=(whole,) * replicated + (part,) * shared + (whole,) * plain,
            out_specs=part if shares_output else whole,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donated)
