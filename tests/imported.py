"""Import once what the commands need, for processes forked from this one.

Nothing here may compute, since a process with jax's threads cannot be forked.
"""

import gc
import os

# Read when jax is imported.
os.environ["JAX_PLATFORMS"] = "cpu"

import matplotlib.pyplot  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401

import cnnjax.combine.__main__  # noqa: E402, F401
import cnnjax.main  # noqa: E402, F401
import cnnjax.position.study  # noqa: E402, F401
import cnnjax.predict  # noqa: E402, F401
import cnnjax.sweep  # noqa: E402, F401
import cnnjax.train.loop  # noqa: E402, F401
import cnnjax.visualize.__main__  # noqa: E402, F401

# The collector would write to, and so copy, what forked processes share.
gc.freeze()
# As in conftest.py.
gc.set_threshold(50_000)
