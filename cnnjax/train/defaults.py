"""The keys of every training configuration; a file in configs/ changes those that define it."""

import itertools

import ml_collections

# Keys of later versions, with the behavior before them, for work directories that lack them.
BEFORE = {"final_weights": "last", "early_stopping": 0, "clip_norm": 0.0}


def get_config() -> ml_collections.ConfigDict:
    """Returns the default configuration of training."""
    config = ml_collections.ConfigDict()
    # What the configuration is for: "train".
    config.kind = "train"

    # ---- Network
    # The name of a registered network, FILE.py:NAME, or package.module:NAME.
    config.model = "lenet"
    config.model_fields = ml_collections.ConfigDict()
    # The network's padding. Its other fields are set in the same way: model_fields.sampling,
    # model_fields.dropout, ...
    config.model_fields.padding = "zeros"
    # A safetensors or .pth file with torchvision's names, or a finished run's work directory;
    # empty for random weights.
    config.initial_weights = ""
    # The parts to take from it: stages, or patterns of names ("features.*"); () for all but the
    # head.
    config.initial_parts = ()
    # Parts that stay fixed, their BatchNorm in evaluation mode.
    config.freeze = ()
    # Pairs of a part and a factor of its learning rate: (("conv1", 0.1),); if several match, the
    # last one applies.
    config.rates = ()
    # The type of the computation: "float32" or "bfloat16". Parameters are float32.
    config.dtype = "float32"

    # ---- Data
    # "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "camvid", "camvid_scenes",
    # "folder", "tfds:NAME", or FILE.npz; "cifar10[:12000]" is its first 12,000 training images and
    # the whole test set.
    config.dataset = "digits"
    # The folder of the data set's files; small data sets are downloaded where they are absent.
    config.data_dir = ""
    # Training images to hold out for validation. 0 holds out none: "folder" and "tfds:NAME" then
    # use their own validation split if they have one. With "camvid", "camvid_scenes", or a FILE.npz
    # that has validation images, their number (CamVid: 101) uses them, and 0 leaves them out.
    config.n_validation = 0
    # Height and width of streamed images (folder, tfds:NAME), in pixels.
    config.image_size = 224
    # The shorter side of streamed images before the crop, in pixels; 0 for crops of random area
    # and aspect.
    config.resize = 256
    # Processes that decode streamed images; 0 decodes in the training process.
    config.workers = 2
    # Whether training images that cannot be decoded are counted, named, and replaced by the next;
    # otherwise they end the run.
    config.skip_damaged = False
    # "standardised" uses the data's mean and deviation (ImageNet's for folder and tfds:NAME),
    # "imagenet" those of ImageNet; "centred" leaves 0 to 255 minus the mean.
    config.pixels = "standardised"
    config.augment = ml_collections.ConfigDict()
    # Whether half of the training images are mirrored.
    config.augment.flip = False
    # The largest random shift, in pixels; 0 for none.
    config.augment.crop = 0
    # What a shift brings in: "zeros" or "reflect".
    config.augment.fill = "zeros"
    # The side of a black square at a random place, in pixels; 0 for none.
    config.augment.cutout = 0
    # The standard deviation of the color shift; 0 for none.
    config.augment.colour = 0.0
    # Both parameters of mixup's Beta distribution; 0 for none. Only the training loss and error are
    # of mixed images.
    config.mixup = 0.0
    # Views averaged per test image: 1; 2 (plus the mirror image); 10 (center and corners, each also
    # mirrored; needs streamed images and a `resize` of 0 or above `image_size`).
    config.test_views = 1

    # ---- Loss and optimizer
    # "cross_entropy", "pixelwise" for masks (camvid; the mean over images of the mean over pixels),
    # or "sigmoid" for several classes per image (camvid_scenes).
    config.loss = "cross_entropy"
    # The share of the probability that is spread over all classes, in the training loss only.
    config.label_smoothing = 0.0
    # "sgd", "nesterov", "adam", "adamw", or "muon".
    config.optimizer = "sgd"
    # Momentum of "sgd" and "nesterov", the first beta of "adam" and "adamw" (the second is 0.999),
    # and the beta of "muon".
    config.momentum = 0.9
    # The factor of the L2 penalty, or of decoupled decay in "adamw" and "muon".
    config.weight_decay = 0.0
    # Whether biases and normalization decay, too.
    config.decay_all = True
    # The largest global norm of the gradients, which are scaled down to it before weight decay is
    # added; 0 for none.
    config.clip_norm = 0.0
    # The keys of all schedules. Those that the schedule does not read are refused on the command
    # line and, under "constant", in the configuration file, too.
    config.schedule = ml_collections.ConfigDict()
    # "constant", "step", "cosine", "restarts", or "plateau".
    config.schedule.name = "constant"
    # The learning rate after the warmup.
    config.schedule.learning_rate = 0.1
    # Epochs in which the rate grows linearly from 0.
    config.schedule.warmup_epochs = 0.0
    # "step", "plateau": the factor of the rate at each step.
    config.schedule.factor = 0.1
    # "step": the epochs of the steps, such as (30, 60); or set `schedule.every`.
    config.schedule.epochs = ()
    # "step": epochs between steps. "restarts": epochs between restarts.
    config.schedule.every = 0
    # "plateau": what is followed on the validation images, "error", "loss" or "accuracy".
    config.schedule.metric = "error"
    # "plateau": epochs without an improvement before a step.
    config.schedule.patience = 10
    # "plateau": "min" for "error" and "loss", "max" for "accuracy".
    config.schedule.mode = "min"
    # "plateau": the least change that counts as an improvement.
    config.schedule.threshold = 1e-4
    # "plateau": "rel" if the threshold is a share of the best value, "abs" if it is a difference.
    config.schedule.threshold_mode = "rel"
    # "plateau": epochs after a step in which none are counted.
    config.schedule.cooldown = 0
    # "plateau": the smallest rate.
    config.schedule.min_lr = 0.0
    # Decay of the moving averages of the parameters and of BatchNorm's statistics; in step t, from
    # 0, it is at most (1 + t) / (10 + t). Above 0, the averages are scored and saved instead.
    config.ema_decay = 0.0
    # Micro-batches per step on each device (gradient accumulation).
    config.accumulate = 1
    # The weights that are scored and saved: "best" for those of the smallest validation error,
    # where there are validation images; "last" for the end of training.
    config.final_weights = "best"
    # Epochs without a smaller validation error after which training ends; 0 never ends it early.
    config.early_stopping = 0
    # Epochs to train. A larger number continues a finished run, but not one with the schedule
    # "cosine", whose learning rates depend on the number, nor one that `early_stopping` ended.
    config.epochs = 10
    # Images of a step, over all devices.
    config.batch_size = 128
    # The seed of weights, order, augmentation, and dropout.
    config.seed = 0

    # ---- Devices and checkpoints
    # "auto" is jit on one device and pmap on several; or "jit", "pmap", "shard_map".
    config.parallel = "auto"
    # Whether BatchNorm takes its statistics over all devices.
    config.sync_batch_norm = True
    # Steps between checkpoints; one is also written when the validation error falls, and at the
    # end.
    config.checkpoint_every_steps = 1000
    # The number of last checkpoints to keep, at least 2, besides the best.
    config.keep_checkpoints = 2
    return config


def product(axes: dict) -> list[dict]:
    """Returns every combination of the axes' values, as overrides.

    {"schedule.learning_rate": (0.1, 0.2), "seed": range(5)} gives ten.
    """
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
