"""User errors end every command with one clear line and damage nothing.

Each case checks the exit code (2) and standard error (one line, no traceback).
"""

import gzip
import json
import pathlib
import re
import shutil

import forked
import numpy as np
import PIL.Image
import pytest
import quick
import safetensors.numpy

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
TRAIN, STUDY = ("main", "--config=configs/lenet_digits.py"), ("main", "--config=configs/posenet.py")
# One small network, whose stages are found quickly.
SQUEEZENET = (*STUDY, "--config.encoders=('squeezenet1_1',)")
CIFAR, MNIST = (*TRAIN, "--config.dataset=cifar10"), (*TRAIN, "--config.dataset=mnist")
FOLDER = (*TRAIN, "--config.dataset=folder", "--config.model=squeezenet1_1")
MLP = (*TRAIN, "--config.model=mlp1")
CLASSES = (*FOLDER, "--config.data_dir=CLASSES", "--config.batch_size=2")
WEIGHTS = (
    *SQUEEZENET,
    "--config.photographs=PHOTOGRAPHS",
    "--config.image_size=32",
    "--config.stages=('fire3',)",
    "--config.paddings=('zeros',)",
    "--config.sgd_paddings=()",
    "--config.n_train=1",
    "--config.n_held_out=1",
    "--config.n_test=1",
    "--config.seeds=1",
)
LEVELS = ("visualize", "filters", "--model=squeezenet1_1", "--workdir=OUT")
SOUP = ("combine", "--method=uniform", "--workdir=OUT")

# Configuration files by name.
CONFIGURATIONS = {
    "undefined": "import cnnjax\n\nmissing\n",
    "nothing_returned": "def get_config():\n    pass\n",
    "unknown_keys": """
from cnnjax.train import defaults

def get_config():
    config = defaults.get_config()
    config.epoch = 1
    config.lr = 0.5
    return config

def sweep():
    return [{"seed": 0}]
""",
    "unknown_study_keys": """
from cnnjax.position import defaults

def get_config():
    config = defaults.get_config()
    config.n_trian = 1
    return config
""",
    "from_nothing": """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"kind": "train", "model": "lenet"})
""",
    "no_model": """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({"kind": "train"})
""",
    "none": """
from cnnjax.train import defaults

def get_config():
    config = defaults.get_config()
    config.n_validation = None
    return config
""",
    "failing_model": """
from cnnjax.models import base
from cnnjax.train import defaults

def get_config():
    config = defaults.get_config()
    config.epochs = 1 // 0
    return config
""",
}

# Each case: a command's arguments, and a part of the expected error line. Words in capitals stand
# for paths that `place` creates.
CASES = [
    # Flags and configuration files.
    (("main",), "--config is missing; name a configuration file"),
    (("main", "--config=configs/nothing.py"), "config='configs/nothing.py' is not a file"),
    (("main", "--config=FILES/empty.py"), "empty.py' has no get_config(): define one"),
    (("main", "--config=FILES/wrong.py"), "wrong.py', line 1: SyntaxError: invalid syntax"),
    (
        ("main", "--config=FILES/undefined.py"),
        "undefined.py', line 3: NameError: name 'missing' is not defined",
    ),
    (
        ("main", "--config=FILES/nothing_returned.py"),
        "nothing_returned.py' returns NoneType, not a ConfigDict",
    ),
    (
        ("main", "--config=FILES/unknown_keys.py"),
        "epoch is not a key of the configuration; did you mean epochs?",
    ),
    (
        ("sweep", "--config=FILES/unknown_keys.py", "--workdir=OUT"),
        "epoch is not a key of the configuration; did you mean epochs?",
    ),
    (
        ("main", "--config=FILES/unknown_study_keys.py"),
        "n_trian is not a key of the configuration; did you mean n_train?",
    ),
    (
        ("main", "--config=FILES/from_nothing.py"),
        "the configuration lacks the key accumulate; start from cnnjax.train.defaults.get_config()",
    ),
    (("main", "--config=FILES/no_model.py"), "the configuration lacks the key accumulate; start"),
    (("main", "--config=FILES/failing_model.py"), "line 7: ZeroDivisionError: "),
    ((*TRAIN, "--workdir="), "argument --workdir: '' is not a path"),
    ((*TRAIN, "--distributed="), "distributed='' is neither 'auto' nor HOST:PORT,PROCESSES,INDEX"),
    # Processes that compute together would train two runs as one.
    (
        ("sweep", "--config=configs/lenet_digits.py", "--distributed=auto"),
        "--distributed is not an option; there are --debug, --config, --workdir, --help, ",
    ),
    (
        ("sweep", "--config=configs/lenet_digits.py", "--workdir=OUT", "--config.seed=7"),
        "--config.seed has no effect where sweep() of config='configs/lenet_digits.py' sets seed;",
    ),
    (
        ("sweep", "--config=configs/lenet_digits.py", "--workdir=OUT", "--runs=OUT/no.json"),
        "[Errno 2] No such file or directory: 'OUT/no.json'",
    ),
    (
        ("sweep", "--config=configs/lenet_digits.py", "--workdir=OUT", "--jobs=8"),
        "jobs=8 is for jobs, which --launcher=slurm or --launcher=local starts",
    ),
    (
        ("sweep", "--config=configs/lenet_digits.py", "--workdir=OUT", "--slurm=timeout_min=9"),
        "slurm=['timeout_min=9'] is for jobs, which --launcher=slurm or",
    ),
    (
        (*STUDY, "--config.encoders=('vgg16','vgg16')"),
        "encoders=('vgg16', 'vgg16') must name each once",
    ),
    (
        (*STUDY, "--config.paddings=('zeros',)", "--config.sgd_paddings=('reflect',)"),
        "sgd_paddings=('reflect',) must all be among paddings=('zeros',)",
    ),
    ((*STUDY, "--wrkdir=x"), "--wrkdir is not an option; there are --debug, --config, --workdir"),
    ((*STUDY, "surplus"), "unexpected argument 'surplus'"),
    (
        (*STUDY, "--config.encodrs=('vgg16',)"),
        "encodrs is not a key of the configuration; did you mean encoders?",
    ),
    ((*STUDY, "--config.seeds=many"), "seeds='many' is not of the type int"),
    ((*STUDY, "--config.seeds"), "--config.seeds has no value"),
    ((*STUDY, "--config.seed=2147483648"), "seed=2147483648 is not a number of at least 0 and at"),
    (
        (*STUDY, "--config.seed=2147483647", "--config.seeds=2"),
        "seed=2147483647 and seeds=2 need seeds up to 2147483648; the largest is 2147483647",
    ),
    ((*TRAIN, "--config.seed=2147483648"), "seed=2147483648 is not a number of at least 0 and at"),
    ((*TRAIN, "--config.augment.flop=True"), "augment.flop is not a key of the configuration; did"),
    (
        (*TRAIN, "--config.padding=reflect"),
        "padding is not a key of the configuration; did you mean model_fields.padding?",
    ),
    ((*STUDY, "--config.model_fields.x=1"), "model_fields.x is not a key of the configuration"),
    (
        (*STUDY, "--config.kind=dance"),
        "kind='dance' of the configuration is not one of position, train",
    ),
    # Values of another type.
    ((*TRAIN, "--config.early_stopping=None"), "early_stopping=None is not of the type int"),
    ((*TRAIN, "--config.seed=None"), "seed=None is not of the type int"),
    ((*TRAIN, "--config.epochs=True"), "epochs=True is not of the type int"),
    ((*TRAIN, "--config.decay_all=None"), "decay_all=None is not of the type bool"),
    ((*TRAIN, "--config.augment.flip=None"), "augment.flip=None is not of the type bool"),
    (("main", "--config=FILES/none.py"), "n_validation=None is not of the type int"),
    ((*STUDY, "--config.seeds=None"), "seeds=None is not of the type int"),
    ((*STUDY, "--config.registered=None"), "registered=None is not of the type bool"),
    ((*STUDY, "--config.encoders=1"), "encoders=1 is not a name; encoders accepts a tuple of"),
    ((*STUDY, "--config.missing=None"), "missing=None is not a name; missing accepts a tuple of"),
    ((*STUDY, "--config.paddings=['none',['zeros']]"), "paddings=('zeros',) is not a name"),
    ((*STUDY, "--config.noise=(None,1)"), "noise=(None, 1) is not a mean and a standard deviation"),
    ((*TRAIN, "--config.freeze=None"), "freeze=None is not a name; freeze accepts a tuple of"),
    ((*TRAIN, "--config.freeze={}"), "freeze={} is not a name; freeze accepts a tuple of"),
    (
        (*TRAIN, "--config.freeze={'conv1'}"),
        "freeze=({'conv1'},) is not a string, a number, or a tuple of them",
    ),
    ((*TRAIN, "--config.initial_parts=1"), "initial_parts=1 is not a name; initial_parts accepts"),
    ((*TRAIN, "--config.rates=0.1"), "rates=(0.1,) is not a tuple of pairs of a part and a"),
    ((*TRAIN, "--config.rates=None"), "rates=(None,) is not a tuple of pairs of a part and a"),
    (
        (*TRAIN, "--config.rates=('conv1',0.1)"),
        "rates=('conv1', 0.1) is not a tuple of pairs of a part and a positive number, such as "
        "(('conv1', 0.1),)",
    ),
    (
        (*TRAIN, "--config.schedule.name=step", "--config.schedule.epochs=10-14"),
        "schedule.epochs=('10-14',) are not rising numbers of at least 1",
    ),
    (
        (*TRAIN, "--config.model_fields.padding.x=1"),
        "model_fields.padding.x is not a key of the configuration; did you mean "
        "model_fields.padding?",
    ),
    (
        (*TRAIN, "--config.model_fields.widths[0]=1"),
        "model_fields.widths[0] is not a key of the configuration",
    ),
    (
        (*MLP, "--config.model_fields.hidden={1:2}"),
        "model_fields.hidden={1: 2} is not a string, a number, or a tuple of them",
    ),
    (
        (*MLP, "--config.model_fields.hidden=64"),
        "hidden=64 is not of the type tuple[int, ...], as mlp1 expects",
    ),
    (
        (*MLP, "--config.model_fields.hidden=(64,'a')"),
        "hidden=(64, 'a') is not of the type tuple[int, ...], as mlp1 expects",
    ),
    # The list is read as a tuple; otherwise, building the model would already fail.
    (
        (*MLP, "--config.model_fields.hidden=[64]", "--config.freeze=('head',)"),
        "freeze='head' names no parameters of the model",
    ),
    # Work directories.
    ((*SQUEEZENET, "--workdir=FILES/file/run"), "cannot be written to: Not a directory"),
    (
        (*TRAIN, "--workdir=FILES/other"),
        "holds a run of another configuration (batch_size=64 there, 128 now); choose another "
        "--workdir",
    ),
    ((*TRAIN, "--workdir=FILES/scrawl"), "holds a config.json that is not JSON"),
    ((*TRAIN, "--workdir=/proc/run"), "workdir='/proc/run' cannot be written to: No such file"),
    # The position study.
    ((*STUDY, "--config.encoders=('vgg61',)"), "model='vgg61' is not known; did you mean vgg19"),
    ((*STUDY, "--config.encoders=('mlp1',)"), "image_size=224: MLP takes only images of 32x32x3"),
    ((*STUDY, "--config.paddings=('mirror',)"), "padding='mirror' is not one of zeros, none"),
    ((*STUDY, "--config.paddings=()"), "paddings=() must name at least one"),
    ((*STUDY, "--config.sgd_paddings=('mirror',)"), "padding='mirror' is not one of"),
    ((*STUDY, "--config.targets=('D',)"), "targets='D' is not one of H, V, G, HS, VS"),
    (
        (*STUDY, "--config.targets=('H','H')"),
        "targets=('H', 'H') must name at least one, each once",
    ),
    (
        (*STUDY, "--config.data=('gray',)"),
        "data='gray' is not one of natural, shuffled_pixels, black, white, noise",
    ),
    ((*SQUEEZENET, "--config.stages=('conv9',)"), "stages='conv9' is not a stage that"),
    ((*STUDY, "--config.kernel=29"), "kernel=29 is not between 1 and 28, the side of the features"),
    ((*STUDY, "--config.kernel=0"), "kernel=0 is not between 1 and 28"),
    ((*STUDY, "--config.noise=(25.0,)"), "noise=(25.0,) is not a mean and a standard deviation"),
    ((*STUDY, "--config.noise=(25.0,-1.0)"), "noise=(25.0, -1.0) is not a mean and a standard"),
    ((*STUDY, "--config.seeds=0"), "seeds=0 is not a positive number"),
    ((*STUDY, "--config.n_test=0"), "n_test=0 is not a positive number"),
    ((*STUDY, "--config.readout_padding=-1"), "readout_padding=-1 is not a number of at least 0"),
    ((*STUDY, "--config.pixels=raw"), "pixels='raw' is not one of imagenet, unit"),
    ((*STUDY, "--config.image_size=1"), "image_size=1 is not a number of pixels of at least 13"),
    ((*STUDY, "--config.image_size=9000"), "smaller than image_size=9000"),
    ((*STUDY, "--config.photographs=FILES/nothing"), "photographs='FILES/nothing' is not a folder"),
    ((*STUDY, "--config.photographs=EMPTY"), "holds no image file"),
    ((*STUDY, "--config.photographs=BROKEN"), "BROKEN/a.jpg is not a readable image: cannot"),
    (
        (*STUDY, "--config.photographs=BOMB"),
        "a.png is not a readable image: at most 89,478,485 pixels are accepted",
    ),
    # Pillow only warns of up to twice its limit.
    (
        (*STUDY, "--config.photographs=LARGE"),
        "a.png is not a readable image: it has 100,000,000 pixels; at most 89,478,485 are",
    ),
    # Weights.
    (
        (*WEIGHTS, "--config.weights=FILES/nothing.safetensors"),
        "nothing.safetensors' is neither 'random', 'imagenet' nor a safetensors or .pth file",
    ),
    ((*WEIGHTS, "--config.weights=FILES/pickle.pth"), "is not a readable safetensors or .pth file"),
    (
        (*WEIGHTS, "--config.weights=FILES/cut.safetensors"),
        "is not a readable safetensors or .pth file",
    ),
    (
        (*WEIGHTS, "--config.weights=FILES/other.safetensors"),
        "not in the file: classifier.1.bias (1000,); ",
    ),
    (
        (*WEIGHTS, "--config.weights=FILES/other.safetensors", "--config.missing=('head',)"),
        "missing=['head'] are not modules of this model",
    ),
    # Training.
    ((*TRAIN, "--config.epochs=0"), "epochs=0 is not a number of at least 1"),
    ((*TRAIN, "--config.batch_size=0"), "batch_size=0 is not a number of at least 1"),
    ((*TRAIN, "--config.batch_size=2000"), "batch_size=2000 is more than the 1437 training images"),
    (
        (*TRAIN, "--config.accumulate=3"),
        "batch_size=128 is not a multiple of 1 device(s) times accumulate=3",
    ),
    (
        (*TRAIN, "--config.mixup=0.2", "--config.batch_size=4", "--config.accumulate=4"),
        "mixup=0.2 has no two images to mix: batch_size=4 is one image for each of",
    ),
    ((*TRAIN, "--config.seed=-1"), "seed=-1 is not a number of at least 0"),
    ((*TRAIN, "--config.mixup=-0.1"), "mixup=-0.1 is not a number of at least 0"),
    ((*TRAIN, "--config.mixup=nan"), "mixup=nan is not a number of at least 0"),
    ((*TRAIN, "--config.mixup=inf"), "mixup=inf is not a finite number"),
    ((*TRAIN, "--config.weight_decay=nan"), "weight_decay=nan is not a number of at least 0"),
    ((*TRAIN, "--config.weight_decay=-1.0"), "weight_decay=-1.0 is not a number of at least 0"),
    ((*TRAIN, "--config.clip_norm=-1.0"), "clip_norm=-1.0 is not a number of at least 0"),
    ((*TRAIN, "--config.clip_norm=nan"), "clip_norm=nan is not a number of at least 0"),
    ((*TRAIN, "--config.clip_norm=inf"), "clip_norm=inf is not a finite number"),
    ((*TRAIN, "--config.label_smoothing=1.0"), "label_smoothing=1.0 is not between 0 and 1"),
    ((*TRAIN, "--config.ema_decay=1.0"), "ema_decay=1.0 is not between 0 and 1"),
    ((*TRAIN, "--config.momentum=-0.5"), "momentum=-0.5 is not between 0 and 1"),
    ((*TRAIN, "--config.model=lenet6"), "model='lenet6' is not known; did you mean lenet"),
    ((*TRAIN, "--config.model_fields.padding=mirror"), "padding='mirror' is not one of"),
    (
        (*TRAIN, "--config.model_fields.pading=zeros"),
        "pading='zeros' is not a field of lenet; it accepts num_classes, padding",
    ),
    (
        (*TRAIN, "--config.model=alexnet", "--config.model_fields.dropout=much"),
        "dropout='much' is not of the type float, as alexnet expects",
    ),
    (
        (*TRAIN, "--config.model_fields.num_classes=5"),
        "model_fields.num_classes=5: the data and the keys of the configuration decide this field",
    ),
    ((*TRAIN, "--config.model=FILES/nothing.py:Net"), "nothing.py:Net': there is no Python file '"),
    ((*TRAIN, "--config.model=FILES/undefined.py:Net"), "line 3: NameError: name 'missing'"),
    ((*TRAIN, "--config.model=FILES/empty.py:Net"), "empty.py has no network 'Net'"),
    ((*TRAIN, "--config.model=nowhere.at_all:Net"), "ModuleNotFoundError: No module named"),
    ((*TRAIN, "--config.model=collections:Counter"), "is a Counter, not a cnnjax.models.Network"),
    ((*TRAIN, "--config.optimizer=sdg"), "optimizer='sdg' is not one of sgd"),
    ((*TRAIN, "--config.loss=l2"), "loss='l2' is not one of cross_entropy"),
    ((*TRAIN, "--config.dtype=float16"), "dtype='float16' is not one of float32, bfloat16"),
    (
        (*TRAIN, "--config.parallel=pmapped"),
        "parallel='pmapped' is not one of auto, jit, pmap, shard_map",
    ),
    ((*TRAIN, "--config.pixels=raw"), "pixels='raw' is not one of standardised, imagenet, centred"),
    ((*TRAIN, "--config.test_views=3"), "test_views=3 is not one of 1, 2, 10"),
    (
        (*TRAIN, "--config.test_views=10"),
        "test_views=10 takes corners, which needs a streamed dataset",
    ),
    (
        (*TRAIN, "--config.augment.fill=mirror"),
        "augment.fill='mirror' is not one of zeros, reflect",
    ),
    ((*TRAIN, "--config.augment.crop=-1"), "augment.crop=-1 is not a number of at least 0"),
    ((*TRAIN, "--config.augment.cutout=-3"), "augment.cutout=-3 is not a number of at least 0"),
    ((*TRAIN, "--config.augment.colour=nan"), "augment.colour=nan is not a number of at least 0"),
    (
        (*TRAIN, "--config.augment.colour=0.1"),
        "augment.colour=0.1 is for images of three channels; the images of dataset='digits' have 1",
    ),
    ((*TRAIN, "--config.schedule.name=stairs"), "schedule.name='stairs' is not one of constant"),
    (
        (*TRAIN, "--config.schedule.every=5"),
        "schedule.every=5: schedule.name='constant' reads none of these and accepts their "
        "defaults, every=0; set schedule.name, or these keys",
    ),
    (
        (*TRAIN, "--config.schedule.name=cosine", "--config.schedule.min_lr=1e-5"),
        "schedule.min_lr=1e-05: schedule.name='cosine' reads none of these and accepts their "
        "defaults, min_lr=0.0; set schedule.name, or these keys",
    ),
    (
        (*TRAIN, "--config.image_size=32"),
        "image_size=32 is for streamed images, of dataset='folder' or 'tfds:NAME'; "
        "dataset='digits' accepts 224, the default",
    ),
    (
        (*TRAIN, "--config.schedule.warmup_epochs=nan"),
        "schedule.warmup_epochs=nan is not a number of at least 0",
    ),
    (
        (*TRAIN, "--config.schedule.warmup_epochs=inf"),
        "schedule.warmup_epochs=inf is not a finite number",
    ),
    (
        (*TRAIN, "--config.schedule.name=plateau"),
        "schedule.name='plateau' watches the validation error: n_validation=0",
    ),
    (
        (*CLASSES, "--config.early_stopping=2"),
        "early_stopping=2 watches the validation error: val is the test set, as there is no "
        "labeled split named test; add one, or hold out images with n_validation=N",
    ),
    ((*TRAIN, "--config.n_validation=1437"), "n_validation=1437 is not between 1 and 1427"),
    # Data.
    ((*TRAIN, "--config.dataset=cifar11"), "dataset='cifar11' is not one of digits, mnist"),
    (
        (*TRAIN, "--config.dataset=tfds:nothing", "--config.data_dir=EMPTY"),
        "dataset='tfds:nothing' has no split 'train' in data_dir='EMPTY' that can be read",
    ),
    (
        (*CIFAR, "--config.data_dir=FILES/short"),
        "data_batch_1.bin holds 100 bytes of data where [10000, 3073] are 30,730,000",
    ),
    (
        (*CIFAR, "--config.data_dir=FILES/labels"),
        "the training set of cifar10 in data_dir='FILES/labels' has the label 77; expected 0 to 9",
    ),
    (
        (*MNIST, "--config.data_dir=FILES/scrawl"),
        "FILES/scrawl/mnist/train-images-idx3-ubyte.gz has the MD5 hash",
    ),
    (
        (*MNIST, "--config.data_dir=FILES/short"),
        "FILES/short/mnist/train-images-idx3-ubyte.gz has the MD5 hash",
    ),
    ((*FOLDER, "--config.data_dir=EMPTY"), "has no folder train of images by class"),
    (FOLDER, "data_dir='' has no folder train of images by class; name the folder that"),
    (
        (*FOLDER, "--config.data_dir=FILES/one_class"),
        "data_dir='FILES/one_class' has no folder test or val or validation or valid of images",
    ),
    (
        CLASSES,
        "dataset='folder' in data_dir='CLASSES' has one class, 'cat'; loss='cross_entropy' takes",
    ),
    (
        (*CLASSES, "--config.resize=144", "--config.image_size=160"),
        "resize=144 is not 0 or at least image_size=160",
    ),
    # Sweeps, combinations, summaries, figures.
    (
        ("sweep", "--config=configs/posenet.py", "--workdir=OUT"),
        "kind='position' of the configuration is not 'train'",
    ),
    (
        ("sweep", "--config=configs/alexnet_imagenet.py", "--workdir=OUT"),
        "config='configs/alexnet_imagenet.py' has no sweep(): define one that returns a list",
    ),
    ((*SOUP, "--runs", "FILES/nothing*"), "matches no work directory of a training run"),
    ((*SOUP, "--runs", "FILES/other"), "takes at least two runs"),
    (("combine", "--method=uniform"), "the following arguments are required: --runs, --workdir"),
    (
        ("combine", "--method=stew", "--runs", "FILES/other", "--workdir=OUT"),
        "invalid choice: 'stew'",
    ),
    (("summary",), "the following arguments are required: model"),
    (("summary", "vgg61"), "model='vgg61' is not known"),
    (("summary", "vgg16", "--input=0"), "'0' is not a whole number of at least 1"),
    (
        ("summary", "vgg16", "--input=big"),
        "argument --input: 'big' is not a whole number of at least 1",
    ),
    (
        ("summary", "vgg16", "--batch=0"),
        "argument --batch: '0' is not a whole number of at least 1",
    ),
    (
        ("summary", "vgg16", "--input=16"),
        "input=16x16: a 2x2 pool with padding='zeros' has no output on a 1x1 map",
    ),
    (("summary", "vgg16", "--padding=mirror"), "padding='mirror' is not one of"),
    (("summary", "vgg16", "--format=html"), "format='html' is not one of text, markdown, json"),
    ((*LEVELS, "--weights=FILES/nothing.safetensors"), "nothing.safetensors' is not a file"),
    ((*LEVELS, "--weights=random", "--workdir="), "argument --workdir: '' is not a path"),
    (("visualize", "films", "--model=vgg16", "--workdir=OUT"), "invalid choice: 'films'"),
    (
        ("visualize", "filters", "--model=vgg61", "--weights=random", "--workdir=OUT"),
        "model='vgg61' is not known",
    ),
]


def place(folder: pathlib.Path) -> dict[str, str]:
    """Creates the faulty files; returns the path for each word in capitals."""
    files, empty, broken, bomb, large, photographs, classes = (
        folder / name
        for name in ("files", "empty", "broken", "bomb", "large", "photographs", "classes")
    )
    for made in (files, empty, broken, bomb, large, photographs, classes):
        made.mkdir()
    (files / "file").write_text("")
    (files / "empty.py").write_text("")
    (files / "wrong.py").write_text("def get_config(:\n")
    for name, text in CONFIGURATIONS.items():
        (files / f"{name}.py").write_text(text)
    for name, text in (
        (
            "other",
            json.dumps(
                {
                    "kind": "train",
                    "batch_size": 64,
                    "model_fields": {},
                    "n_validation": 0,
                    "dataset": "digits",
                }
            ),
        ),
        ("scrawl", "{"),
    ):
        (files / name).mkdir()
        (files / name / "config.json").write_text(text)
    (files / "pickle.pth").write_bytes(b"\x80\x04K\x01.")
    safetensors.numpy.save_file(
        {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}, files / "other.safetensors"
    )
    (files / "cut.safetensors").write_bytes((files / "other.safetensors").read_bytes()[:-100])
    for name, content in (("short", bytes(100)), ("labels", 10_000 * (bytes([77]) + bytes(3072)))):
        (files / name / "cifar-10-batches-bin").mkdir(parents=True)
        for batch in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
            (files / name / "cifar-10-batches-bin" / batch).write_bytes(content)
    for name, content in (
        ("scrawl", b"not gzip"),
        ("short", gzip.compress(bytes([0, 0, 8, 3, 0, 0, 234, 96, 0, 0, 0, 28, 0, 0, 0, 28]))),
    ):
        (files / name / "mnist").mkdir(parents=True)
        for part in (
            "train-images-idx3",
            "train-labels-idx1",
            "t10k-images-idx3",
            "t10k-labels-idx1",
        ):
            (files / name / "mnist" / f"{part}-ubyte.gz").write_bytes(content)
    (files / "other" / "results.json").write_text("{}")
    for number in range(3):
        PIL.Image.fromarray(np.full((40, 40, 3), 80 * number, np.uint8)).save(
            photographs / f"{number}.png"
        )
        (broken / f"{'abc'[number]}.jpg").write_bytes(b"\xff\xd8 no image")
    (files / "one_class" / "train" / "cat").mkdir(parents=True)
    (files / "one_class" / "train" / "cat" / "0.png").write_bytes(
        (photographs / "0.png").read_bytes()
    )
    for split in ("train", "val"):
        (classes / split / "cat").mkdir(parents=True)
        for image in photographs.iterdir():
            (classes / split / "cat" / image.name).write_bytes(image.read_bytes())
    # A decompression bomb: a file of 300 kB with 900 million pixels.
    PIL.Image.new("1", (30_000, 30_000)).save(bomb / "bomb.png")
    for name in "ab":
        (bomb / f"{name}.png").write_bytes((bomb / "bomb.png").read_bytes())
    PIL.Image.new("1", (10_000, 10_000)).save(large / "a.png")
    for name in "bc":
        (large / f"{name}.png").write_bytes((large / "a.png").read_bytes())
    return {
        "FILES": str(files),
        "EMPTY": str(empty),
        "BROKEN": str(broken),
        "BOMB": str(bomb),
        "LARGE": str(large),
        "PHOTOGRAPHS": str(photographs),
        "CLASSES": str(classes),
        "OUT": str(folder / "out"),
    }


def stamps(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Returns the size and the time of the last change of each file."""
    found = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Runs every case and checks that none has changed a file.

    Returns (exit code, standard output, standard error, expected message) for each case.
    """
    folder = tmp_path_factory.mktemp("wrong")
    words = place(folder)

    def filled(text):
        for word, stands in words.items():
            text = text.replace(word, stands)
        return text

    commands = [
        (command, [filled(argument) for argument in arguments])
        for (command, *arguments), _ in CASES
    ]
    # Commands run in `folder`, whose runs/ is no one else's.
    shutil.copytree(ROOT / "configs", folder / "configs")
    before = stamps(folder)
    paths = set(folder.rglob("*"))
    exchange = tmp_path_factory.mktemp("exchange")
    cases, found = exchange / "cases.json", exchange / "found.json"
    cases.write_text(json.dumps(commands))
    found.touch()
    process = forked.run("bad_input_driver", folder, cases, found, flags=quick.FLAGS, figures=True)
    outcomes = [json.loads(line) for line in found.read_text().splitlines()]
    crashed = commands[len(outcomes) :][:1]
    assert process.returncode == 0, f"{process.returncode} in {crashed}: {process.stderr}"
    after = {path: stamp for path, stamp in stamps(folder).items() if path in before}
    assert after == before
    # A refused run creates no folder.
    assert set(folder.rglob("*")) == paths
    return [
        (*outcome, filled(message)) for outcome, (_, message) in zip(outcomes, CASES, strict=True)
    ]


@pytest.mark.parametrize(
    "number",
    range(len(CASES)),
    ids=lambda number: " ".join(CASES[number][0][:1] + CASES[number][0][-1:]),
)
def test_one_clear_line(done, number):
    code, output, errors, message = done[number]
    # Log lines begin with the time.
    lines = [line for line in errors.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert code == 2 and output == "" and "Traceback" not in errors, errors
    assert len(lines) == 1 and "error: " in lines[0] and message in lines[0], errors
