"""Training runs: their configuration, their steps, and finished runs reopened."""

from typing import TYPE_CHECKING

from cnnjax.runtime import lazy

if TYPE_CHECKING:
    from cnnjax.train import defaults, optimizers, run, schedules, step, training

__all__ = ["defaults", "optimizers", "run", "schedules", "step", "training"]

__getattr__, __dir__ = lazy.attributes(__name__, {}, submodules=__all__)
