"""ResNet-50 on ImageNet by torchvision's first recipe.

Batches of 256, a learning rate of 0.1 divided by 10 every 30 epochs, and a weight decay of 1e-4.

    python -m cnnjax.main --config configs/resnet50_imagenet.py --config.data_dir=FOLDER

FOLDER contains train/CLASS/IMAGE and val/CLASS/IMAGE. To read ImageNet as prepared by
tensorflow-datasets instead, use --config.dataset=tfds:imagenet2012. Training uses crops of random
area and aspect, and mirror images; the test uses the center 224 of 256 pixels. Computation is in
bfloat16 with float32 parameters.

torchvision's weights from this recipe have a top-1 error of 23.87 %. They were trained on eight
GPUs, each of which normalized its own 32 images; here BatchNorm normalizes over the whole batch
(`--config.sync_batch_norm=False` on eight GPUs is torchvision's way). Not measured here, because
this takes GPUs and ImageNet.
"""

from cnnjax.train import defaults


def get_config():
    config = defaults.get_config()
    config.model = "resnet50"
    config.dtype = "bfloat16"
    config.dataset = "folder"
    # 0 selects training crops of random area and aspect.
    config.resize = 0
    config.workers = 8
    config.augment.flip = True
    config.weight_decay = 1e-4
    config.schedule.update({"name": "step", "learning_rate": 0.1, "factor": 0.1, "every": 30})
    config.epochs = 90
    config.batch_size = 256
    return config
