"""Exports networks to ONNX files and runs them by onnxruntime: a program for test_neighbors.py.

    python tests/onnx_files.py PAGE

First it runs the Python of PAGE, docs/export.md. Then it prints, as JSON, how much onnxruntime's
logits differ from cnnjax's for each network, relative to the largest logit.
"""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import onnxruntime
import quick
from jax2onnx import to_onnx

from cnnjax import nn
from cnnjax.models import create_model

NETWORKS = {
    "lenet": ("partial", (28, 28, 1)),
    "resnet18": ("reflect", (64, 64, 3)),
    "mobilenet_v2": ("one-sided", (32, 32, 3)),
    "squeezenet1_1": ("circular", (64, 64, 3)),
    "densenet121": ("symmetric", (32, 32, 3)),
}


def difference(name: str, padding: str, shape: tuple[int, ...]) -> float:
    """Converts a network and compares its logits."""
    model = create_model(name, num_classes=7, padding=padding)
    images = quick.normal(0, 3, *shape)
    variables = quick.variables(model, images)
    # With the network as it is at run time, in the forms for the CPU.
    expected = np.asarray(jax.jit(model.apply)(variables, images))
    with nn.lowering("onnx"):
        converted = to_onnx(lambda images: model.apply(variables, images), inputs=[images])
    session = onnxruntime.InferenceSession(converted.SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.asarray(images)})
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    names: dict = {}
    page = pathlib.Path(sys.argv[1]).read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    results = {name: difference(name, *settings) for name, settings in NETWORKS.items()}
    print(json.dumps({"page": bool(names["is_same"]), "networks": results}))
