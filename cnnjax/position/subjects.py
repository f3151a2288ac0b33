"""Encoders and photographs for studies of features inside and at the border of photographs.

Shared by the studies of patterns and of padding-aware channels.
"""

import functools
import itertools
import pathlib
from typing import NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import weights
from cnnjax.data import photographs
from cnnjax.models import Network, create_model
from cnnjax.nn.parameters import eval_shape
from cnnjax.position import patterns
from cnnjax.position.encoder import draw_variables, stage_shapes

# --- Points ---------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """One point of such a study.

    `part` names the study, `weights` is "random" or "trained".
    """

    part: str
    encoder: str
    weights: str
    padding: str
    seed: int


def list_subjects(options) -> list[tuple[str, str]]:
    """Lists the encoders and the origins of their weights; raises `ValueError` if none."""
    subjects = [(name, "random") for name in options.encoders]
    subjects += [(name, "trained") for name in options.trained]
    if not subjects:
        raise ValueError("encoders= and trained= are empty: there is no network to look at")
    return subjects


def flatten(results: list[dict]) -> list[dict]:
    """Returns one record for each stage of each encoder."""
    records = []
    for result in results:
        point = {name: result[name] for name in Trace._fields}
        records += [point | stage for stage in result["stages"]]
    return records


def subjects_of(results: list[dict]) -> list[tuple[str, str]]:
    """Returns the pairs of encoder and weights, in order."""
    return list(dict.fromkeys((result["encoder"], result["weights"]) for result in results))


# --- Networks -------------------------------------------------------------------------------------


def known_stages(model: Network, size: int, missing: tuple[str, ...]) -> list[str]:
    """Lists the stages that need none of the missing modules.

    Raises `ValueError` if there are none.
    """
    variables = {}
    for kind, modules in weights.variable_shapes(model).items():
        names = [name for name in modules if name.split(".")[0] not in missing]
        variables[kind] = {name: modules[name] for name in names}
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    names = list(stage_shapes(model, size))
    while names:
        stages = functools.partial(model.apply, method="stages", last=names[-1])
        try:
            return list(eval_shape(stages, variables, image))
        except flax.errors.FlaxError:
            # The class of the error depends on what is missing.
            names.pop()
    raise ValueError(f"no stage of the network can do without its modules {', '.join(missing)}")


class Subject:
    """One network with one origin of its weights: random if `file` is None."""

    def __init__(self, name: str, size: int, file: str | None, missing: tuple[str, ...]):
        self.size = size
        fields = {} if file is None else weights.fields_for(name, file)
        self.model = create_model(name, **fields)
        self.stages = known_stages(self.model, size, missing)
        self.margin = patterns.common_margin(self.model, self.stages, size)
        self.loaded = None
        if file is not None:
            self.loaded = weights.load_torchvision(file, self.model, missing)

    def variables(self, seed: int) -> dict:
        """Returns the file's variables, or random ones."""
        if self.loaded is not None:
            return self.loaded
        size = self.model.input_shape[0]
        return draw_variables(self.model, size, self.stages[-1], jax.random.key(seed))


class Shared(NamedTuple):
    """The encoders, by name and origin of weights, and each seed's photographs."""

    subjects: dict[tuple[str, str], Subject]
    paths: list[tuple[pathlib.Path, ...]]


def list_large(options) -> list[pathlib.Path]:
    """Lists the photographs; raises `ValueError` if one is smaller than the crop."""
    paths = photographs.list_photographs(options.photographs)
    photographs.check_sizes(paths, options.size, f"size={options.size}")
    return paths


def load_subjects(options) -> dict[tuple[str, str], Subject]:
    """Loads the encoders, by name and origin of weights."""
    subjects = {}
    for name in options.encoders:
        # With random weights, the same stages as with the file, for comparison.
        _, missing = options.trained.get(name, (None, ()))
        subjects[name, "random"] = Subject(name, options.size, None, missing)
    for name, (file, missing) in options.trained.items():
        subjects[name, "trained"] = Subject(name, options.size, file, missing)
    return subjects


def check_fills(subjects: dict[tuple[str, str], Subject], paddings: list[str]) -> None:
    """Raises `ValueError` if a padding does not fit an encoder's maps."""
    for subject, padding in itertools.product(subjects.values(), paddings):
        # Raises if a map is too small.
        stage_shapes(subject.model.clone(padding=padding), subject.size, subject.stages[-1])


# --- Features -------------------------------------------------------------------------------------


class Inside(NamedTuple):
    """The crops and features that all paddings of one seed share.

    `crop` is uint8 [n, size, size, 3]; `features` are its stages inside the photographs.
    """

    variables: dict
    crop: np.ndarray
    features: dict[str, np.ndarray]


# The points of one subject and seed follow each other, so one cached result is enough.
@functools.lru_cache(maxsize=1)
def look_inside(subject: Subject, seed: int, paths: tuple[pathlib.Path, ...]) -> Inside:
    """Computes the features of crops that see the photographs around them."""
    context = photographs.fit_squares(paths, subject.size + 2 * subject.margin)
    middle = slice(subject.margin, subject.margin + subject.size)
    variables = subject.variables(seed)
    inside = patterns.features_inside(
        subject.model, variables, context, subject.size, subject.stages
    )
    return Inside(variables, context[:, middle, middle], inside)
