"""What a network responds to, as numbers and as pictures.

    python -m cnnjax.visualize levels --model squeezenet1_1 --weights FILE --photographs FOLDER
        --workdir runs/levels

`stages`, `gradients`, `class_maps`, `occluders`, `ascent`, `fields` and `borders` compute,
`figures` draws, and `commands` holds the commands. Functions take and return arrays: `images` are
[batch, height, width, channels] as the network takes them, `stage` is the name of a stage.
"""

from typing import TYPE_CHECKING

from cnnjax.runtime import lazy

if TYPE_CHECKING:
    from cnnjax.visualize.__main__ import main
    from cnnjax.visualize.ascent import maximize
    from cnnjax.visualize.borders import equivariance_error
    from cnnjax.visualize.class_maps import grad_cam
    from cnnjax.visualize.fields import effective_receptive_field, effective_size, frame
    from cnnjax.visualize.gradients import RULES, saliency
    from cnnjax.visualize.occluders import occlusion
    from cnnjax.visualize.stages import (
        activations,
        first_filters,
        network_input,
        peaks,
        receptive_field,
        stage_channels,
    )

__all__ = [
    "RULES",
    "activations",
    "effective_receptive_field",
    "effective_size",
    "equivariance_error",
    "first_filters",
    "frame",
    "grad_cam",
    "main",
    "maximize",
    "network_input",
    "occlusion",
    "peaks",
    "receptive_field",
    "saliency",
    "stage_channels",
]

__getattr__, __dir__ = lazy.attributes(
    __name__,
    {
        "RULES": "gradients",
        "activations": "stages",
        "effective_receptive_field": "fields",
        "effective_size": "fields",
        "equivariance_error": "borders",
        "first_filters": "stages",
        "frame": "fields",
        "grad_cam": "class_maps",
        "main": "__main__",
        "maximize": "ascent",
        "network_input": "stages",
        "occlusion": "occluders",
        "peaks": "stages",
        "receptive_field": "stages",
        "saliency": "gradients",
        "stage_channels": "stages",
    },
)
