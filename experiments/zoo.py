"""The zoo against torchvision: parameters, logits in evaluation and training mode, times on the same CPU in the same run.

    pip install torch==2.13.0 torchvision==0.28.0
    python -m experiments.zoo --workdir /tmp/zoo [--models 'resnet*'] [--batch 4] [--repeats 5]

Both frameworks hold the same random weights, without dropout, and see the same images. Errors of logits are against torchvision in
float64, relative to the largest logit, and torchvision's own in float32 stand beside them. Times are the fastest of runs that
alternate between the two, since whatever else the machine does only adds to them: forward in evaluation mode, and one SGD
step on the mean square of the logits. PyTorch runs eagerly, with channels last, on as many threads as JAX has processors.
Writes zoo.md and zoo.json, a network at a time.
"""

import copy
import inspect
import os
import sys
import time
import warnings

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import weights
from cnnjax.models import base, create_model, list_models
from cnnjax.runtime import backend, command, workdir

COLUMNS = {
    "model": "network",
    "parameters": "parameters",
    "torchvision": "torchvision's",
    "eval": "eval error",
    "their_eval": "torchvision's",
    "train": "train error",
    "their_train": "torchvision's",
    "forward_ms": "forward, ms",
    "forward_ratio": "over torch",
    "step_ms": "training step, ms",
    "step_ratio": "over torch",
}


def load_torchvision():
    """Imports torchvision, which this script alone needs; raises `SystemExit` where it is absent."""
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError) as error:
        raise SystemExit(
            f"experiments.zoo compares with torchvision, which cannot be imported ({error}): "
            "pip install torch==2.13.0 torchvision==0.28.0"
        ) from error
    return torch, torchvision


def compare(torch, torchvision, name: str, batch: int, repeats: int) -> dict:
    """One network's row."""
    rates = [
        field
        for field in ("dropout", "dropout_aux")
        if field in inspect.signature(base._REGISTRY[name]).parameters
    ]
    model = create_model(name, **dict.fromkeys(rates, 0.0))
    size = model.input_shape[0]
    rates = (
        {} if name.startswith("densenet") else dict.fromkeys(rates, 0.0)
    )  # there torchvision calls it drop_rate, and it is 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the slow initialization of two networks
        theirs = torchvision.models.get_model(name, weights=None, **rates)
    theirs = theirs.to(memory_format=torch.channels_last)
    # The same weights on both sides; BatchNorm's are moved off their initial ones and zeros.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in theirs.state_dict().values():
            if value.ndim == 1:
                value += 0.1 * torch.rand(value.shape, generator=generator)
    paths = weights.torchvision_keys(weights.variable_shapes(model))
    state = {
        key: value.numpy()
        for key, value in theirs.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    if paths.keys() != state.keys():
        raise ValueError(
            f"{name} has not torchvision's keys: {sorted(paths.keys() ^ state.keys())[:5]} ..."
        )
    axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}  # torchvision's -> ours
    variables = {
        paths[key]: jnp.array(value.transpose(axes[value.ndim])) for key, value in state.items()
    }
    variables = flax.traverse_util.unflatten_dict(variables)
    params, stats = variables["params"], variables.get("batch_stats", {})
    images = np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32)
    x, y = (
        jnp.asarray(images),
        torch.from_numpy(images.transpose(0, 3, 1, 2)).to(memory_format=torch.channels_last),
    )

    apply = jax.jit(model.apply)

    def loss(params, stats, x):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            mutable=["batch_stats", "auxiliary"],
        )
        heads = [logits, *jax.tree.leaves(new.get("auxiliary", {}))]
        return sum(jnp.square(head).mean() for head in heads), (logits, new.get("batch_stats", {}))

    def step(params, stats, x):
        grads, (logits, stats) = jax.grad(loss, has_aux=True)(params, stats, x)
        return jax.tree.map(lambda p, g: p - 1e-6 * g, params, grads), stats, logits

    step = jax.jit(step, donate_argnums=(0, 1))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1e-6)

    def their_forward():
        theirs.eval()
        with torch.inference_mode():
            return theirs(y)

    def their_step():
        theirs.train()
        optimizer.zero_grad()
        output = theirs(y)
        heads = [output] if isinstance(output, torch.Tensor) else list(output)
        sum(head.square().mean() for head in heads).backward()
        optimizer.step()
        return heads[0].detach()

    def errors(ours, theirs, expected):
        return [
            float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())
            for found in (ours, theirs)
        ]

    def exact(train):
        output = copy.deepcopy(theirs).double().train(train)(y.double())
        return (output if isinstance(output, torch.Tensor) else output[0]).numpy()

    row = {
        "model": name,
        "batch": batch,
        "size": size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "torchvision": sum(p.numel() for p in theirs.parameters()),
    }
    with torch.inference_mode():
        expected = {train: exact(train) for train in (False, True)}
    row["eval"], row["their_eval"] = errors(
        apply({"params": params, "batch_stats": stats}, x), their_forward(), expected[False]
    )
    params, stats, logits = step(params, stats, x)
    row["train"], row["their_train"] = errors(logits, their_step(), expected[True])
    times = {"forward": [], "their_forward": [], "step": [], "their_step": []}
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(apply({"params": params, "batch_stats": stats}, x))
        times["forward"].append(time.perf_counter() - start)
        start = time.perf_counter()
        their_forward()
        times["their_forward"].append(time.perf_counter() - start)
        start = time.perf_counter()
        params, stats, logits = jax.block_until_ready(step(params, stats, x))
        times["step"].append(time.perf_counter() - start)
        start = time.perf_counter()
        their_step()
        times["their_step"].append(time.perf_counter() - start)
    times = {
        key: 1e3 * min(values[1:]) for key, values in times.items()
    }  # the first run of each warms up
    return {
        **row,
        "forward_ms": times["forward"],
        "forward_ratio": times["forward"] / times["their_forward"],
        "step_ms": times["step"],
        "step_ratio": times["step"] / times["their_step"],
    }


def markdown(rows: list[dict]) -> str:
    """The rows as a table."""
    formats = {
        "parameters": ",",
        "torchvision": ",",
        "eval": ".0e",
        "their_eval": ".0e",
        "train": ".0e",
        "their_train": ".0e",
        "forward_ms": ".0f",
        "forward_ratio": ".2f",
        "step_ms": ".0f",
        "step_ratio": ".2f",
    }
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    return (
        "\n".join(
            lines
            + [
                "| " + " | ".join(format(row[key], formats.get(key, "")) for key in COLUMNS) + " |"
                for row in rows
            ]
        )
        + "\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_workdir("runs/zoo")
    parser.add_argument("--models", default="*", help="shell pattern of names")
    parser.add_count("batch", 4, "images")
    parser.add_count("repeats", 5, "timings, of which the fastest counts")
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        torch, torchvision = load_torchvision()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        known = set(torchvision.models.list_models(module=torchvision.models))
        names = [name for name in list_models(options.models) if name in known]
        if not names:
            raise ValueError(f"models={options.models!r} matches no network that torchvision has")
        options.workdir.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in names:
            rows.append(compare(torch, torchvision, name, options.batch, options.repeats))
            print(markdown(rows[-1:]).splitlines()[-1], flush=True)
            workdir.write(
                options.workdir / "zoo.md",
                f"Batch {options.batch}, {len(os.sched_getaffinity(0))} threads, torch {torch.__version__}, "
                f"torchvision {torchvision.__version__}, jax {jax.__version__}.\n\n"
                + markdown(rows),
            )
            workdir.write_json(options.workdir / "zoo.json", rows)

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
