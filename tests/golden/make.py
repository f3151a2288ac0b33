"""Makes torchvision.npz: torchvision's own logits on the weights and inputs of formula.py.

    pip install torch==2.13.0 torchvision==0.28.0 numpy && python tests/golden/make.py

A CPU-only PyTorch has none of torchvision's compiled operators, which no classifier uses; where importing torchvision
fails for want of `torchvision::nms`, declare their signatures first.
"""
import pathlib

import formula
import numpy as np
import torch
import torchvision

CASES = [("vgg16", 224), ("vgg16", 97), ("vgg16_bn", 97), ("resnet18", 97), ("resnet50", 224), ("resnet50", 97)]


def main() -> None:
    golden = {"versions": np.array(f"torch {torch.__version__}, torchvision {torchvision.__version__}")}
    for name, size in CASES:
        model = torchvision.models.get_model(name, weights=None)
        state = {key: value if key.endswith("num_batches_tracked") else torch.from_numpy(formula.parameter(key, tuple(value.shape)))
                 for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        with torch.inference_mode():
            golden[f"{name}/{size}/eval"] = model.eval()(torch.from_numpy(formula.images(2, size))).numpy()
        print(name, size, float(np.abs(golden[f"{name}/{size}/eval"]).max()))
    np.savez_compressed(pathlib.Path(__file__).with_name("torchvision.npz"), **golden)


if __name__ == "__main__":
    main()
