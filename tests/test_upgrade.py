"""Work directories of revision b2ff211, which lack later keys and files.

golden/runs_0_1.zip has two of them, without figures. This command made them at that revision, with
seeds 0 and 1:

    python -m cnnjax.main --config configs/lenet_digits.py --config.model=mlp1 --config.epochs=3
        --config.n_validation=100 --config.parallel=jit --config.checkpoint_every_steps=6
        --config.batch_size=200 --config.seed=0 --workdir finished0
"""

import json
import pathlib
import shutil
import zipfile

import numpy as np
import pytest

from cnnjax import combine, main, sweep, weights
from cnnjax.train.run import open_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]
ARCHIVE = pathlib.Path(__file__).parent / "golden" / "runs_0_1.zip"
TRAIN = (
    "--config=configs/lenet_digits.py",
    "--config.model=mlp1",
    "--config.epochs=3",
    "--config.n_validation=100",
    "--config.parallel=jit",
    "--config.checkpoint_every_steps=6",
    "--config.batch_size=200",
)
# Files that a run writes after its last checkpoint.
RESULTS = ("results.json", "manifest.json", "report.md", "test.npz", "weights.safetensors")


@pytest.fixture
def runs(tmp_path):
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def train(folder: pathlib.Path, seed: int) -> None:
    assert main.main([*TRAIN, f"--config.seed={seed}", f"--workdir={folder}"]) == 0


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("without_figures")  # The next test draws them.
def test_an_old_run_goes_on_from_its_checkpoint(runs):
    folder = runs / "finished1"
    before = json.loads((folder / "results.json").read_text())
    metrics = read(folder / "metrics.jsonl")
    # As if the run had been killed in its third epoch.
    shutil.rmtree(folder / "checkpoints" / "18")
    for name in RESULTS:
        (folder / name).unlink()
    train(folder, seed=1)
    for new, old in zip(read(folder / "metrics.jsonl"), metrics, strict=True):
        assert new == pytest.approx(old, rel=1e-4)
    after = json.loads((folder / "results.json").read_text())
    for name, value in before["final"].items():
        assert after["final"][name] == pytest.approx(value, rel=1e-4)


def test_an_old_run_is_reported_anew(runs):
    folder = runs / "finished0"
    (folder / "report.md").unlink()
    results = (folder / "results.json").read_bytes()
    train(folder, seed=0)
    assert "13.61" in (folder / "report.md").read_text()
    assert (folder / "results.json").read_bytes() == results


def test_old_runs_are_reopened_and_combined(runs):
    trained = open_run(runs / "finished0")
    assert trained.classes == tuple("0123456789") and trained.image_shape == (8, 8, 1)
    kernels = [
        open_run(runs / f"finished{seed}").variables["params"]["fc1"]["kernel"] for seed in (0, 1)
    ]
    soup = runs / "soup"
    patterns = str(runs / "finished?")
    arguments = ["--runs", patterns, "--method", "uniform", "--workdir", str(soup)]
    assert combine.main(arguments) == 0
    results = json.loads((soup / "results.json").read_text())
    errors = [row["test"]["error"] for row in results["individual"]]
    assert errors == pytest.approx([49 / 360, 49 / 360])
    averaged = np.mean(kernels, 0)
    loaded = weights.load_torchvision(soup / "weights.safetensors", trained.model)
    np.testing.assert_allclose(loaded["params"]["fc1"]["kernel"], averaged, atol=1e-7)


def test_an_old_run_of_a_sweep_is_finished(runs):
    parser = main.build_parser("cnnjax.main", "")
    _, config = main.parse(parser, [*TRAIN, "--config.seed=0"])
    sweep.check([sweep.Run({"seed": 0}, config, runs / "finished0")])
    # Another run's folder is still refused.
    with pytest.raises(ValueError, match="seed=1 there, 0 now"):
        sweep.check([sweep.Run({"seed": 0}, config, runs / "finished1")])
