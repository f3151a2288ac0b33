"""Benchmarks, both sides measured in one run: `python -m cnnjax.benchmark cpu`.

The training step (forward, backward, SGD with momentum) of the lectures' three networks, in cnnjax, in stock Flax layers under
the default XLA flags, and in PyTorch (eager, channels last) where it is installed. Each side is a process of its own, since the
flags of a process cannot be changed; the processes take turns, so that a drift of the machine's speed meets all of them.
"""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from cnnjax import backend

# Name -> batch, image shape, and the layers as (kind, features, kernel, padding): the lectures' networks, for the other sides.
_C, _P, _D = "conv", ("pool",), "dense"
NETWORKS = {
    "tutorial_net": (64, (32, 32, 3), ((_C, 6, 5, 0), _P, (_C, 16, 5, 0), _P, (_D, 120), (_D, 84), (_D, 10))),
    "lenet": (128, (28, 28, 1), ((_C, 50, 3, 1), _P, (_C, 100, 3, 1), _P, (_D, 100), (_D, 10))),
    "convnet": (64, (32, 32, 3), ((_C, 64, 3, 1), (_C, 64, 3, 1), _P, (_C, 128, 3, 1), (_C, 128, 3, 1), _P,
                                  (_C, 256, 3, 1), (_C, 256, 3, 1), _P, (_C, 512, 3, 1), _P, (_D, 4096), (_D, 4096), (_D, 10))),
}
_RATE, _MOMENTUM = 0.01, 0.9


def _flax_network(layers):
    import flax.linen as nn

    class Stock(nn.Module):
        @nn.compact
        def __call__(self, x):
            for number, (kind, *spec) in enumerate(layers, 1):
                if kind == "conv":
                    x = nn.relu(nn.Conv(spec[0], (spec[1],) * 2, padding=[(spec[2],) * 2] * 2)(x))
                elif kind == "pool":
                    x = nn.max_pool(x, (2, 2), (2, 2))
                else:
                    x = nn.Dense(spec[0])(x.reshape(len(x), -1))
                    x = nn.relu(x) if number < len(layers) else x
            return x

    return Stock()


def _jax_step(model, images, labels):
    """A compiled training step with donated state -> a function that runs one step and waits for it, and the parameter count."""
    import functools

    import jax
    import optax

    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    optimizer = optax.sgd(_RATE, momentum=_MOMENTUM)
    state = [variables, jax.jit(optimizer.init)(variables)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables, momentum):
        def loss(variables):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, images), labels).mean()
        updates, momentum = optimizer.update(jax.grad(loss)(variables), momentum, variables)
        return optax.apply_updates(variables, updates), momentum

    def run():
        state[:] = step(*state)
        jax.block_until_ready(state)
    return run, sum(leaf.size for leaf in jax.tree.leaves(variables))


def _torch_step(layers, images, labels):
    import torch

    torch.set_num_threads(os.cpu_count())
    modules, channels, side = [], images.shape[3], images.shape[1]
    for number, (kind, *spec) in enumerate(layers, 1):
        if kind == "conv":
            modules += [torch.nn.Conv2d(channels, spec[0], spec[1], padding=spec[2]), torch.nn.ReLU()]
            channels, side = spec[0], side + 2 * spec[2] - spec[1] + 1
        elif kind == "pool":
            modules.append(torch.nn.MaxPool2d(2))
            side //= 2
        else:
            if side:
                modules.append(torch.nn.Flatten())
                channels, side = channels * side * side, 0
            modules += [torch.nn.Linear(channels, spec[0])] + [torch.nn.ReLU()] * (number < len(layers))
            channels = spec[0]
    model = torch.nn.Sequential(*modules).to(memory_format=torch.channels_last)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long()
    optimizer = torch.optim.SGD(model.parameters(), _RATE, _MOMENTUM)

    def run():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return run, sum(p.numel() for p in model.parameters())


def _work(side: str, network: str) -> None:
    """A worker: answers each line of input with the milliseconds per step of a short burst."""
    if side == "flax":
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(backend.CPU_FLAG, "")
    import numpy as np

    batch, shape, layers = NETWORKS[network]
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((batch, *shape), np.float32), rng.integers(0, 10, batch, np.int32)
    if side == "torch":
        run, parameters = _torch_step(layers, images, labels)
    elif side == "flax":
        run, parameters = _jax_step(_flax_network(layers), images, labels)
    else:
        from cnnjax.models import create_model
        backend.start()
        run, parameters = _jax_step(create_model(network), images, labels)
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    print(json.dumps({"parameters": parameters, "first_step_s": round(first, 2)}), flush=True)
    for _ in sys.stdin:
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < 0.5 or steps < 3:
            run()
            steps += 1
        print((time.perf_counter() - start) / steps * 1e3, flush=True)


def _measure(network: str, sides: list[str], rounds: int) -> dict:
    workers = {side: subprocess.Popen([sys.executable, "-m", "cnnjax.benchmark", "--worker", side, network], text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE) for side in sides}

    def ask(side, question=None):
        if question:
            workers[side].stdin.write(question)
            workers[side].stdin.flush()
        answer = workers[side].stdout.readline()
        if not answer:
            raise RuntimeError(f"the {side} side of {network} stopped with exit code {workers[side].wait()}")
        return json.loads(answer)

    try:
        starts = {side: ask(side) for side in sides}
        counts = {start["parameters"] for start in starts.values()}
        if len(counts) > 1:
            raise RuntimeError(f"the sides of {network} are different networks: {starts}")
        for side in sides:
            ask(side, "warm up\n")
        times = {side: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                times[side].append(ask(side, "go\n"))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    result = {"network": network, "batch": NETWORKS[network][0], "parameters": counts.pop(), "rounds": rounds}
    for side in sides:
        result[side] = {"ms": statistics.median(times[side]), "min_ms": min(times[side]), "max_ms": max(times[side]),
                        "first_step_s": starts[side]["first_step_s"]}
        if side != "cnnjax":
            result[side]["over_cnnjax"] = statistics.median(a / b for a, b in zip(times[side], times["cnnjax"]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cnnjax.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["cpu"], help="what to measure")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side (default 15)")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the numbers")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return _work(*arguments.worker)
    if arguments.what is None or arguments.rounds < 1:
        parser.error(f"what={arguments.what!r}, rounds={arguments.rounds}; expected cpu, and at least one round")
    sides = ["cnnjax", "flax"] + (["torch"] if importlib.util.find_spec("torch") else [])
    results = [_measure(network, sides, arguments.rounds) for network in NETWORKS]

    print(f"Training step, {os.cpu_count()} CPUs, median of {arguments.rounds} interleaved bursts; a ratio is other / cnnjax.")
    what = {"cnnjax": "jaxlib", "flax": "stock layers, default XLA flags, jaxlib", "torch": "eager, channels last, torch"}
    for side in sides:
        print(f"  {side}: {what[side]} {importlib.metadata.version(what[side].split()[-1])}")
    if "torch" not in sides:
        print("  PyTorch is not installed: no comparison with it")
    lines = [["network", "batch", "parameters", *(f"{side}, ms" for side in sides), *(f"{side} / cnnjax" for side in sides[1:])]]
    lines.append(["---"] * len(lines[0]))
    lines += [[r["network"], str(r["batch"]), f"{r['parameters']:,}", *(f"{r[side]['ms']:.1f}" for side in sides),
               *(f"{r[side]['over_cnnjax']:.2f}" for side in sides[1:])] for r in results]
    print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    if arguments.output:
        from cnnjax import workdir
        workdir.write_json(arguments.output, {"environment": backend.describe(), "results": results})


if __name__ == "__main__":
    sys.exit(main())
