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

from cnnjax.models import create_model
from experiments.claims import __main__ as claims
from experiments.claims import (
    figures,
    ledger,
    networks,
    operations,
    position,
    report,
    sections,
    trained,
)

ROOT = pathlib.Path(__file__).parents[1]

# The wrong claims, each with a part of its note.
WRONG = {
    "A4.1": "with the number of filters and the padding",
    "A5.2": "[[6, 7, 3], [11, 2, 3], [7, 8, 9]]",
    "A5.3": "[[12, 22, 26, 19, 16, 13], [20, 25, 27, 23, 18, 13], [27, 40, 50, 40, 24, 21]",
    "A10.3": "512x256x3x3",
    "A15.2": "1024",
    "A16.2": "15.2 M values, 61 MB",
    "A19.3": "7.0 M",
    "A19.4": "8.9 times",
    "A30": "4x1x3x3",
    "A33": "only a maximum over the whole map is invariant",
    "A45": "784",
    "A46.1": "60,000",
    "A47": "3x3 at stride 2",
    "A48": "5 convolutions, 3 max-pools, 3 fully connected",
    "A49": "224x224x3",
    "A50": "32x32 and has 60,000",
    "A54": "3.54 M",
    "A57.1": "15 and 17 weight layers",
    "A60": "FC-C",
    "D1.1": "99.26 %",
}
# Parts of the notes of claims that are not wrong.
NOTES = {
    "A1.1": "rounded down",
    "A7.1": "without its bias",
    "A19.2": "one linear layer of 1000 outputs remains",
    "A20.2": "61% with bottlenecks of 80 channels; the text gives no width",
    "A21.4": "the AlexNet of 2012 takes 227 to 258",
    "A28.2": "two dimensions",
    "A32": "from 28 pixels, 13 layers of 3x3 leave 2x2, where no further one fits; from 224, 111",
    "A37": "does not flip",
    "A40": "2 and 0, are not checked",
    "A51": "3 layers (120, 84, 10 units)",
    "A52": "none between the linear layers",
    "A57": "row 3 of A, A-LRN, C, D, E; row 4 of A, C; row 5 of A (",
    "A59.2": "1.84 M",
    "C1": "by R2",
    "C3": "for V, the difference of 0.08 was not tested paired by seed",
    "C4": "our encoders have random weights",
    "C5": "7x7 gives 0.04 (H) and 0.00 (G) more than 1x1; the differences were not tested paired",
    "C9": ".251 is the error of a constant 1/2",
    "D6.1": "NUS does not say that they are top-5 errors",
    "D6.2": "not ZFNet's",
    "D9.3": "gains 3.9 points over a frozen network",
    "D10": "50 or 80 % of the units",
}
# Where the note is a fixed text: what was computed.
COMPUTED = {
    "A1": {"cases": 312, "equal": 152, "equal when rounded down": 312},
    "A21.4": {
        "resnet18": [32, 75, 224, 227, 258, 259, 300],
        "vgg16": [32, 75, 224, 227, 258, 259, 300],
        "alexnet": [75, 224, 227, 258, 259, 300],
        "alexnet_2012": [227, 258],
    },
    "A28.3": {"output": [1, 6, 6, 5], "parameters": 95},
    "A30": {"filters": [4, 1, 3, 3], "output": [1, 128, 128, 4]},
    "A27": {"image": [32, 32, 3], "inputs": 3072},
    "A51.1": {
        "receptive field and stride after each layer": {
            "c1": {"field": 5, "stride": 1},
            "s2": {"field": 6, "stride": 2},
            "c3": {"field": 14, "stride": 2},
            "s4": {"field": 16, "stride": 4},
        }
    },
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
    "A59.1": {"parameters": 30_730},
    "A60": {"classes": 10, "kernel of VGG-16's last layer": [4096, 10]},
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
        "weight layers in both headers": {
            "A": 11,
            "A-LRN": 11,
            "B": 13,
            "C": 16,
            "D": 16,
            "E": 19,
        },
    },
}
READ_IN_ONE_SENSE = {
    *("A1.1", "A4", "A7.1", "A8", "A24", "A28.2", "A31", "A32", "A34", "A36", "A37", "A42"),
    *("A10.2", "A14.2", "A14.3", "A15.1", "A19.1", "A19.2", "A20.2", "A21.2", "A51", "A55"),
    *("A56", "A57", "A59.2"),
    "B1",
    *("C1", "C2", "C3", "C4", "C6", "C7", "C7.1", "C8", "C9"),
    *("D2", "D3", "D4", "D7.1", "D9.3", "D10"),
}
UNDECIDED = {"C5", "D7.2", "D9.1", "D9.2"}
NOT_COMPUTED = {
    *("A28.1", "D6.1", "D6.2", "D6.3", "D11", "D15"),
    *(f"E{number}" for number in range(1, 20)),
}


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
    assert len(having(ledger.HOLDS)) == 73 and len(findings) == 163


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


@pytest.mark.slow
@pytest.mark.parametrize("id", NOTES)
def test_a_note_says_in_which_sense_a_claim_holds(findings, id):
    assert NOTES[id] in findings[id]["note"]


@pytest.mark.slow
@pytest.mark.parametrize("id", COMPUTED)
def test_a_finding_holds_what_was_computed(findings, id):
    assert findings[id]["computed"] == COMPUTED[id]


@pytest.mark.slow
def test_a_finding_shows_every_value_that_it_rests_on(findings):
    """Values with the same description would hide each other."""
    for value in trained.measured()["values"].values():
        described = [v for v in trained.measured()["values"].values() if v["what"] == value["what"]]
        assert described == [value]
    assert "20.79 (n=1)" in findings["D4"]["computed"].values()
    assert "43.53 ± 0.34 (n=3)" in findings["D3"]["computed"].values()


def test_a_finding_shows_measured_values_as_published():
    shown = trained.evidence("miou_zeros", "mlp1_test")
    assert shown["mean IoU on CamVid, zeros, %"] == "39.4 ± 0.3 (n=3)"
    assert "59.37 ± 0.27 (n=5)" in shown.values()
    assert shown["measured"] == "2 CPU cores, 21 and 22 November 2026"
    later = trained.evidence("vgg_hs_1x1")
    assert later["measured"] == "2 CPU cores, 30 November 2026"


@pytest.fixture
def measure_again(monkeypatch):
    """Replaces committed values: {name: {field: value}}."""

    def replace(changes):
        values = trained.measured()["values"]
        changed = {name: values[name] | fields for name, fields in changes.items()}
        again = trained.measured() | {"values": values | changed}
        monkeypatch.setattr(trained, "measured", lambda: again)

    return replace


def test_the_absence_of_position_does_not_follow_from_a_wide_interval(measure_again):
    wide = {"mean": 0.4, "std": 9.0}
    measure_again({"image_alone_h": wide, "image_alone_v": wide, "image_alone_r2": {"mean": 0.1}})
    assert trained.image_alone().word == ledger.WRONG


def test_a_greedy_soup_in_another_order_is_noticed(monkeypatch):
    monkeypatch.setattr(
        trained.combine, "greedy", lambda alone, accuracy: [alone.index(min(alone))]
    )
    assert trained.greedy_soup().word == ledger.WRONG


def test_another_learning_rate_is_noticed(monkeypatch):
    config = trained.lenet_mnist.get_config()
    config.schedule.every = 4
    monkeypatch.setattr(trained.lenet_mnist, "get_config", lambda: config)
    assert trained.lenet_schedule().word == ledger.WRONG


def test_a_bug_in_a_network_is_not_taken_for_a_wrong_size(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(networks, "eval_shape", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        networks.accepts(create_model("alexnet_2012"), {}, 227)


@pytest.mark.slow
def test_the_pages_count_the_findings(findings):
    verdicts = [finding["verdict"] for finding in findings.values()]
    checked = len(findings) - verdicts.count(ledger.NOT_COMPUTED)
    wrong = verdicts.count(ledger.WRONG)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"Of {len(findings)} statements in these lectures, we checked {checked};" in readme
    assert f"; {wrong} are wrong as printed" in readme
    page = (ROOT / "docs" / "lectures.md").read_text()
    assert f"We collected {len(findings)} statements" in page
    for lecture in ledger.LECTURES:
        of_lecture = [f["verdict"] for f in findings.values() if lecture in f["sources"]]
        counts = " | ".join(str(of_lecture.count(verdict)) for verdict in ledger.VERDICTS)
        assert re.search(rf"^\| {lecture}[^|]*\| {re.escape(counts)} \|$", page, re.MULTILINE)


@pytest.mark.slow
def test_the_page_has_every_finding(findings):
    """Run `PYTHONPATH=. python docs/generate.py` after a change of the ledger.

    Computed values are left out, since their last digits differ between processors.
    """
    text = (ROOT / "docs" / "reference" / "statements.md").read_text()
    rows = [line.rsplit(" | ", 1)[0] for line in text.splitlines() if " | **" in line]
    expected = []
    for finding in findings.values():
        statement, note = (finding[key].replace("|", "\\|") for key in ("statement", "note"))
        sources = ", ".join(finding["sources"])
        verdict = finding["verdict"]
        expected.append(f"| {finding['id']} | {sources} | {statement} | **{verdict}** | {note}")
    assert rows == expected
    assert f"All {len(findings)} statements" in text


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
    half = trained.difference_half_width("miou_reflect", "miou_none")
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

    judged = ledger.check_claims(section.claims)
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
    record = ["config.json", "environment.json"]
    assert names == sorted(["claims.json", "report.md", *record, *pictures])


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


def test_a_file_as_a_work_directory_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ledger, "check_claims", pytest.fail)
    (tmp_path / "file").touch()
    assert claims.main(["--workdir", str(tmp_path / "file")]) == 2
    message = f"error: workdir='{tmp_path / 'file'}' is a file; expected a folder\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.fixture
def no_claims(monkeypatch):
    """Replaces the claims and the figures by none."""
    monkeypatch.setattr(sections, "SECTIONS", ())
    monkeypatch.setattr(figures, "FIGURES", {})


@pytest.mark.usefixtures("no_claims")
def test_the_report_of_another_run_is_kept(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"kind": "train"}')
    report_file = tmp_path / "report.md"
    report_file.write_text("theirs")
    assert claims.main(["--workdir", str(tmp_path)]) == 2
    message = f"error: workdir='{tmp_path}' holds a training run; choose another --workdir\n"
    assert capsys.readouterr().err.endswith(message)
    assert report_file.read_text() == "theirs"


@pytest.mark.usefixtures("no_claims")
def test_a_folder_of_an_earlier_version_is_taken(tmp_path):
    """It has no record."""
    (tmp_path / "claims.json").write_text("[]")
    (tmp_path / "report.md").write_text("of before")
    for _ in range(2):
        assert claims.main(["--workdir", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() != "of before"
    assert json.loads((tmp_path / "config.json").read_text()) == {"command": "claims"}


def test_a_difference_counts_only_outside_its_interval():
    # Student's t with 2 degrees of freedom: 4.303 * 0.28 / sqrt(3).
    assert trained.half_width("ensemble_gain") == pytest.approx(0.6955, abs=1e-3)
    assert trained.half_width("convnet_test") == float("inf")


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
