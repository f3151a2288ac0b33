"""The reach of padding into a network's maps."""

import numpy as np
from jaxtyping import Float

from cnnjax.models import Network
from cnnjax.position.metrics import border_distance
from cnnjax.runtime.types import AnyArray
from cnnjax.visualize.stages import activations, receptive_field


def equivariance_error(
    model: Network,
    variables: dict,
    images: Float[AnyArray, "batch height width channels"],
    stage: str,
) -> Float[np.ndarray, " distances"]:
    """Compares a shifted image's features with the shifted features.

    Two windows, smaller than `images` by the stage's stride, are cut out at the upper left and at
    the lower right. The same content then lies one position further up and left in the second map.

    Returns, for each distance to the border in positions (0 is the border), the relative error: the
    root of the summed squared differences over the summed squared features, both over all images,
    channels and positions at that distance.

    Raises `ValueError` as `receptive_field`, or if the images are too small to compare.
    """
    # No fill changes the stride. Under 'none', an image of the publication's size, in which fields
    # are traced, may be too small for a stage that these images reach.
    down, right = receptive_field(model.clone(padding="zeros"), stage).step
    lower_right_maps = activations(model, variables, images[:, down:, right:], stage)
    upper_left_maps = activations(model, variables, images[:, :-down, :-right], stage)
    # The positions that both windows have.
    lower_right = np.asarray(lower_right_maps, np.float64)[:, :-1, :-1]
    upper_left = np.asarray(upper_left_maps, np.float64)[:, 1:, 1:]
    if not upper_left.size:
        raise ValueError(
            f"images of {images.shape[1]}x{images.shape[2]} leave no two positions of "
            f"stage={stage!r} to compare under padding={model.padding!r}; "
            "use larger ones or another stage"
        )
    distance = border_distance(*upper_left.shape[1:3]).ravel()
    different = np.bincount(distance, np.square(lower_right - upper_left).sum((0, 3)).ravel())
    whole = np.bincount(distance, np.square(upper_left).sum((0, 3)).ravel())
    return np.sqrt(different / np.maximum(whole, np.finfo(np.float64).tiny))
