"""The keys that every training configuration has; a file in configs/ changes the ones that make it
what it is."""

import itertools
from typing import Any

import ml_collections

# Keys of all schedules, so that a configuration can change from one to another; each reads its own.
SCHEDULE: dict[str, Any] = {
    "learning_rate": None,
    "warmup_epochs": 0.0,
    # Of step and plateau.
    "factor": 0.1,
    # Of step: one of the two; of restarts: `every`.
    "epochs": (),
    "every": 0,
    # Of plateau.
    "metric": "error",
    "patience": 10,
    "mode": "min",
    "threshold": 1e-4,
    "threshold_mode": "rel",
    "cooldown": 0,
    "min_lr": 0.0,
}

# Keys introduced since, and what was in force before: for work directories that lack them.
BEFORE = {"final_weights": "last", "early_stopping": 0}


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.kind = "train"
    config.model = "lenet"
    config.model_fields = ml_collections.ConfigDict(
        {"padding": "zeros"}
    )  # fields of the model, such as dropout
    # A safetensors or .pth file with torchvision's names, or a finished run's work directory.
    config.initial_weights = ""
    # The parts of them, by stage or by a pattern of names ("features.*"); () is all but the head.
    config.initial_parts = ()
    config.freeze = ()  # parts that stay as they are, their BatchNorm in evaluation mode
    # Pairs of a part and a factor of its learning rate: (("conv1", 0.1),); the last pair counts.
    config.rates = ()
    config.dtype = "float32"  # of the computation, or "bfloat16"; parameters are float32

    # Or cifar10, cifar100, mnist, fashion_mnist, camvid, camvid_scenes, tfds:NAME, folder,
    # FILE.npz; "cifar10[:12000]" is its first 12,000 training images and the whole test set.
    config.dataset = "digits"
    config.data_dir = (
        ""  # the folder of the original files; they are downloaded where they are absent
    )
    config.n_validation = (
        0  # training images held out, of which the plateau rule and the best checkpoint are chosen
    )
    config.image_size = 224  # of streamed data sets (tfds:NAME, folder)
    config.resize = 256  # their shorter side before the crop; 0 for crops of random area and aspect
    config.workers = 2  # processes that decode them; 0 decodes in the training process
    # True counts and names training images that cannot be decoded, and takes the next instead;
    # False ends the run.
    config.skip_damaged = False
    # "standardised" uses the data's mean and deviation, "imagenet" those of ImageNet; "centred"
    # leaves 0 to 255 minus the data's mean.
    config.pixels = "standardised"
    config.augment = ml_collections.ConfigDict(
        {"flip": False, "crop": 0, "fill": "zeros", "cutout": 0, "colour": 0.0}
    )
    config.mixup = 0.0
    config.test_views = 1  # or 2 with the mirror image, or 10 with corners

    # Or "pixelwise" for masks (camvid), "sigmoid" for several classes an image (camvid_scenes).
    config.loss = "cross_entropy"
    config.label_smoothing = 0.0
    config.optimizer = "sgd"
    config.momentum = 0.9
    config.weight_decay = 0.0
    config.decay_all = True  # False spares biases and normalization
    config.schedule = ml_collections.ConfigDict(
        {"name": "constant", **SCHEDULE, "learning_rate": 0.1}
    )
    config.ema_decay = 0.0  # of the average of the parameters that is then evaluated; 0 for none
    config.accumulate = 1  # parts that each device's batch is computed in
    # str: the weights that are scored and kept. "best" is the epoch of the smallest validation
    # error, where there is a validation set; "last" is the end of training.
    config.final_weights = "best"
    # int: training ends after so many epochs without a smaller validation error; 0 never ends
    # early.
    config.early_stopping = 0
    config.epochs = 10
    config.batch_size = 128
    config.seed = 0

    config.parallel = "auto"  # jit on one device, pmap on many; or jit, pmap, shard_map
    config.sync_batch_norm = True  # statistics over all devices
    config.checkpoint_every_steps = 1000
    config.keep_checkpoints = 2
    return config


def product(axes: dict) -> list[dict]:
    """Every combination of the axes' values, as overrides: {"schedule.learning_rate": (0.1, 0.2),
    "seed": range(5)} -> ten."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
