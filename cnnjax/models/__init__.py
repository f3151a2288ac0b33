"""Networks by name: one file per published family."""
from cnnjax.models import resnet, vgg  # noqa: F401  (each registers its networks)
from cnnjax.models.base import Network, create_model, list_models

__all__ = ["Network", "create_model", "list_models"]
