"""Networks by name: one file per published family."""

from cnnjax.models import (  # noqa: F401  (each registers its networks)
    alexnet,
    alexnet_2012,
    densenet,
    fcn,
    googlenet,
    googlenet_2014,
    inception,
    lectures,
    lenet,
    mlp,
    mnasnet,
    mobilenet,
    resnet,
    shufflenet,
    speedrun,
    squeezenet,
    vgg,
)
from cnnjax.models.base import Network, create_model, forget_files, list_models

__all__ = ["Network", "create_model", "list_models"]

# A user's file may have imported this package first; these networks are not that file's.
forget_files()
