"""Compare every network with torchvision's: parameters, logits, and times.

    pip install torch==2.13.0 torchvision==0.28.0
    python -m experiments.zoo --workdir runs/zoo [--models 'resnet*'] [--batch 4] [--repeats 5]

Both frameworks have the same random weights, without dropout, and see the same images.

- Errors of logits, in evaluation and training mode, are measured against torchvision in float64,
  relative to the largest logit. The errors of torchvision in float32 stand beside them.
- Times are those of a forward pass in evaluation mode, and of one SGD step on the mean square of
  the logits. Runs alternate between the two frameworks, and the fastest run counts, because
  anything else that the machine does only makes a run slower. PyTorch runs eagerly, with channels
  last, on as many threads as JAX has processors.

Times of different machines or versions are not mixed: a work directory belongs to one machine and
one set of versions. Writes report.md and zoo.json.
"""

import copy
import sys
import time
import warnings
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import study, weights
from cnnjax.models import Network, create_model, list_models
from cnnjax.runtime import host, tables

# The learning rate is so small that repeated steps do not change the time.
_RATE = 1e-6

# Fields of a result: heading and format of its column.
COLUMNS = {
    "model": ("network", ""),
    "parameters": ("parameters", ","),
    "torchvision": ("torchvision's", ","),
    "eval": ("eval error", ".0e"),
    "their_eval": ("torchvision's", ".0e"),
    "train": ("train error", ".0e"),
    "their_train": ("torchvision's", ".0e"),
    "forward_ms": ("forward, ms", ".0f"),
    "forward_ratio": ("PyTorch's time / ours", ".2f"),
    "step_ms": ("training step, ms", ".0f"),
    "step_ratio": ("PyTorch's time / ours", ".2f"),
}


# --- Options and points ---------------------------------------------------------------------------


class Point(NamedTuple):
    model: str


class Frameworks(NamedTuple):
    torch: Any
    torchvision: Any


def add_options(parser):
    parser.add_workdir("runs/zoo")
    parser.add_argument(
        "--models", default="*", help="shell pattern of network names (default: %(default)s)"
    )
    # BatchNorm in training mode needs two values, and some maps have a single position.
    parser.add_count("batch", 4, "images per batch", 2)
    parser.add_count("repeats", 5, "timings, of which the fastest counts")


def points(options):
    models = load_torchvision().torchvision.models
    known = set(models.list_models(module=models))
    names = [name for name in list_models(options.models) if name in known]
    if not names:
        raise ValueError(f"models={options.models!r} matches no network that torchvision has")
    return [Point(name) for name in names]


def load_torchvision() -> Frameworks:
    """Imports torchvision, which only this study needs."""
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"experiments.zoo compares with torchvision, which cannot be imported ({error}): "
            "pip install torch==2.13.0 torchvision==0.28.0"
        ) from error
    return Frameworks(torch, torchvision)


def load(options) -> Frameworks:
    frameworks = load_torchvision()
    frameworks.torch.set_num_threads(host.cores())
    return frameworks


def environment(options) -> dict:
    """Describes the machine and the versions, on which times depend."""
    torch, torchvision = load_torchvision()
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return host.machine() | versions


# --- The same network on both sides ---------------------------------------------------------------


def without_dropout(name: str) -> tuple[Network, dict]:
    """Returns our network without dropout, and the arguments for torchvision's."""
    published = create_model(name)
    fields = [field for field in ("dropout", "dropout_aux") if hasattr(published, field)]
    rates = dict.fromkeys(fields, 0.0)
    model = create_model(name, **rates)
    if name.startswith("densenet"):
        # torchvision's DenseNet has another name for the dropout rate, which is 0 by default.
        return model, {}
    return model, rates


def build_theirs(frameworks: Frameworks, name: str, rates: dict):
    """Builds torchvision's network with random weights."""
    torch, torchvision = frameworks
    with warnings.catch_warnings():
        # Two of torchvision's networks warn that their initialization is slow.
        warnings.simplefilter("ignore")
        network = torchvision.models.get_model(name, weights=None, **rates)
    # BatchNorm starts with ones and zeros, which would hide a wrong order of channels.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.ndim == 1:
                value += 0.1 * torch.rand(value.shape, generator=generator)
    return network.to(memory_format=torch.channels_last)


def same_weights(model: Network, theirs) -> dict:
    """Returns torchvision's weights as our variables; raises `ValueError` if the keys differ."""
    paths = weights.torchvision_keys(weights.variable_shapes(model))
    state = {}
    for key, value in theirs.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            state[key] = value.numpy()
    different = sorted(paths.keys() ^ state.keys())
    if different:
        raise ValueError(f"the keys are not torchvision's: {different[:5]} ...")
    # Convolutions [out, in, height, width] and linear layers [out, in] are transposed here.
    axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
    flat = {}
    for key, value in state.items():
        flat[paths[key]] = jnp.array(value.transpose(axes[value.ndim]))
    return flax.traverse_util.unflatten_dict(flat)


class Ours:
    """Our side: a forward pass, and SGD steps that keep the state."""

    def __init__(self, model: Network, variables: dict, images: np.ndarray):
        self.params = variables["params"]
        self.stats = variables.get("batch_stats", {})
        self.images = jnp.asarray(images)
        self._apply = jax.jit(model.apply)

        def loss(params, stats, x):
            variables = {"params": params, "batch_stats": stats}
            collections = ["batch_stats", "auxiliary"]
            logits, new = model.apply(variables, x, train=True, mutable=collections)
            heads = [logits, *jax.tree.leaves(new.get("auxiliary", {}))]
            squares = [jnp.square(head).mean() for head in heads]
            return sum(squares), (logits, new.get("batch_stats", {}))

        def step(params, stats, x):
            grads, (logits, stats) = jax.grad(loss, has_aux=True)(params, stats, x)
            params = jax.tree.map(lambda p, g: p - _RATE * g, params, grads)
            return params, stats, logits

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def forward(self):
        variables = {"params": self.params, "batch_stats": self.stats}
        return jax.block_until_ready(self._apply(variables, self.images))

    def step(self):
        outputs = self._step(self.params, self.stats, self.images)
        self.params, self.stats, logits = jax.block_until_ready(outputs)
        return logits


class Theirs:
    """torchvision's side: the same passes."""

    def __init__(self, torch, network, images: np.ndarray):
        self.torch = torch
        self.network = network
        x = torch.from_numpy(images.transpose(0, 3, 1, 2))
        self.images = x.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(network.parameters(), lr=_RATE)

    def forward(self):
        self.network.eval()
        with self.torch.inference_mode():
            return self.network(self.images)

    def step(self):
        self.network.train()
        self._optimizer.zero_grad()
        heads = self._heads(self.network(self.images))
        loss = sum(head.square().mean() for head in heads)
        loss.backward()
        self._optimizer.step()
        return heads[0].detach()

    def exact(self, train: bool) -> np.ndarray:
        """Returns the logits in float64."""
        network = copy.deepcopy(self.network).double().train(train)
        with self.torch.inference_mode():
            return self._heads(network(self.images.double()))[0].numpy()

    def _heads(self, output) -> list:
        """Returns the logits and those of auxiliary heads."""
        if isinstance(output, self.torch.Tensor):
            return [output]
        return list(output)


# --- One network ----------------------------------------------------------------------------------


def relative_error(logits, expected: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest logit."""
    return float(np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max())


def measure(point: Point, options, frameworks: Frameworks) -> dict:
    """Compares one network on both sides."""
    model, rates = without_dropout(point.model)
    network = build_theirs(frameworks, point.model, rates)
    variables = same_weights(model, network)
    shape = (options.batch, *model.input_shape)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    ours = Ours(model, variables, images)
    theirs = Theirs(frameworks.torch, network, images)

    result = {
        "batch": options.batch,
        "size": shape[1],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "torchvision": sum(parameter.numel() for parameter in network.parameters()),
    }
    # The exact outputs are computed before the first step, because a step changes the weights.
    expected = theirs.exact(train=False)
    expected_train = theirs.exact(train=True)
    result["eval"] = relative_error(ours.forward(), expected)
    result["their_eval"] = relative_error(theirs.forward(), expected)
    result["train"] = relative_error(ours.step(), expected_train)
    result["their_train"] = relative_error(theirs.step(), expected_train)

    passes = {
        "forward": ours.forward,
        "their_forward": theirs.forward,
        "step": ours.step,
        "their_step": theirs.step,
    }
    milliseconds = fastest(passes, options.repeats)
    for name in ("forward", "step"):
        result[f"{name}_ms"] = milliseconds[name]
        result[f"{name}_ratio"] = milliseconds[name] / milliseconds[f"their_{name}"]
    return result


def fastest(passes: dict, repeats: int) -> dict[str, float]:
    """Times the passes alternately; returns the fastest run of each in milliseconds.

    The first run is a warm-up and does not count.
    """
    seconds = {name: [] for name in passes}
    for _ in range(repeats + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * min(runs[1:]) for name, runs in seconds.items()}


# --- Report ---------------------------------------------------------------------------------------


def report(results: list[dict], options) -> study.Report:
    lines = []
    for result in results:
        # Results hold our time over PyTorch's; in the report, above 1 is faster than PyTorch.
        inverse = {name: 1 / result[name] for name in ("forward_ratio", "step_ratio")}
        row = result | inverse
        lines.append([format(row[name], style) for name, (_, style) in COLUMNS.items()])
    table = tables.table([heading for heading, _ in COLUMNS.values()], lines)
    measured_on = options.environment
    text = f"""# The networks beside torchvision's

Batch {options.batch}, {measured_on["threads"]} threads of {measured_on["processor"]}, torch
{measured_on["torch"]}, torchvision {measured_on["torchvision"]}, jax {measured_on["jax"]} on
{measured_on["device"]}.

{table}"""
    return study.Report(text, {})


STUDY = study.Study(
    description=__doc__,
    results="zoo.json",
    add_options=add_options,
    axes=("models",),
    load=load,
    environment=environment,
    points=points,
    measure=measure,
    report=report,
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
