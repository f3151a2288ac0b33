"""What a network responds to, as numbers and as pictures.

    python -m cnnjax.visualize levels --model squeezenet1_1 --weights FILE --photographs FOLDER
        --workdir runs/levels

`stages`, `gradients`, `class_maps`, `occluders`, `ascent`, `fields` and `borders` compute,
`figures` draws, and `commands` holds the commands. Functions take and return arrays: `images` are
[batch, height, width, channels] as the network takes them, `stage` is the name of a stage.
"""

from cnnjax.runtime import lazy

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
