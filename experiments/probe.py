"""What MobileNetV2's ImageNet features know of CIFAR-10: a linear probe on them, beside the same probe on untrained features.

    python -m experiments.probe --weights FILE --data_dir data --workdir runs/probe [--train 10000] [--size 96] [--repeats 3]

FILE holds torchvision's features of MobileNetV2, with or without the classifier, which is not used. Images are resized to
`size` pixels; the probe is ridge regression on the 1280 pooled features, its strength chosen on a fifth of the training
images, held out, and the test set is read once per probe. Every repetition has training images of its own. Writes report.md
and probe.json.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import weights
from cnnjax.data import arrays, augment
from cnnjax.models import Network, create_model
from cnnjax.runtime import backend, command, tables, workdir
from cnnjax.runtime.progress import progress
from cnnjax.train import evaluate
from cnnjax.train.parallel import Parallel
from cnnjax.transfer import linear_probe

_BATCH = 128


def open_features(path: pathlib.Path | None) -> tuple[Network, dict]:
    """MobileNetV2 whose logits are its pooled features, with a file's weights, or untrained without one."""
    model = create_model("mobilenet_v2", num_classes=1280)
    if path is None:
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *model.input_shape)))
    else:
        variables = weights.load_torchvision(path, model, missing="classifier")
    return model, variables | {
        "params": variables["params"]
        | {"classifier.1": {"kernel": jnp.eye(1280), "bias": jnp.zeros(1280)}}
    }


def extract(model: Network, variables: dict, images: np.ndarray, size: int) -> np.ndarray:
    """Features [n, 1280] of uint8 images, resized to `size` pixels."""

    def resized(model, variables, images):
        return model.apply(
            variables, jax.image.resize(images, (len(images), size, size, 3), "bilinear")
        )

    parallel = Parallel()
    variables, moments = parallel.replicate((variables, augment.IMAGENET))
    with progress(len(images), "images") as done:

        def batches():
            for batch in evaluate.batches_of(images, _BATCH):
                yield batch
                done(len(batch))

        return evaluate.predict(parallel, model, variables, moments, batches(), _BATCH, resized)


def write(options, rows: list[dict]) -> str:
    """Writes the results and the report; returns the table."""
    options.workdir.mkdir(parents=True, exist_ok=True)
    workdir.write_json(
        options.workdir / "probe.json",
        {"train": options.train, "test": options.test, "size": options.size, "rows": rows},
    )
    lines = []
    for name in dict.fromkeys(row["weights"] for row in rows):
        found, strengths = zip(
            *((row["accuracy"], f"{row['strength']:g}") for row in rows if row["weights"] == name)
        )
        lines.append(
            [
                name,
                tables.spread([100 * value for value in found], 2),
                str(len(found)),
                ", ".join(strengths),
            ]
        )
    text = (
        f"# A linear probe on MobileNetV2's features\n\nCIFAR-10 at {options.size} px, {options.train:,} training and "
        f"{options.test:,} test images; accuracy in percent, over disjoint sets of training images.\n\n"
    )
    table = tables.table(["weights", "mean ± std", "n", "strengths chosen"], lines)
    workdir.write(options.workdir / "report.md", text + table)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(description=__doc__)
    parser.add_argument(
        "--weights",
        type=pathlib.Path,
        required=True,
        help="a safetensors or .pth file with torchvision's names",
    )
    parser.add_data_dir()
    parser.add_workdir("runs/probe")
    parser.add_count("train", 10_000, "training images of one probe", 50)
    parser.add_count("test", 10_000, "test images")
    parser.add_count("size", 96, "pixels that images are resized to")
    parser.add_count("repeats", 3, "probes, each on other training images")
    options = parser.parse_args(arguments)

    def work():
        backend.start()
        data = arrays.load("cifar10", options.data_dir)
        networks = {"ImageNet": open_features(options.weights), "untrained": open_features(None)}
        wanted, at_hand = (
            options.train * options.repeats,
            [len(split.images) for split in (data.train, data.test)],
        )
        if wanted > at_hand[0] or options.test > at_hand[1]:
            raise ValueError(
                f"train={options.train} times repeats={options.repeats} and test={options.test} do not fit: CIFAR-10 has "
                f"{at_hand[0]} training and {at_hand[1]} test images"
            )
        order = np.random.default_rng(0).permutation(len(data.train.images))[:wanted]
        test_labels, rows = data.test.labels[: options.test], []
        for name, network in networks.items():
            parts = data.train.images[order], data.test.images[: options.test]
            train, test = (extract(*network, images, options.size) for images in parts)
            for number, part in enumerate(np.split(np.arange(wanted), options.repeats)):
                accuracy, strength = linear_probe(
                    train[part], data.train.labels[order][part], test, test_labels
                )
                rows.append(
                    {
                        "weights": name,
                        "repetition": number,
                        "accuracy": accuracy,
                        "strength": strength,
                    }
                )
        print(write(options, rows))

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
