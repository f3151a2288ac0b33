"""Make tfds.zip, a tiny prepared data set, for tests/test_stream.py.

    pip install tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10 array_record==0.8.6
    python tests/golden/make_tfds.py

Images are lossless, so that what is read can be compared with `examples` to the bit. It is an
archive because the format fills its files up to multiples of 64 KiB.
"""

import pathlib
import shutil
import tempfile

import numpy as np

NAME = "colored_ramps"
CLASSES = ("red", "green", "blue")
COUNTS = {"train": 18, "test": 6}


def examples(split: str) -> list[tuple[np.ndarray, int]]:
    """Make the images and labels of a split.

    An image is a ramp from left to right in the class's channel, and from top to bottom in the
    next one.
    """
    found = []
    for number in range(COUNTS[split]):
        # In no order, and not equally many: none is green.
        label = (number * number + number) % 3
        x, y = np.meshgrid(np.arange(8 + number % 5), np.arange(8 + number % 3))
        image = np.full((*x.shape, 3), 7 * number + (split == "test"), np.uint8)
        image[..., label] = 20 * x
        image[..., (label + 1) % 3] = 20 * y
        found.append((image, label))
    return found


def main() -> None:
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder):
        name = NAME
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Ramps of color.",
                homepage="https://www.tensorflow.org/datasets",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                        "label": tfds.features.ClassLabel(names=CLASSES),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in COUNTS}

        def _generate_examples(self, split):
            for number, (image, label) in enumerate(examples(split)):
                yield number, {"image": image, "label": label}

    with tempfile.TemporaryDirectory() as folder:
        Builder(data_dir=folder, file_format="array_record").download_and_prepare()
        shutil.make_archive(str(pathlib.Path(__file__).parent / "tfds"), "zip", folder, NAME)


if __name__ == "__main__":
    main()
