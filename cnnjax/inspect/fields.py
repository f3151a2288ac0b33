"""Receptive fields, followed through a network's traced operations."""

import dataclasses
import functools
from collections.abc import Collection, Sequence

import jax

from cnnjax.inspect.trace import LOOPS, apply, follow, trace, with_local_fill
from cnnjax.nn.parameters import eval_shape


@dataclasses.dataclass(frozen=True)
class Field:
    """The part of the image that a map's output positions see, along height and width.

    Position i sees the pixels from step * i + low to step * i + high, both included.
    """

    step: tuple[int, ...] = (1, 1)
    low: tuple[int, ...] = (0, 0)
    high: tuple[int, ...] = (0, 0)

    def shifted(self, by: Sequence[int]) -> "Field":
        """Returns the field of the map without its first `by` positions.

        A negative number adds positions in front.
        """
        return Field(self.step, self._moved(self.low, by), self._moved(self.high, by))

    def strided(self, strides: Sequence[int]) -> "Field":
        """Returns the field of every `strides`-th position."""
        step = tuple(step * stride for step, stride in zip(self.step, strides))
        return Field(step, self.low, self.high)

    def widened(self, by: Sequence[int]) -> "Field":
        """Returns the field of a window that reaches `by` positions further."""
        return Field(self.step, self.low, self._moved(self.high, by))

    def size(self) -> tuple[int, ...]:
        """Returns the height and width in pixels."""
        return tuple(high - low + 1 for low, high in zip(self.low, self.high))

    def _moved(self, pixels, positions):
        return tuple(
            pixel + step * position for pixel, step, position in zip(pixels, self.step, positions)
        )


@dataclasses.dataclass(frozen=True)
class Unlocated:
    """The field of a value whose positions are not followed to places in the image.

    Attributes:
      reason: what such a stage does, for an error.
    """

    reason: str


# Flattened, globally pooled, or combined with such a value at every position.
WHOLE_IMAGE = Unlocated("sees the whole image, as after GroupNorm or squeeze-and-excitation")
UPSAMPLED = Unlocated("is upsampled by a transposed convolution, whose field is not followed")
REARRANGED = Unlocated("is resized or rearranged, and its field is not followed")
STRETCHED = Unlocated("is stretched by padding='interpolate', and its field is not followed")
IN_LOOP = Unlocated("is computed in a loop or a branch of jax, whose field is not followed")


def located(field: Field | Unlocated, stage: str) -> Field:
    """Returns the field of a stage whose positions see a part of the image.

    Raises `ValueError` for any other stage.
    """
    if isinstance(field, Field):
        return field
    raise ValueError(
        f"stage={stage!r} {field.reason}; expected a stage whose positions have a known field"
    )


def union(fields: Sequence[Field | Unlocated | None]) -> Field | Unlocated | None:
    """Returns the field of a value computed from values with these fields.

    The computation is position by position. None is the field of a constant.
    """
    known = [field for field in fields if field is not None]
    if not known:
        return None
    in_image = []
    for field in known:
        if isinstance(field, Unlocated):
            return field
        in_image.append(field)
    low = tuple(map(min, zip(*(field.low for field in in_image))))
    high = tuple(map(max, zip(*(field.high for field in in_image))))
    return Field(in_image[0].step, low, high)


def seen(equation, fields: list[Field | Unlocated | None]) -> Field | Unlocated | None:
    """Returns the field of an operation's output, from those of its operands."""
    operation = equation.primitive.name
    if operation == "select_n":
        # Leave out what the choice depends on: adaptive sampling chooses by the whole map.
        fields = [None, *fields[1:]]
    together = union(fields)
    if together is None:
        return None
    if operation in LOOPS:
        return IN_LOOP
    # An empty array, as `jnp.pad` makes them for borders of no rows, sees nothing.
    if 0 in equation.outvars[0].aval.shape[1:3]:
        return None
    # Without height and width there is no position.
    if equation.outvars[0].aval.ndim == 2:
        return WHOLE_IMAGE
    if operation == "concatenate":
        return _seen_by_concatenation(equation, fields)
    if isinstance(together, Unlocated):
        return together
    # Adaptive pooling is a matrix product.
    if operation == "dot_general" and not _is_pointwise(equation, fields):
        return WHOLE_IMAGE
    field = fields[0]
    if isinstance(field, Field):
        if operation == "conv_general_dilated":
            return _seen_by_convolution(equation, field)
        if operation.startswith("reduce_window"):
            return _seen_by_pool(equation, field)
        # `reduce_precision` has no axes.
        if operation.startswith("reduce_") and {1, 2} & set(equation.params.get("axes", ())):
            return WHOLE_IMAGE
        if operation in ("pad", "slice") and equation.invars[0].aval.ndim == 4:
            return _seen_by_border(equation, field)
    elif operation == "conv_general_dilated":
        # A constant, convolved with a kernel that is computed from the image.
        return WHOLE_IMAGE
    return REARRANGED if _rearranges(equation, fields) else together


def _is_pointwise(product, fields: list[Field | Unlocated | None]) -> bool:
    """Tells whether a matrix product is a dense layer at each position of a map."""
    image_map, weights = fields
    contracted, batch = product.params["dimension_numbers"]
    channels = product.invars[0].aval.ndim - 1
    is_dense = tuple(contracted[0]) == (channels,) and not any(map(len, batch))
    return is_dense and isinstance(image_map, Field) and weights is None


def _rearranges(equation, fields: list[Field | Unlocated | None]) -> bool:
    """Tells whether an operation, such as a reshape, moves rows or columns of a located map."""
    name = equation.primitive.name
    if name in ("sort", "fft") or name.startswith("cum"):
        return True
    if name == "transpose" and equation.params["permutation"][1:3] != (1, 2):
        return True
    if name == "rev" and {1, 2} & set(equation.params["dimensions"]):
        return True
    if name == "gather" and isinstance(fields[0], Field):
        # Channels may be chosen by their numbers, but not rows or columns.
        shape = equation.invars[0].aval.shape
        if equation.params["slice_sizes"][1:3] != shape[1:3]:
            return True
    size = equation.outvars[0].aval.shape[1:3]
    return any(
        isinstance(field, Field) and operand.aval.shape[1:3] != size
        for operand, field in zip(equation.invars, fields)
    )


def _seen_by_border(equation, field: Field) -> Field | Unlocated:
    """Returns the field of a map that is padded with a constant, or cut."""
    if equation.primitive.name == "pad":
        widths = equation.params["padding_config"][1:3]
        if any(between for _, _, between in widths):
            return REARRANGED
        return field.shifted([-int(low) for low, _, _ in widths])
    starts = equation.params["start_indices"][1:3]
    strides = equation.params["strides"] or (1, 1, 1, 1)
    return field.shifted(starts).strided(strides[1:3])


def _seen_by_convolution(equation, field: Field) -> Field | Unlocated:
    if max(equation.params["lhs_dilation"]) > 1:
        return UPSAMPLED
    window = equation.invars[1].aval.shape[:2]
    dilation = equation.params["rhs_dilation"]
    reach = [(size - 1) * step for size, step in zip(window, dilation)]
    # Negative: padding adds positions in front (`Field.shifted`).
    before = [-low for low, _ in equation.params["padding"]]
    return field.shifted(before).widened(reach).strided(equation.params["window_strides"])


def _seen_by_pool(equation, field: Field) -> Field:
    window = equation.params["window_dimensions"][1:3]
    dilation = equation.params["window_dilation"][1:3]
    reach = [(size - 1) * step for size, step in zip(window, dilation)]
    # Negative: padding adds positions in front (`Field.shifted`).
    before = [-low for low, _ in equation.params["padding"][1:3]]
    return field.shifted(before).widened(reach).strided(equation.params["window_strides"][1:3])


def _seen_by_concatenation(
    equation, fields: list[Field | Unlocated | None]
) -> Field | Unlocated | None:
    axis = equation.params["dimension"]
    # A border that is mirrored or repeated is rearranged; the map that it frames is not.
    together = union([field for field in fields if field != REARRANGED])
    if axis not in (1, 2) or not isinstance(together, Field):
        return union(fields)
    sizes = [variable.aval.shape[axis] for variable in equation.invars]

    # The map has a known field and is at least as large as other parts that have one.
    def rank(number):
        return isinstance(fields[number], Field), sizes[number]

    seeing = [number for number, field in enumerate(fields) if field is not None]
    largest = max(map(rank, seeing))
    equal = [number for number in seeing if rank(number) == largest]
    # A border that repeats the whole map stands before and after it.
    inner = equal[len(equal) // 2]
    field = fields[inner]
    if not isinstance(field, Field):
        return field
    before = -sum(sizes[:inner])
    return field.shifted((before, 0) if axis == 1 else (0, before))


def stage_names(stages: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names of stages as a tuple; a string is a single name.

    Raises `ValueError` if there are none.
    """
    names = (stages,) if isinstance(stages, str) else tuple(stages)
    if not names:
        raise ValueError(f"stages={stages!r} names no stage")
    return names


def check_stages(maps: Collection[str], stages: Sequence[str]) -> None:
    """Raises `ValueError` if a stage has no map among those up to the last stage."""
    for stage in stages:
        if stage not in maps:
            raise ValueError(
                f"stage={stage!r} is not a stage of this network up to {stages[-1]!r}; "
                f"those are {', '.join(maps) or 'none'}"
            )


def receptive_fields(
    model, stages: str | Sequence[str], input_shape: Sequence[int] | None = None
) -> tuple[tuple[Field | Unlocated, tuple[int, ...]], ...]:
    """Finds the largest part of the image that a position of each stage sees.

    Under 'mean' and 'random', this is what the position sees besides the border. Under
    'interpolate', maps are stretched, and nothing behind a border is located.

    Args:
      model: a `cnnjax.models.Network`.
      stages: names of stages, the deepest last, or a single one.
      input_shape: [height, width, channels] of the image; the publication's unless given.

    Returns (field, shape of the stage's map) for each stage. Raises `ValueError` if no stage is
    named, there is no such stage, or the image is too small.
    """
    return _receptive_fields(model, stage_names(stages), tuple(input_shape or model.input_shape))


@functools.cache
def _receptive_fields(model, stages, shape):
    model = with_local_fill(model)
    image = jax.ShapeDtypeStruct((1, *shape), "float32")
    until = {"method": "stages", "last": stages[-1]}

    def initialize(key, image):
        return model.init(key, image, **until)

    def maps(variables, image):
        by_stage = apply(model, variables, image, **until)
        check_stages(by_stage, stages)
        return [by_stage[stage] for stage in stages]

    variables = eval_shape(initialize, jax.random.key(0), image)
    program = trace(maps, variables, image)
    # The last input is the image; the others, the network's variables, see nothing of it.
    constants = [None] * (len(program.invars) - 1)
    fields = follow(program, [*constants, Field()], seen)
    if getattr(model, "padding", None) == "interpolate":
        fields = [STRETCHED if field == REARRANGED else field for field in fields]
    shapes = [output.aval.shape for output in program.outvars]
    return tuple(zip(fields, shapes))


def receptive_field(model, stage: str) -> Field:
    """Finds the largest part of the image that a position of one stage sees.

    Raises `ValueError` if there is no such stage, or if its positions are not `located`.
    """
    ((field, _),) = receptive_fields(model, (stage,))
    return located(field, stage)
