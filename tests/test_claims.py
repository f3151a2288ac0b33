"""The ledger as a whole: every claim is computed, and judged as it was when its source was read."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import claims

READ_IN_ONE_SENSE = [
    "A4",
    "A5",
    "A8",
    "A10.2",
    "A14.2",
    "A14.3",
    "A15.1",
    "A19.1",
    "A19.2",
    "A24",
    "B1",
]
WRONG = ["A10.3", "A15.2", "A16.2", "A16.3", "A19.3", "A19.4", "A20.2"]
ROWS = [*(f"A{number}" for number in range(1, 25)), "B"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims") / "new"
    claims.main(["--workdir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def ledger(workdir):
    return {finding["id"]: finding for finding in json.loads((workdir / "claims.json").read_text())}


def test_every_row_of_the_ledger_is_there(ledger):
    assert (
        list(dict.fromkeys("B" if id.startswith("B") else id.split(".")[0] for id in ledger))
        == ROWS
    )
    assert all(
        finding["source"] and finding["claim"] and finding["computed"]
        for finding in ledger.values()
    )


def test_judgments(ledger):
    judged = {id: finding["judgment"] for id, finding in ledger.items()}
    assert [id for id in judged if judged[id] == claims.WRONG] == WRONG
    assert [id for id in judged if judged[id] == claims.READING] == READ_IN_ONE_SENSE
    assert all(judged[id] == claims.HOLDS for id in judged if id not in WRONG + READ_IN_ONE_SENSE)
    assert all(ledger[id]["note"] for id in WRONG + READ_IN_ONE_SENSE)


@pytest.mark.parametrize(
    "id, value",
    [
        ("A10.3", "512x512x3x3"),
        ("A15.2", "1024"),
        ("A16.2", "15.2 M values, 61 MB"),
        ("A16.3", "73,728"),
        ("A19.3", "7.0 M"),
        ("A19.4", "8.9 times"),
        ("A20.2", "854 M multiply-adds become 271 M"),
    ],
)
def test_a_wrong_claim_gets_its_right_value(ledger, id, value):
    assert value in ledger[id]["note"]


@pytest.mark.parametrize(
    "check, as_read, judgment",
    [
        (True, False, "holds"),
        (False, True, "holds under a stated reading"),
        (False, False, "wrong"),
    ],
)
def test_a_judgment_follows_from_its_check(monkeypatch, check, as_read, judgment):
    monkeypatch.setattr(claims, "_CLAIMS", [])
    claims.claim("X", "nobody", "a | b")(
        lambda: (check, as_read, "note", {"n": 1_000, "list": [1, 0.5]})
    )
    found = claims.findings()
    assert [finding.judgment for finding in found] == [judgment]
    assert (
        f"| X | nobody | a \\| b | **{judgment}** | note | n: 1,000, list: [1, 0.5] |"
        in claims.report(found).splitlines()
    )


def test_report_and_figure(workdir, ledger):
    lines = (workdir / "report.md").read_text().splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if " | **" in line] == list(
        ledger
    )
    assert all(line.replace("\\|", "").count("|") == 7 for line in lines if " | **" in line)
    with Image.open(workdir / "position.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    assert min(pixels.shape[:2]) > 1000 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert sorted(path.name for path in workdir.iterdir()) == [
        "claims.json",
        "position.png",
        "report.md",
    ]


@pytest.mark.parametrize(
    "direction, turns",
    [("from the left", 0), ("from the bottom", 1), ("from the right", 2), ("from the top", 3)],
)
def test_the_demo_counts_with_zeros_and_carries_the_image_otherwise(direction, turns):
    image = claims.example_images(1)[0]
    np.testing.assert_array_equal(
        np.rot90(claims.demo(image, direction, "zeros"), -turns), np.tile(np.arange(1, 8), (7, 1))
    )
    inner = image[7:-7, 7:-7]
    np.testing.assert_array_equal(
        claims.demo(image, direction, "circular"), inner + 7
    )  # once around
    turned, result = (
        np.rot90(image, -turns),
        np.rot90(claims.demo(image, direction, "none"), -turns),
    )
    np.testing.assert_array_equal(result, turned[7:-7, :7] + 7)
    replicated = np.rot90(claims.demo(image, direction, "replicate"), -turns)
    np.testing.assert_array_equal(replicated, np.tile(np.rot90(inner, -turns)[:, :1] + 7, (1, 7)))
