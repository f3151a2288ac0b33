"""The gain of computing things together in one program.

The benchmarks measure all readouts of the position study, and many seeds and rates of one network.
"""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.position.encoder import draw_variables, encode, reachable_stages
from cnnjax.position.readout import fit_sgd
from cnnjax.position.targets import TARGETS, target
from cnnjax.train import step

_BATCH = 32  # of the authors' readout (Islam et al. 2020)
_LENET_BATCH = 128


def interleave(ways: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Measures the seconds of each way, in turns over several rounds.

    A first call of each, which compiles, is not counted.
    """
    for way in ways.values():
        jax.block_until_ready(way())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(way())
            times[name].append(time.perf_counter() - began)
    return times


# ------------------------------------------------------------------ the position study


def study(
    rounds: int,
    folder: str = "",
    *,
    encoder: str = "vgg16",
    size: int = 224,
    images: int = 24,
    steps: int = 540,
) -> dict:
    """Measures one encoder's part of the position study.

    Its readouts take `steps` steps for every target. The images are crops from the photographs of a
    folder, by default the embedded ones.

    Together, the encoder is run once and all targets train in one program. The authors' way trains
    one readout at a time and runs the encoder on the batch of every step: one such encoding and one
    whole training of one target are measured, the rest is arithmetic.
    """
    model = create_model(encoder)
    stages = reachable_stages(model, size)
    paths = photographs.list_photographs(folder)
    pictures = photographs.random_crops(paths, images, size, 0)
    goals = np.stack([target(name, size) for name in TARGETS])
    variables = draw_variables(model, size, stages[-1], jax.random.key(0))
    features = encode(model, variables, pictures, stages)
    batch = pictures[:_BATCH]
    train = lambda goals: fit_sgd(features, goals, steps=steps).layers
    ways = {
        "encode all": lambda: encode(model, variables, pictures, stages),
        "encode a batch": lambda: encode(model, variables, batch, stages),
        "train one": lambda: train(goals[:1]),
        "train all": lambda: train(goals),
    }
    times = interleave(ways, rounds)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ours = seconds["encode all"] + seconds["train all"]
    theirs = len(goals) * (steps * seconds["encode a batch"] + seconds["train one"])
    return {
        "encoder": encoder,
        "size": size,
        "images": images,
        "photographs": min(len(paths), images),
        "batch": len(batch),
        "targets": len(goals),
        "steps": steps,
        "seconds": seconds,
        "together_s": ours,
        "authors_way_s": theirs,
        "ratio": theirs / ours,
        "rounds": rounds,
    }


# ------------------------------------------------------------------ seeds


def seeds(rounds: int, configurations: int) -> list[dict]:
    """Measures one training step of many configurations of LeNet, in four ways.

    A configuration is a seed and a learning rate.

    Raises `RuntimeError` if the losses of two ways differ.
    """
    take_step, states, numbers, rates = _configurations(configurations)

    def map_steps(*stacked):
        return jax.lax.map(lambda one: take_step(*one), stacked)

    def unroll_steps(states, numbers, rates):
        return [take_step(*one) for one in zip(states, numbers, rates)]

    each = list(zip(states, numbers, rates))
    stacked = (_stack(states), _stack(numbers), rates)
    programs: dict[str, tuple[Callable, tuple]] = {
        "one after the other": (take_step, each[0]),
        "vmap": (jax.vmap(take_step), stacked),
        "lax.map": (map_steps, stacked),
        "unrolled": (unroll_steps, (states, numbers, list(rates))),
    }
    ways: dict[str, Callable] = {}
    seconds = {}
    for name, (function, arguments) in programs.items():
        began = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        seconds[name] = time.perf_counter() - began
        ways[name] = functools.partial(compiled, *arguments)
        if name == "one after the other":
            ways[name] = functools.partial(_call_each, compiled, each)
    _check_losses(ways)
    times = interleave(ways, rounds)
    alone = times["one after the other"]
    return [
        {
            "network": "lenet",
            "batch": _LENET_BATCH,
            "configurations": configurations,
            "way": name,
            "ms": 1e3 * statistics.median(values),
            "min_ms": 1e3 * min(values),
            "max_ms": 1e3 * max(values),
            "compile_s": seconds[name],
            "speedup": statistics.median(a / b for a, b in zip(alone, values)),
            "rounds": rounds,
        }
        for name, values in times.items()
    ]


def _configurations(count: int):
    """Returns a training step, and states, numbers and learning rates for it.

    There are `count` of each.
    """
    model = create_model("lenet")
    recipe = step.Recipe(model)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (_LENET_BATCH, *model.input_shape), np.uint8)
    labels = generator.integers(0, model.num_classes, _LENET_BATCH, np.int32)
    moments = (jnp.float32(0.5), jnp.float32(0.25))

    def take_step(state, numbers, rate):
        batch = step.Batch(
            images=jnp.asarray(images),
            labels=jnp.asarray(labels),
            moments=moments,
            learning_rate=rate,
            steps_per_epoch=np.int32(1),
        )
        return step.batch_step(recipe, state, batch, numbers)

    numbers = [step.Numbers(seed=np.int32(seed)) for seed in range(count)]
    states = [step.init(recipe, model.input_shape, own) for own in numbers]
    rates = jnp.asarray(np.resize([0.01, 0.02, 0.05, 0.1], count), jnp.float32)
    return take_step, states, numbers, rates


def _stack(trees: list):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _call_each(function: Callable, arguments: list[tuple]) -> list:
    return [function(*own) for own in arguments]


def _check_losses(ways: dict[str, Callable]) -> None:
    """Raises `RuntimeError` if the losses of a way differ from those of the first."""
    losses = {}
    for name, way in ways.items():
        state = way()
        parts = state if isinstance(state, list) else [state]
        losses[name] = np.concatenate([np.ravel(part.totals["loss"]) for part in parts])
    first = next(iter(losses))
    for name, own in losses.items():
        if not np.allclose(own, losses[first], rtol=1e-4):
            raise RuntimeError(
                f"{name} computes other losses than {first}: {own} and {losses[first]}"
            )
