"""Imports the commands' modules once, for processes forked from this one.

Nothing here may compute: a process with jax's threads cannot be forked.
"""

import gc
import os

# jax reads this variable at import.
os.environ["JAX_PLATFORMS"] = "cpu"

import contexts  # noqa: E402
import matplotlib.backends.backend_agg  # noqa: E402, F401
import quick  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401

import cnnjax.combine.__main__  # noqa: E402, F401
import cnnjax.main  # noqa: E402, F401
import cnnjax.position.study  # noqa: E402, F401
import cnnjax.predict  # noqa: E402, F401
import cnnjax.sweep  # noqa: E402, F401
import cnnjax.train.loop  # noqa: E402, F401
import cnnjax.visualize.__main__  # noqa: E402, F401

contexts.share()
# A garbage collection would write to shared memory pages, and each forked process would copy them.
gc.freeze()
# The same threshold as in conftest.py.
gc.set_threshold(50_000)
