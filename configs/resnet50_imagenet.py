"""ResNet-50 on ImageNet by torchvision's first recipe.

Batches of 256, a rate of 0.1 divided by 10 every 30 epochs, and a decay of 1e-4.

    python -m cnnjax.main --config configs/resnet50_imagenet.py --config.data_dir=FOLDER

FOLDER holds train/CLASS/IMAGE and val/CLASS/IMAGE; --config.dataset=tfds:imagenet2012 reads what
tensorflow-datasets prepared. Crops of random area and aspect with mirror images; the center of 224
of 256 pixels in the test. torchvision's weights by this recipe err on 23.87 % (top 1). Computed in
bfloat16 with float32 parameters. Not measured here: this takes GPUs and ImageNet.
"""

from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "resnet50"
    config.dtype = "bfloat16"
    config.dataset = "folder"
    config.resize = 0
    config.workers = 8
    config.augment.flip = True
    config.weight_decay = 1e-4
    config.schedule.update({"name": "step", "learning_rate": 0.1, "factor": 0.1, "every": 30})
    config.epochs = 90
    config.batch_size = 256
    return config
