"""The report: a sentence or two beside each figure, made from the numbers."""

from cnnjax.runtime import tables
from experiments.basics.numbers import MEGABYTES
from experiments.claims.operations import POOLED


def holds(truth: bool) -> str:
    return "holds" if truth else "does not hold"


def describe_sobel(computed: dict, photograph: str) -> str:
    flat = computed["flat image of 100, greatest magnitude"]
    strongest = computed["share of squared gradient in the strongest 10 %"]
    error = computed["greatest error of direction, degrees"]
    along = computed["response along an edge, share of that across"]
    noise = computed["share of noise above that threshold"]
    return (
        f"The pair finds the edges of '{photograph}' (the strongest tenth of the pixels has "
        f"{strongest:.0%} of the squared gradient) and their directions, right to {error:.1f} "
        "degrees on synthetic edges all around. The claim holds for the pair only: a vertical edge "
        f"gives the first filter {along:.0%} of what it gives the second. Other things answer too: "
        f"{noise:.0%} of the pixels of noise (deviation 64) are above the photograph's threshold, "
        f"and a flat image of 100 gets an edge of up to {flat['zeros']:.0f} along its border if "
        f"padded with zeros ({flat['replicate']:.0f} if its border is repeated)."
    )


def describe_steps(computed: dict) -> str:
    return (
        "Nine windows, two filters: each value is the sum of 27 products and a bias. The steps "
        f"differ from `cnnjax.nn.conv` by {computed['differs from conv']:g}. The sizes are UTSA's "
        "(7x7x3 with its padding, two 3x3x3 filters, stride 2), the numbers are drawn; the "
        "lecture's own are checked in the claims ledger (A40). Stride 2 takes every second value "
        "of stride 1 (they differ by "
        f"{computed['differs from every second value of stride 1']:g}), which is not what NUS "
        "prints for its example (A5.2)."
    )


def describe_im2col(computed: dict) -> str:
    layers = computed["vgg16"]

    def megabytes(rows, key):
        return f"{MEGABYTES * sum(row[key] for row in rows):.3g} MB"

    difference = computed["differs from conv"]
    return (
        f"Windows as rows times filters as columns: A7 {holds(difference < 1e-4)} (greatest "
        f"difference from the convolution {difference:g}). Its price is memory: one image's "
        f"{megabytes(layers[:1], 'input')} before VGG-16's first convolution become "
        f"{megabytes(layers[:1], 'unfolded')}, the {megabytes(layers[1:2], 'input')} before the "
        f"second {megabytes(layers[1:2], 'unfolded')}, and the {megabytes(layers, 'input')} before "
        f"all thirteen {megabytes(layers, 'unfolded')}."
    )


def describe_pooling(computed: dict) -> str:
    rows = computed["one pixel"]
    difference = {(row["pool"], row["window"]): row["difference"] for row in rows}
    still = difference["none", "stride 1"]
    maximum = difference["max", "2x2, stride 2"]
    average = difference["average", "2x2, stride 2"]
    lines = []
    for row in rows:
        changes = [f"{row['changed']:.0%}", f"{row['difference']:.2f}"]
        lines.append([row["pool"], row["window"], *changes])
    header = ["pool", "window", "values that differ", "RMS difference / deviation of the map"]
    whole = max(row["by the stride"] for row in rows)
    return (
        f"2x2 max-pooling turns the lecture's map into {computed['A6']}: A6 "
        f"{holds(computed['A6'] == POOLED.tolist())}. That pooling makes features invariant to "
        f"small shifts, as is often said, {holds(max(maximum, average) < 0.01)} of one small pool: "
        f"when a photograph moves by one pixel, its pixels change by {still:.2f} of their standard "
        f"deviation, its 2x2 maxima by {maximum:.2f}, its 2x2 averages by {average:.2f}. Moved by "
        f"the whole stride, every map moves by one cell (greatest difference {whole:g}).\n\n"
        f"{tables.table(header, lines)}"
    )


def network_verdict(row: dict) -> str:
    """Describes what the shift network knows of the position with one fill."""
    if row["columns told apart"] == 1 or row["pixels without spread"] == 0:
        return "does not know it: every pixel varies from image to image"
    counts = f"tells {row['columns told apart']} of {row['size'][1]} columns apart"
    if row["greatest spread"] == 0:
        return f"has forgotten the image, {counts}"
    return f"{counts}, but holds the image in {1 - row['pixels without spread']:.0%} of its pixels"


def describe_shift(computed: dict) -> str:
    lines = []
    for fill, row in computed.items():
        explained = f"{row['explained by the position']:.2f}".replace("-0.00", "0.00")
        middle = " ".join(f"{value:g}" for value in row["middle row of a constant 4"])
        spread = f"{row['greatest spread']:.3g}"
        lines.append([fill, explained, spread, middle, network_verdict(row)])
    header = ["fill", "variance explained by the position"]
    header += ["greatest spread of a pixel over images", "middle row of a constant 4"]
    zeros = computed["zeros"]
    counts = zeros["middle row of a constant 4"] == list(range(1, 8))
    return (
        "Seven layers that take the left neighbor and add 1, on 256 noise images and on a constant "
        "one, their central 7x7 pixels ('none' uses up a margin around them, 'full' makes 21x21 of "
        "them). That zeros make the network forget the image and know the column "
        f"{holds(zeros['greatest spread'] == 0 and counts)}. In the figure, maps too large for "
        f"numbers are colors only.\n\n{tables.table([*header, 'the network'], lines)}"
    )


def describe_sizes(computed: dict) -> str:
    lines = []
    different = []
    for row in computed["layers"]:
        case = ", ".join(map(str, row["case"]))
        values = [f"{row['formula']:g}", str(row["printed"]), str(row["computed"])]
        lines.append([row["layer"], case, *values])
        if row["printed"] != row["computed"]:
            different.append(row["layer"])
    fits = computed["with an output"]
    equal = computed["equal"]
    rounded = computed["equal when rounded down"]
    header = ["layer", "n, p, k, s", "formula", "printed", "computed"]
    return (
        f"Of {fits} cases with an output the code agrees with the formula as it stands in {equal} "
        f"and rounded down in {rounded}: without rounding it {holds(equal == fits)}, with it "
        f"{holds(rounded == fits)}. {computed['refused without output']} of the other "
        f"{computed['cases'] - fits} cases raise an error. Published layers; not as printed: "
        f"{', '.join(different) or 'none'}.\n\n{tables.table(header, lines)}"
    )


def sections(computed: dict, photograph: str) -> list[tuple[str, str, str]]:
    """Returns (title, figure, text) for each topic."""
    return [
        ("Edges: the Sobel pair (A39)", "sobel.png", describe_sobel(computed["sobel"], photograph)),
        ("One convolution, step by step (A40)", "steps.png", describe_steps(computed["steps"])),
        ("The same as one matrix product (A7)", "im2col.png", describe_im2col(computed["im2col"])),
        ("Pooling (A6, A33)", "pooling.png", describe_pooling(computed["pooling"])),
        ("The shift network (section B)", "shift.png", describe_shift(computed["shift"])),
        ("Sizes: (n + 2p - k) / s + 1 (A1, A1.1)", "sizes.png", describe_sizes(computed["sizes"])),
    ]


def render(computed: dict, photograph: str) -> str:
    """Returns the whole report in Markdown."""
    parts = ["# The lectures' basics\n"]
    for title, figure, text in sections(computed, photograph):
        parts.append(f"## {title}\n\n![{title}]({figure})\n\n{text}\n")
    return "\n".join(parts)
