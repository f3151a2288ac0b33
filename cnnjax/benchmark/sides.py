"""One side of a benchmark, a process of its own: what it runs, and how it answers."""

import functools
import json
import math
import operator
import os
import pathlib
import sys
import time

from cnnjax.runtime import backend

# The lectures' networks as PyTorch builds them: image side, channels, then features, kernel and padding of a convolution with its ReLU,
# "pool", or the features of a linear layer.
SPECIFICATIONS: dict[str, tuple[int, int, tuple]] = {
    "tutorial_net": (32, 3, ((6, 5, 0), "pool", (16, 5, 0), "pool", 120, 84, 10)),
    "lenet": (28, 1, ((50, 3, 1), "pool", (100, 3, 1), "pool", 100, 10)),
    "convnet": (
        32,
        3,
        (
            (64, 3, 1),
            (64, 3, 1),
            "pool",
            (128, 3, 1),
            (128, 3, 1),
            "pool",
            (256, 3, 1),
            (256, 3, 1),
            "pool",
            (512, 3, 1),
            "pool",
            4096,
            4096,
            10,
        ),
    ),
}
NETWORKS = {  # name -> images in a batch
    "cpu": {"tutorial_net": 64, "lenet": 128, "convnet": 64, "resnet18": 8, "mobilenet_v2": 8},
    "gpu": {"resnet50": 256, "vgg16": 128, "convnet": 64},
}
LAYERS = {  # name -> batch, side, channels in and out, kernel, stride, padding, groups
    "tutorial_net.conv1": (64, 32, 3, 6, 5, 1, 0, 1),
    "lenet.conv1": (128, 28, 1, 50, 3, 1, 1, 1),
    "lenet.conv2": (128, 14, 50, 100, 3, 1, 1, 1),
    "convnet.conv1a": (64, 32, 3, 64, 3, 1, 1, 1),
    "convnet.conv1b": (64, 32, 64, 64, 3, 1, 1, 1),
    "convnet.conv2b": (64, 16, 128, 128, 3, 1, 1, 1),
    "convnet.conv3b": (64, 8, 256, 256, 3, 1, 1, 1),
    "resnet18.conv1": (8, 224, 3, 64, 7, 2, 3, 1),
    "resnet18.layer1.0.conv1": (8, 56, 64, 64, 3, 1, 1, 1),
    "resnet18.layer2.0.conv1": (8, 56, 64, 128, 3, 2, 1, 1),
    "resnet18.layer2.0.downsample.0": (8, 56, 64, 128, 1, 2, 0, 1),
    "resnet50.layer1.1.conv1": (8, 56, 256, 64, 1, 1, 0, 1),
    "resnext50_32x4d.layer1.0.conv2": (8, 56, 128, 128, 3, 1, 1, 32),
    "mobilenet_v2.features.3.conv.1.0": (8, 56, 144, 144, 3, 1, 1, 144),
    "mobilenet_v2.features.4.conv.1.0": (8, 56, 144, 144, 3, 2, 1, 144),
}
SIDES = {
    "cpu": ("cnnjax", "stock", "torch"),
    "gpu": ("cnnjax", "torch", "torch.compile"),
    "layers": ("cnnjax", "stock", "torch"),
}
# A step is one call; training takes many steps in one where the side can, as cnnjax does with data that live on the device.
_OF_NETWORKS = ("forward", "step", "training")
PASSES = {
    "cpu": _OF_NETWORKS,
    "gpu": _OF_NETWORKS,
    "layers": ("forward", "input gradient", "kernel gradient"),
}
_RATE, _MOMENTUM = 1e-3, 0.9
_BURST, _TRAINING_BURST = 0.5, 2.0  # seconds; of training, one call of cnnjax.train.loop
_BATCHES = 2  # that a loop's steps take in turn: what it computes of a single one would be computed once for all steps
PRODUCT = {
    "cpu": 2048,
    "gpu": 8192,
    "layers": 2048,
}  # side of the square matrices whose product shows the machine's peak


# ------------------------------------------------------------------ what a side measures: name -> a function that runs n times and waits


def side_lowering(side: str):
    """Returns the context in which a side's programs are traced.

    Stock jax has the plain operations of jax and the gradients that it derives.
    """
    from cnnjax.nn import lowering

    return lowering("reference" if side == "stock" else "auto")


def _repeated(function, *arguments):
    """n calls, and a wait for the last: on an accelerator, calls return before their result is there."""
    import jax

    def run(n):
        for _ in range(n):
            result = function(*arguments)
        return jax.block_until_ready(result)

    return run


def _jax_network(name: str, batch: int, dtype, looped: bool = False) -> tuple[dict, dict]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from cnnjax.models import create_model

    model, rng = create_model(name, dtype=dtype), np.random.default_rng(0)
    batches = (
        jnp.asarray(rng.standard_normal((_BATCHES, batch, *model.input_shape), np.float32)),
        jnp.asarray(rng.integers(0, 10, (_BATCHES, batch), np.int32)),
    )
    images, labels = (part[0] for part in batches)
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    optimizer = optax.sgd(_RATE, momentum=_MOMENTUM)
    params, stats = variables["params"], variables.get("batch_stats", {})
    state = [
        jax.tree.map(jnp.copy, params),
        stats,
        jax.jit(optimizer.init)(params),
    ]  # a copy, since steps consume their state

    def step(params, stats, momentum, images, labels, key):
        def loss(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats", "auxiliary"],
                rngs={"dropout": key},
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new.get(
                "batch_stats", {}
            )

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(grads, momentum, params)
        return optax.apply_updates(params, updates), stats, momentum

    began, key = time.perf_counter(), jax.random.key(1)
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*state, images, labels, key).compile()
    seconds = time.perf_counter() - began
    variables = {"params": params, "batch_stats": jax.tree.map(jnp.copy, stats)}

    def one_by_one(n):
        for _ in range(n):
            state[:] = compiled(*state, images, labels, key)
        return jax.block_until_ready(state)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(n, state, batches):
        return jax.lax.fori_loop(
            0,
            n,
            lambda at, state: [*step(*state, *(part[at % _BATCHES] for part in batches), key)],
            state,
        )

    def at_once(n):
        state[:] = loop(n, [*state], batches)
        return jax.block_until_ready(state)

    facts = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "compile_s": round(seconds, 2),
    }
    return {
        "forward": _repeated(jax.jit(model.apply), variables, images),
        "step": one_by_one,
        "training": at_once if looped else one_by_one,
    }, facts


def _torch_model(name: str):
    import torch

    if name not in SPECIFICATIONS:
        import torchvision

        return torchvision.models.get_model(name, weights=None)
    side, channels, layers = SPECIFICATIONS[name]
    modules = []
    for number, layer in enumerate(layers, 1):
        if layer == "pool":
            modules.append(torch.nn.MaxPool2d(2))
            side //= 2
        elif isinstance(layer, tuple):
            modules += [
                torch.nn.Conv2d(channels, layer[0], layer[1], padding=layer[2]),
                torch.nn.ReLU(),
            ]
            channels, side = layer[0], side + 2 * layer[2] - layer[1] + 1
        else:
            if side:
                modules.append(torch.nn.Flatten())
                channels, side = channels * side * side, 0
            modules += [torch.nn.Linear(channels, layer)] + [torch.nn.ReLU()] * (
                number < len(layers)
            )
            channels = layer
    return torch.nn.Sequential(*modules)


def _torch_network(name: str, batch: int, shape, device: str, compiled: bool) -> tuple[dict, dict]:
    import torch

    model = _torch_model(name).to(device, memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), _RATE, _MOMENTUM)
    call = torch.compile(model) if compiled else model
    x = torch.randn(batch, shape[2], *shape[:2], device=device).to(
        memory_format=torch.channels_last
    )
    y = torch.randint(0, 10, (batch,), device=device)
    half = functools.partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def forward(n):
        model.eval()
        with torch.inference_mode(), half():
            for _ in range(n):
                call(x)
        wait()

    def step(n):
        model.train()
        for _ in range(n):
            optimizer.zero_grad()
            with half():
                loss = torch.nn.functional.cross_entropy(call(x), y)
            loss.backward()
            optimizer.step()
        wait()

    began = time.perf_counter()
    step(1)
    facts = {"parameters": parameters, "compile_s": round(time.perf_counter() - began, 2)}
    return {"forward": forward, "step": step, "training": step}, facts


def _layer(side: str, shape: tuple) -> tuple[dict, dict]:
    """The three passes of one convolution, on numbers that are the same on every side; their sizes tell that the results are too."""
    import numpy as np

    batch, size, inputs, outputs, kernel, stride, padding, groups = shape
    rng, after = np.random.default_rng(0), (size + 2 * padding - kernel) // stride + 1
    x, w, dy = (
        rng.standard_normal(s, np.float32)
        for s in (
            (batch, size, size, inputs),
            (kernel, kernel, inputs // groups, outputs),
            (batch, after, after, outputs),
        )
    )
    if side == "torch":
        import torch

        a, b, d = (
            torch.from_numpy(v.transpose(axes)).contiguous(memory_format=torch.channels_last)
            for v, axes in ((x, (0, 3, 1, 2)), (w, (3, 2, 0, 1)), (dy, (0, 3, 1, 2)))
        )
        back = functools.partial(
            torch.ops.aten.convolution_backward,
            d,
            a,
            b,
            None,
            [stride] * 2,
            [padding] * 2,
            [1, 1],
            False,
            [0, 0],
            groups,
        )
        calls = {
            "forward": lambda: torch.nn.functional.conv2d(a, b, None, stride, padding, 1, groups),
            "input gradient": lambda: back([True, False, False])[0],
            "kernel gradient": lambda: back([False, True, False])[1],
        }
        functions = {
            name: lambda n, call=call: [call() for _ in range(n)][-1]
            for name, call in calls.items()
        }
    else:
        import jax

        from cnnjax.nn import conv

        call = functools.partial(conv, stride=stride, padding=padding, groups=groups)
        both = jax.numpy.asarray(x), jax.numpy.asarray(w)
        all_three = *both, jax.numpy.asarray(dy)
        functions = {
            "forward": _repeated(jax.jit(call), *both),
            "input gradient": _repeated(
                jax.jit(lambda x, w, dy: jax.vjp(lambda x: call(x, w), x)[1](dy)[0]), *all_three
            ),
            "kernel gradient": _repeated(
                jax.jit(lambda x, w, dy: jax.vjp(lambda w: call(x, w), w)[1](dy)[0]), *all_three
            ),
        }
    return functions, {
        "sizes": [
            float(np.abs(np.asarray(run(1), np.float64)).mean()) for run in functions.values()
        ]
    }


def _product(side: str, what: str):
    """The product of two large matrices, in the numbers that the networks compute in."""
    size = PRODUCT[what]
    if side.startswith("torch"):
        import torch

        a = (
            torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
            if what == "gpu"
            else torch.randn(size, size)
        )
        return lambda n: [a @ a for _ in range(n)] and what == "gpu" and torch.cuda.synchronize()
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(
        jax.random.key(0), (size, size), jnp.bfloat16 if what == "gpu" else jnp.float32
    )
    return _repeated(jax.jit(operator.matmul), a, a)


# ------------------------------------------------------------------ a side's process


def _resident(field: str) -> float | None:
    """This process's memory in MB as Linux tells it: "VmRSS" now, "VmHWM" at most."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _peak_memory(side: str, what: str, run, before: float | None) -> float | None:
    """MB that a step needs at most: of the accelerator's memory, or what the process has grown by since it had its libraries loaded."""
    if what == "gpu":
        run(1)
        if side.startswith("torch"):
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        import jax

        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20
    if before is None:
        return None
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak begins anew
    run(1)
    peak = _resident("VmHWM")
    return None if peak is None else peak - before


def _work(side: str, what: str, name: str, batch: int) -> None:
    """A worker: tells its facts, and answers each line, the name of a pass, with the milliseconds of one run in a short burst."""
    if side.startswith("torch"):
        import torch

        torch.set_num_threads(backend.cores())
        torch.backends.cudnn.benchmark = True
    else:
        import jax

        jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured
        if side == "cnnjax":
            backend.check_numerics()
    before = _resident("VmRSS")
    if what == "layers":
        functions, facts = _layer(side, LAYERS[name])
    elif side.startswith("torch"):
        from cnnjax.models import create_model

        functions, facts = _torch_network(
            name,
            batch,
            create_model(name).input_shape,
            "cuda" if what == "gpu" else "cpu",
            side == "torch.compile",
        )
    else:
        # Stock convolutions take up to 27 times as long in a loop, on the CPU: nobody would train so.
        functions, facts = _jax_network(
            name, batch, "bfloat16" if what == "gpu" else "float32", looped=side == "cnnjax"
        )
    if "step" in functions:
        functions["step"](1)
        memory = _peak_memory(side, what, functions["step"], before)
        facts["memory_mb"] = None if memory is None else round(memory)
    functions["product"], counts = _product(side, what), {}
    for key, run in functions.items():
        run(2)
        began = time.perf_counter()
        run(1)
        counts[key] = max(
            1,
            math.ceil(
                (_TRAINING_BURST if key == "training" else _BURST) / (time.perf_counter() - began)
            ),
        )
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        key = line.strip()
        began = time.perf_counter()
        functions[key](counts[key])
        print((time.perf_counter() - began) / counts[key] * 1e3, flush=True)


if __name__ == "__main__":
    side, what, name, batch = sys.argv[1:]
    if side == "stock":
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(backend.CPU_FLAG, "")
    with side_lowering(side):
        _work(side, what, name, int(batch))
