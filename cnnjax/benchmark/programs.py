"""What is gained by computing things together: all readouts of the position study, and many seeds and rates of one network."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.data import photographs
from cnnjax.models import create_model
from cnnjax.position.encoder import encode, reachable_stages
from cnnjax.position.readout import fit_sgd
from cnnjax.position.targets import TARGETS, target
from cnnjax.train import step

_BATCH = 32  # of the authors' readout (Islam et al. 2020)
_LENET_BATCH = 128


def interleaved(ways: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, round by round in turns; a first call of each, which compiles, is not counted."""
    for way in ways.values():
        jax.block_until_ready(way())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(way())
            times[name].append(time.perf_counter() - began)
    return times


def study(
    rounds: int, encoder: str = "vgg16", size: int = 224, images: int = 24, steps: int = 540
) -> dict:
    """One encoder's part of the position study: `steps` of the authors' readout for every target.

    Together, the encoder is run once and all targets train in one program. The authors' way trains one readout at a time and runs the
    encoder on the batch of every step; measured are one such encoding and one whole training of one target, the rest is arithmetic.
    """
    model = create_model(encoder)
    stages = reachable_stages(model, size)
    pictures = photographs.crops(photographs.list_photographs(), images, size, 0)
    goals = np.stack([target(name, size) for name in TARGETS])
    variables = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, size, size, 3)), method="stages", last=stages[-1])
    )(jax.random.key(0))
    features, batch = encode(model, variables, pictures, stages), pictures[:_BATCH]
    trained = lambda goals: fit_sgd(features, goals, steps=steps).layers
    ways = {
        "encode all": lambda: encode(model, variables, pictures, stages),
        "encode a batch": lambda: encode(model, variables, batch, stages),
        "train one": lambda: trained(goals[:1]),
        "train all": lambda: trained(goals),
    }
    seconds = {
        name: statistics.median(values) for name, values in interleaved(ways, rounds).items()
    }
    ours = seconds["encode all"] + seconds["train all"]
    theirs = len(goals) * (steps * seconds["encode a batch"] + seconds["train one"])
    return {
        "encoder": encoder,
        "size": size,
        "images": images,
        "batch": len(batch),
        "targets": len(goals),
        "steps": steps,
        "seconds": seconds,
        "together_s": ours,
        "authors_way_s": theirs,
        "ratio": theirs / ours,
        "rounds": rounds,
    }


def seeds(rounds: int, configurations: int, network: str = "lenet") -> list[dict]:
    """One training step of each of many configurations (seed x learning rate) of a network, in four ways that must agree.

    Raises `RuntimeError` if their losses differ.
    """
    model, generator = create_model(network), np.random.default_rng(0)
    recipe = step.Recipe(model)
    images = jnp.asarray(generator.integers(0, 256, (_LENET_BATCH, *model.input_shape), np.uint8))
    labels = jnp.asarray(generator.integers(0, model.num_classes, _LENET_BATCH, np.int32))
    moments = jnp.float32(0.5), jnp.float32(0.25)
    numbers = [step.Numbers(seed=np.int32(seed)) for seed in range(configurations)]
    rates = jnp.asarray(np.resize([0.01, 0.02, 0.05, 0.1], configurations), jnp.float32)
    states = [step.init(recipe, model.input_shape, number) for number in numbers]
    one = lambda state, number, rate: step.batch_step(
        None, recipe, state, images, labels, moments, rate, np.int32(1), number
    )
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    stacked, counted = stack(states), stack(numbers)

    programs: dict[str, tuple[Callable, tuple]] = {
        "one after the other": (one, (states[0], numbers[0], rates[0])),
        "vmap": (jax.vmap(one), (stacked, counted, rates)),
        "lax.map": (
            lambda *all_of: jax.lax.map(lambda a: one(*a), all_of),
            (stacked, counted, rates),
        ),
        "unrolled": (lambda *all_of: list(map(one, *all_of)), (states, numbers, list(rates))),
    }
    compiled, seconds = {}, {}
    for name, (function, arguments) in programs.items():
        began = time.perf_counter()
        compiled[name] = jax.jit(function).lower(*arguments).compile()
        seconds[name] = time.perf_counter() - began
    each = list(zip(states, numbers, rates))
    ways: dict[str, Callable] = {
        name: functools.partial(compiled[name], *arguments)
        for name, (_, arguments) in programs.items()
    }
    ways["one after the other"] = lambda: [
        compiled["one after the other"](*arguments) for arguments in each
    ]

    losses = {
        name: np.ravel(
            [state.totals["loss"] for state in found]
            if isinstance(found := way(), list)
            else found.totals["loss"]
        )
        for name, way in ways.items()
    }
    for name, found in losses.items():
        if not np.allclose(found, losses["one after the other"], rtol=1e-4):
            raise RuntimeError(
                f"{name} computes other losses than one after the other: {found} and {losses['one after the other']}"
            )
    times = interleaved(ways, rounds)
    alone = times["one after the other"]
    return [
        {
            "network": network,
            "batch": _LENET_BATCH,
            "configurations": configurations,
            "way": name,
            "ms": 1e3 * statistics.median(found),
            "min_ms": 1e3 * min(found),
            "max_ms": 1e3 * max(found),
            "compile_s": seconds[name],
            "speedup": statistics.median(a / b for a, b in zip(alone, found)),
            "rounds": rounds,
        }
        for name, found in times.items()
    ]
