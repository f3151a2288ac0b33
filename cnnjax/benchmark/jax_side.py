"""The sides that run on JAX.

They are cnnjax, and the same networks on jax's or oneDNN's operations.
"""

import functools
import operator
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax import weights
from cnnjax.benchmark import cases, onednn
from cnnjax.models import create_model
from cnnjax.nn import conv, lowering

# Batches that the steps of a loop take in turn: with a single batch, whatever depends only on the
# batch would be computed once for all steps.
_BATCHES = 2


def repeat(function: Callable, *arguments) -> Callable[[int], object]:
    """Makes a function of n that calls n times and waits for the last result.

    On an accelerator, calls return before their result is ready.
    """

    def run(n):
        for _ in range(n):
            result = function(*arguments)
        return jax.block_until_ready(result)

    return run


def network(name: str, batch: int, dtype: str, looped: bool = False) -> tuple[dict, dict]:
    """Prepares the passes of a network.

    Args:
      name: the network.
      batch: images in a batch.
      dtype: type of the computation.
      looped: whether training takes its steps in one call, a loop inside the program.

    Returns a function for each pass, called with the number of runs; and {"parameters",
    "compile_s"}, the number of parameters and the seconds of compiling a step.
    """
    model = create_model(name, dtype=dtype)
    batches = _random_batches(batch, model.input_shape, min(10, model.num_classes))
    images, labels = (part[0] for part in batches)
    # Without the auxiliary logits that a network such as GoogLeNet leaves.
    initial = jax.jit(model.init)(jax.random.key(0), images[:1])
    variables = {"params": initial["params"], "batch_stats": initial.get("batch_stats", {})}
    optimizer = optax.sgd(cases.RATE, momentum=cases.MOMENTUM)
    step = _make_step(model, optimizer)
    # Copies, since steps consume their state.
    params, stats = jax.tree.map(jnp.copy, (variables["params"], variables["batch_stats"]))
    state = [params, stats, jax.jit(optimizer.init)(params)]

    key = jax.random.key(1)

    began = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*state, images, labels, key)
    compiled = lowered.compile()
    seconds = time.perf_counter() - began

    def one_by_one(n):
        for _ in range(n):
            # In place: "step" and "training" share the state, and each call consumes the last one.
            state[:] = compiled(*state, images, labels, key)
        return jax.block_until_ready(state)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(n, state, batches):
        def body(number, state):
            own = [part[number % _BATCHES] for part in batches]
            return [*step(*state, *own, key)]

        return jax.lax.fori_loop(0, n, body, state)

    def at_once(n):
        state[:] = loop(n, [*state], batches)
        return jax.block_until_ready(state)

    passes = {
        "forward": repeat(jax.jit(model.apply), variables, images),
        "step": one_by_one,
        "training": at_once if looped else one_by_one,
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return passes, {"parameters": count, "compile_s": round(seconds, 2)}


def compilation(name: str, batch: int) -> tuple[dict, dict]:
    """Prepares the compilation of a network's training step.

    Returns {"compile": a function, called with the number of runs}, and {"parameters"}, their
    number.
    """
    model = create_model(name)
    optimizer = optax.sgd(cases.RATE, momentum=cases.MOMENTUM)
    images = jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    variables = weights.variable_shapes(model)
    params = variables["params"]
    momentum = jax.eval_shape(optimizer.init, params)
    state = [params, variables.get("batch_stats", {}), momentum]

    def run(n):
        for _ in range(n):
            # As in a new process, nothing has been traced.
            jax.clear_caches()
            step = jax.jit(_make_step(model, optimizer), donate_argnums=(0, 1, 2))
            step.lower(*state, images, labels, jax.random.key(1)).compile()

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"compile": run}, {"parameters": count}


def _random_batches(batch: int, shape: tuple, classes: int) -> tuple[jax.Array, jax.Array]:
    """Draws batches of random images, and of labels below `classes`.

    Images are [batches, batch, height, width, channels], labels [batches, batch].
    """
    rng = np.random.default_rng(0)
    images = rng.standard_normal((_BATCHES, batch, *shape), np.float32)
    labels = rng.integers(0, classes, (_BATCHES, batch), np.int32)
    return jnp.asarray(images), jnp.asarray(labels)


def _make_step(model, optimizer) -> Callable:
    """Makes a training step, which returns parameters, statistics and momentum."""

    def step(params, stats, momentum, images, labels, key):
        def loss(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats", "auxiliary"],
                rngs={"dropout": key},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new.get("batch_stats", {})

        grads, new_stats = jax.grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(grads, momentum, params)
        return optax.apply_updates(params, updates), new_stats, momentum

    return step


def layer(side: str, case: cases.Convolution, x, kernel, dy) -> dict[str, Callable]:
    """Prepares the three passes of a convolution of NHWC images with an HWIO kernel."""
    convolve = functools.partial(
        onednn.conv if side == "oneDNN" else conv,
        stride=case.stride,
        padding=case.padding,
        groups=case.groups,
    )
    x, kernel, dy = map(jnp.asarray, (x, kernel, dy))

    def input_gradient(x, kernel, dy):
        _, vjp = jax.vjp(lambda x: convolve(x, kernel), x)
        return vjp(dy)[0]

    def kernel_gradient(x, kernel, dy):
        _, vjp = jax.vjp(lambda kernel: convolve(x, kernel), kernel)
        return vjp(dy)[0]

    return {
        "forward": repeat(jax.jit(convolve), x, kernel),
        "input gradient": repeat(jax.jit(input_gradient), x, kernel, dy),
        "kernel gradient": repeat(jax.jit(kernel_gradient), x, kernel, dy),
    }


def product(what: str) -> Callable:
    """Prepares the product of two large matrices in the type that networks compute in."""
    dtype = jnp.bfloat16 if what == "gpu" else jnp.float32
    size = cases.PRODUCT[what]
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return repeat(jax.jit(operator.matmul), matrix, matrix)


def start(side: str) -> None:
    """Prepares the process.

    Compiling is measured, so nothing is read from the cache.
    """
    from cnnjax.runtime import backend

    jax.config.update("jax_enable_compilation_cache", False)
    if side == "cnnjax":
        backend.check_numerics()


def traced(side: str):
    """Returns the context in which a side's programs are traced."""
    if side == "oneDNN":
        return onednn.replaced()
    # Stock jax uses plain lax calls and the gradients that jax derives from them.
    return lowering("reference" if side == "stock" else "auto")
