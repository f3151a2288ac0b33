"""Makes torchvision.npz: what torchvision's own networks give for the weights and inputs of
formula.py.

    pip install torch==2.13.0 torchvision==0.28.0 numpy && python tests/golden/make.py

A CPU-only PyTorch has none of torchvision's compiled operators, which no classifier uses; where
importing torchvision fails for want of `torchvision::nms`, declare their signatures first.

Per network `name` and image size, all computed in float64, so that only the network's own rounding
is left to see: "name/size/eval" holds logits in evaluation mode; "name/size/train" the logits of
the last of three forward passes in training mode, without dropout, on three inputs;
"name/size/statistics" a digest of each running statistic after them, in the order of the state
dict; "name/size/aux" the auxiliary logits of the last pass, where there are any. "name/keys" is the
text of the state dict's keys and shapes; "name/moments" the mean, standard deviation and largest
magnitude of each parameter that is newly initialized.
"""

import pathlib

import formula
import numpy as np
import torch
import torchvision

NAMES = (
    "alexnet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v2",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "wide_resnet50_2",
)
# An odd size, so that every rounding of a map's size shows.
SIZES = {"inception_v3": 139}
TRAIN_SIZES = {"inception_v3": 299}  # the least that its auxiliary classifier takes
TRAIN_BATCHES = {
    # Its auxiliary classifier normalizes single pixels: two are too few to be well conditioned.
    "inception_v3": 4
}
LARGE = (("vgg16", 224), ("resnet50", 224))
WITHOUT_DROPOUT = {
    "alexnet": ("dropout",),
    "vgg": ("dropout",),
    "squeezenet": ("dropout",),
    "mobilenet": ("dropout",),
    "mnasnet": ("dropout",),
    "inception": ("dropout",),
    "googlenet": ("dropout", "dropout_aux"),
}


def build(name: str, init: bool = False):
    """A network without dropout; `init` draws its parameters as torchvision does, which takes long
    for two of them."""
    fields = next(
        (fields for family, fields in WITHOUT_DROPOUT.items() if name.startswith(family)), ()
    )
    more = {"init_weights": init} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **dict.fromkeys(fields, 0.0), **more)


def fill(model) -> None:
    """Gives a network the weights of the formula."""
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            value.copy_(torch.from_numpy(formula.parameter(key, tuple(value.shape))))


def images(batch: int, size: int, key: str = "input"):
    return torch.from_numpy(formula.images(batch, size, key)).double()


@torch.no_grad()
def main() -> None:
    golden = {
        "versions": np.array(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    }
    for name in NAMES:
        torch.manual_seed(0)
        model = build(name, init=True)
        golden[f"{name}/moments"] = np.array(
            [
                [float(value.mean()), float(value.std(correction=0)), float(value.abs().max())]
                for value in model.parameters()
            ],
            np.float32,
        )
        lines = [
            f"{key} {'x'.join(map(str, value.shape))}"
            for key, value in model.state_dict().items()
            if not key.endswith("num_batches_tracked")
        ]
        golden[f"{name}/keys"] = np.frombuffer("\n".join(lines).encode(), np.uint8)
        for size in [SIZES.get(name, 97), *(size for other, size in LARGE if other == name)]:
            fill(model.double())
            golden[f"{name}/{size}/eval"] = model.eval()(images(2, size)).numpy()
        size = TRAIN_SIZES.get(name, SIZES.get(name, 97))
        model.train()
        for step in range(3):
            output = model(images(TRAIN_BATCHES.get(name, 2), size, f"input {step}"))
        logits = output if isinstance(output, torch.Tensor) else output.logits
        golden[f"{name}/{size}/train"] = logits.numpy()
        for field, attribute in (
            ("aux1", "aux_logits1"),
            ("aux2", "aux_logits2"),
            ("AuxLogits", "aux_logits"),
        ):
            if hasattr(output, attribute):
                golden[f"{name}/{size}/{field}"] = getattr(output, attribute).numpy()
        running = [
            formula.digest(key, value.numpy())
            for key, value in model.state_dict().items()
            if "running_" in key
        ]
        if running:
            golden[f"{name}/{size}/statistics"] = np.array(running, np.float32)
        print(name, size, float(logits.abs().max()), flush=True)
    arrays = {
        key: value.astype(np.float32) if value.dtype == np.float64 else value
        for key, value in golden.items()
    }
    np.savez_compressed(pathlib.Path(__file__).with_name("torchvision.npz"), **arrays)


if __name__ == "__main__":
    main()
