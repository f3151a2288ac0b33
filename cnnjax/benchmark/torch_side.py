"""The sides that run on PyTorch, with channels last.

PyTorch is eager, or compiled by `torch.compile`.
"""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch

from cnnjax.benchmark import cases
from cnnjax.models import create_model
from cnnjax.runtime import host


def network(name: str, batch: int, device: str, compiled: bool) -> tuple[dict, dict]:
    """Prepares the passes of a network.

    Returns a function for each pass, called with the number of runs; and {"parameters",
    "compile_s"}, the number of parameters and the seconds of the first step.
    """
    height, width, channels = create_model(name).input_shape
    model = _model(name).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), cases.RATE, cases.MOMENTUM)
    call = torch.compile(model) if compiled else model
    x = torch.randn(batch, channels, height, width, device=device)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,), device=device)
    half = functools.partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

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
                outputs = call(x)
                # Networks with auxiliary heads return a tuple.
                logits = getattr(outputs, "logits", outputs)
                loss = torch.nn.functional.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
        wait()

    began = time.perf_counter()
    step(1)
    seconds = time.perf_counter() - began
    count = sum(parameter.numel() for parameter in model.parameters())
    passes = {"forward": forward, "step": step, "training": step}
    return passes, {"parameters": count, "compile_s": round(seconds, 2)}


def _model(name: str):
    """Builds a lecture's network by its specification, any other by torchvision."""
    if name not in cases.SPECIFICATIONS:
        import torchvision

        return torchvision.models.get_model(name, weights=None)
    side, channels, layers = cases.SPECIFICATIONS[name]
    modules: list[torch.nn.Module] = []
    for number, layer in enumerate(layers, 1):
        if layer == "pool":
            modules.append(torch.nn.MaxPool2d(2))
            side //= 2
        elif isinstance(layer, tuple):
            features, kernel, padding = layer
            modules.append(torch.nn.Conv2d(channels, features, kernel, padding=padding))
            modules.append(torch.nn.ReLU())
            channels = features
            side += 2 * padding - kernel + 1
        else:
            # The first linear layer flattens the maps; a side of 0 marks that they are flat.
            if side:
                modules.append(torch.nn.Flatten())
                channels *= side * side
                side = 0
            modules.append(torch.nn.Linear(channels, layer))
            if number < len(layers):
                modules.append(torch.nn.ReLU())
            channels = layer
    return torch.nn.Sequential(*modules)


def layer(case: cases.Convolution, x, kernel, dy) -> dict[str, Callable]:
    """Prepares the three passes of a convolution of NHWC images with an HWIO kernel."""
    images = _channels_last(x, (0, 3, 1, 2))
    weights = _channels_last(kernel, (3, 2, 0, 1))
    cotangent = _channels_last(dy, (0, 3, 1, 2))

    def forward():
        return torch.nn.functional.conv2d(
            images, weights, stride=case.stride, padding=case.padding, groups=case.groups
        )

    def gradients(of_input, of_kernel):
        return torch.ops.aten.convolution_backward(
            cotangent,
            images,
            weights,
            None,
            stride=[case.stride] * 2,
            padding=[case.padding] * 2,
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=case.groups,
            output_mask=[of_input, of_kernel, False],
        )

    return {
        "forward": _repeat(forward),
        "input gradient": _repeat(lambda: gradients(True, False)[0]),
        "kernel gradient": _repeat(lambda: gradients(False, True)[1]),
    }


def _channels_last(values: np.ndarray, axes: tuple[int, ...]) -> torch.Tensor:
    transposed = torch.from_numpy(values.transpose(axes))
    return transposed.contiguous(memory_format=torch.channels_last)


def _repeat(function: Callable) -> Callable:
    """Makes a function of n that calls n times and returns the last result."""

    def run(n):
        for _ in range(n):
            result = function()
        return result

    return run


def product(what: str) -> Callable:
    """Prepares the product of two large matrices in the type that networks compute in."""
    size = cases.PRODUCT[what]
    on_gpu = what == "gpu"
    device = "cuda" if on_gpu else "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=dtype)

    def run(n):
        for _ in range(n):
            matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()

    return run


def start() -> None:
    """Prepares the process: all cores, and the fastest algorithms of cuDNN."""
    torch.set_num_threads(host.cores())
    torch.backends.cudnn.benchmark = True
