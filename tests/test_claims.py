"""The ledger of claims: each is computed, and each verdict is the recorded one."""

import json
import pathlib
import re

import forked
import numpy as np
import pytest
import quick
import scipy.stats
from PIL import Image

from experiments.claims import ledger, networks, operations, position, report, trained

ROOT = pathlib.Path(__file__).parents[1]

# The wrong claims, each with a part of its note.
WRONG = {
    "A5.2": "[[6, 7, 3], [11, 2, 3], [7, 8, 9]]",
    "A5.3": "[[12, 22, 26, 19, 16, 13], [20, 25, 27, 23, 18, 13], [27, 40, 50, 40, 24, 21]",
    "A10.3": "512x256x3x3",
    "A15.2": "1024",
    "A16.2": "15.2 M values, 61 MB",
    "A19.3": "7.0 M",
    "A19.4": "8.9 times",
    "A20.2": "854 M multiply-adds become 271 M",
    "A30": "4x1x3x3",
    "A33": "only a maximum over the whole map is invariant",
    "A37": "does not flip",
    "A45": "784",
    "A46.1": "60,000",
    "A47": "3x3 at stride 2",
    "A48": "5 convolutions, 3 max-pools, 3 fully connected",
    "A49": "224x224x3",
    "A50": "32x32 and has 60,000",
    "A54": "3.54 M",
    "A57": "column B",
    "D1.1": "99.26 %",
}
# Where the note is a fixed text: what was computed.
COMPUTED = {
    "A30": {"filters": [4, 1, 3, 3], "output": [1, 128, 128, 4]},
    # The first row that is printed for A37's image, filtered and convolved.
    "A37": {
        "layer": [18, 23, 14],
        "convolution as defined": [7, 12, 17],
        "cross-correlation": [18, 23, 14],
        "layer is the cross-correlation": True,
    },
    "A47": {"11x11, stride 4": 12, "3x3, stride 2": 27},
    "A48": {"Conv": 5, "max-pool": 3, "Dense": 3},
    "A49": {"alexnet_2012": 227, "vgg16": 224, "googlenet_2014": 224, "resnet152": 224},
    "A57": {
        "convolutions by block": {
            "A": [1, 1, 2, 2, 2],
            "A-LRN": [1, 1, 2, 2, 2],
            "B": [2, 2, 2, 2, 2],
            "C": [2, 2, 3, 3, 3],
            "D": [2, 2, 3, 3, 3],
            "E": [2, 2, 4, 4, 4],
        },
        "columns that differ": {
            "first table": ["B"],
            "second table": ["A", "A-LRN", "C", "D", "E"],
        },
    },
}
READ_IN_ONE_SENSE = {
    *("A4", "A8", "A24", "A31", "A32", "A34", "A36", "A42"),
    *("A10.2", "A14.2", "A14.3", "A15.1", "A19.1", "A19.2", "A21.2", "A51", "A55", "A56"),
    "B1",
    *("C2", "C3", "C6", "C7", "C8"),
    *("D2", "D3", "D4", "D7.1", "D10"),
}
UNDECIDED = {"C5", "D7.2", "D9.1", "D9.2"}
NOT_COMPUTED = {"A28.1", "D6.1", "D6.2", "D6.3", "D11", *(f"E{number}" for number in range(1, 17))}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims") / "new"
    # Most of its many small programs run in no other test, and to keep them takes a while.
    done = forked.run(
        "experiments.claims",
        "--workdir",
        folder,
        flags=quick.FLAGS,
        config={"jax_enable_compilation_cache": False},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def findings(workdir):
    records = json.loads((workdir / "claims.json").read_text())
    return {record["id"]: record for record in records}


@pytest.mark.slow
def test_every_verdict(findings):
    def having(verdict):
        return {id for id, finding in findings.items() if finding["verdict"] == verdict}

    assert having(ledger.WRONG) == set(WRONG)
    assert having(ledger.READING) == READ_IN_ONE_SENSE
    assert having(ledger.UNDECIDED) == UNDECIDED
    assert having(ledger.NOT_COMPUTED) == NOT_COMPUTED
    assert len(having(ledger.HOLDS)) == 68 and len(findings) == 142


@pytest.mark.slow
def test_every_finding_says_what_it_rests_on(findings):
    for finding in findings.values():
        assert finding["statement"] and set(finding["sources"]) <= set(ledger.LECTURES)
        assert finding["computed"] or finding["verdict"] == ledger.NOT_COMPUTED, finding["id"]
        assert finding["note"] or finding["verdict"] == ledger.HOLDS, finding["id"]


@pytest.mark.slow
@pytest.mark.parametrize("id", WRONG)
def test_a_wrong_claim_gets_its_right_value(findings, id):
    assert WRONG[id] in findings[id]["note"]
    assert findings[id]["computed"] == COMPUTED.get(id, findings[id]["computed"])


@pytest.mark.slow
def test_every_row_of_the_vgg_table_is_a_claim(findings):
    rows = [id for id in findings if id.startswith("A16.4.")]
    assert len(rows) == len(networks.VGG16_TABLE) == 22
    weights = sum(findings[id]["computed"]["weights"] for id in rows)
    # VGG-16 has 138,357,544 parameters; 13,416 of them are biases.
    assert weights == 138_344_128


def test_the_worked_examples_by_hand():
    # One output value of each example: the sum of the filter's nonzero weights times the pixels.
    right = operations.worked_examples()
    assert right["3x3, stride 1"][0, 0] == 1 * 2 + 1 * 2 + 1 * 2 + 2 * 0
    assert right["3x3, stride 2"][0, 1] == 1 * 3 + 1 * 0 + 1 * 0 + 2 * 2
    under = operations.IMAGE[:3, :3] * operations.LARGER_FILTER[2:, 2:]
    assert right["5x5, padded"][0, 0] == under.sum() == 12


def test_reflections_gain_has_its_interval():
    # Samples with the means and deviations of measured.json, each of three networks.
    reflect = 38.7 + 0.2 * np.array([-1, 0, 1])
    none = 36.7 + 0.6 * np.array([-1, 0, 1])
    low, high = scipy.stats.ttest_ind(reflect, none, equal_var=False).confidence_interval()
    half = trained.difference_interval("miou_reflect", "miou_none")
    assert half == pytest.approx((high - low) / 2)
    assert trained.segmentation().note.endswith("reflected borders give 2.0 ± 1.3 of them")


@pytest.mark.parametrize(
    "literally, as_read, verdict",
    [
        (True, False, ledger.HOLDS),
        (False, True, ledger.READING),
        (False, False, ledger.WRONG),
    ],
)
def test_a_verdict_follows_from_its_check(literally, as_read, verdict):
    section = ledger.Section("A section")

    @section.claim("X", "WPI", "a | b")
    def check():
        computed = {"n": 1_000, "list": [1, 0.5]}
        return ledger.judge(literally, computed, as_read=as_read, note="note")

    judged = ledger.find(section.claims)
    assert [finding.verdict for finding in judged] == [verdict]
    row = f"| X | WPI | a \\| b | **{verdict}** | note | n: 1,000, list: [1, 0.5] |"
    assert row in report.render((section,), judged).splitlines()


@pytest.mark.slow
def test_report_and_figures(workdir, findings):
    text = (workdir / "report.md").read_text()
    rows = [line for line in text.splitlines() if " | **" in line]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(findings)
    assert all(row.replace("\\|", "").count("|") == 7 for row in rows)
    # The summary counts a claim once per lecture.
    of_ubc = [finding for finding in findings.values() if "UBC" in finding["sources"]]
    line = next(line for line in text.splitlines() if line.startswith("| UBC"))
    assert sum(int(number) for number in re.findall(r"\| (\d+)", line)) == len(of_ubc)
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert sorted(pictures) == ["collapse.png", "position.png", "survivors.png", "worked.png"]
    for name in pictures:
        with Image.open(workdir / name) as figure:
            assert min(figure.size) > 300
            assert len(figure.convert("RGB").getcolors(2**24)) > 50
    names = sorted(path.name for path in workdir.iterdir())
    assert names == sorted(["claims.json", "report.md", *pictures])


@pytest.mark.slow
def test_measured_values_are_those_of_the_pages():
    """measured.json repeats numbers of the documentation; both must agree."""
    pages = ("README.md", "docs/lectures.md", "docs/position_results.md")
    text = "".join((ROOT / page).read_text() for page in pages)
    for name, value in trained.measured()["values"].items():
        assert value["command"] in trained.measured()["commands"], name
        if value["std"] is None:
            continue
        digits = 1 if f"{value['mean']:.1f} ± {value['std']:.1f}" in text else 2
        mean = f"{value['mean']:.{digits}f}"
        shown = f"{mean} ± {value['std']:.{digits}f}"
        short = re.sub(r"\b0\.", ".", shown)
        assert shown in text or short in text, f"{name}: {shown}"


def test_a_difference_counts_only_outside_its_interval():
    # Student's t with 2 degrees of freedom: 4.303 * 0.28 / sqrt(3).
    assert trained.interval("ensemble_gain") == pytest.approx(0.6955, abs=1e-3)
    assert trained.interval("convnet_test") == float("inf")


DIRECTIONS = position.DIRECTIONS.items()


@pytest.mark.slow
@pytest.mark.parametrize("direction, turns", DIRECTIONS)
def test_the_demo_counts_with_zeros_and_carries_the_image_otherwise(direction, turns):
    """Zero padding replaces the image by a count; other paddings keep image content."""
    image = position.example_images(1)[0]
    inner = image[7:-7, 7:-7]
    counted = np.rot90(position.demo(image, direction, "zeros"), -turns)
    np.testing.assert_array_equal(counted, np.tile(np.arange(1, 8), (7, 1)))
    # Circular padding shifts the image by its whole width, back to where it was.
    np.testing.assert_array_equal(position.demo(image, direction, "circular"), inner + 7)
    turned = np.rot90(image, -turns)
    without = np.rot90(position.demo(image, direction, "none"), -turns)
    np.testing.assert_array_equal(without, turned[7:-7, :7] + 7)
    replicated = np.rot90(position.demo(image, direction, "replicate"), -turns)
    first_column = np.rot90(inner, -turns)[:, :1]
    np.testing.assert_array_equal(replicated, np.tile(first_column + 7, (1, 7)))
