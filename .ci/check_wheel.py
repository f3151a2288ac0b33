"""What an installation of the wheel alone must do. Run by its Python, outside of the checkout.

python .ci/check_wheel.py CHECKOUT
"""

import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import PIL.Image

import cnnjax
from cnnjax import weights

checkout = pathlib.Path(sys.argv[1])
installed = pathlib.Path(cnnjax.__file__).parent
assert checkout not in installed.parents, installed

# ------------------------------------------------------------------ its files, and nothing else
files = {file.name for file in importlib.metadata.files("cnnjax")}
assert {"py.typed", "LICENSE", "imagenet_classes.txt"} <= files
assert importlib.metadata.metadata("cnnjax")["License-Expression"] == "Apache-2.0"
for extra in ("tensorflow_datasets", "grain", "sklearn", "matplotlib", "submitit", "pytest"):
    assert importlib.util.find_spec(extra) is None, extra


# ------------------------------------------------------------------ commands
def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)


summary = run("cnnjax.summary", "lenet")
assert summary.returncode == 0 and "536,710" in summary.stdout, summary

with tempfile.TemporaryDirectory() as folder:
    file = f"{folder}/squeezenet.safetensors"
    photograph = f"{folder}/photograph.png"
    model = cnnjax.create_model("squeezenet1_1")
    variables = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32), weights.variable_shapes(model)
    )
    weights.save_torchvision(variables, file)
    PIL.Image.new("RGB", (300, 200)).save(photograph)
    prediction = run("cnnjax.predict", "squeezenet1_1", photograph, "--weights", file)
    # Weights of zero know nothing: every class has a thousandth.
    assert prediction.stdout.count("0.10 %") == 5, prediction

training = run("cnnjax.main", "--config", str(checkout / "configs/lenet_digits.py"))
assert training.returncode == 1
assert training.stderr.count("\n") == 1 and "is not installed" in training.stderr, training
print(training.stderr, end="")
