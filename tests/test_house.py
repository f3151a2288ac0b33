"""Imports follow the map of modules in docs/contributing.md and form no cycle."""

import ast
import functools
import graphlib
import importlib.metadata
import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Packages from bottom to top. A module may import from its own floor and from lower ones.
FLOORS = (
    ("runtime",),
    ("nn",),
    ("inspect",),
    ("models",),
    ("data", "weights", "ridge"),
    ("transfer",),
    ("train", "position", "visualize"),
    ("study", "main", "sweep", "combine", "summary", "benchmark"),
    ("classifier",),
    ("predict", "evaluate"),
)


@functools.cache
def import_statements(path: pathlib.Path) -> list[ast.Import | ast.ImportFrom]:
    """Returns the import statements of a file, wherever they stand."""
    nodes = ast.walk(ast.parse(path.read_text()))
    statements = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in statements:
        # A relative import's module has no package's name, which all rules here look for.
        assert not getattr(node, "level", 0), f"{path}:{node.lineno} is a relative import"
    return statements


@functools.cache
def imports() -> dict[str, set[str]]:
    """Returns each module of the package with the modules that it imports anywhere."""
    paths = {}
    for path in (ROOT / "cnnjax").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        paths[module.removesuffix(".__init__")] = path
    graph = {}
    for module, path in paths.items():
        graph[module] = set()
        for node in import_statements(path):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                # In `from package import name`, the name may be a module or a definition.
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in paths else node.module for name in inner]
            graph[module] |= {name for name in names if name in paths}
    return graph


def floor_of(module: str) -> int:
    room = module.split(".")[1]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def test_no_module_imports_from_a_floor_above():
    # The package's own __init__ may import every module.
    graph = {module: needs for module, needs in imports().items() if module != "cnnjax"}
    upward = [
        f"{module} -> {other}"
        for module, needs in graph.items()
        for other in needs - {"cnnjax"}
        if floor_of(other) > floor_of(module)
    ]
    assert not upward


def test_imports_close_no_circle():
    graph = {module: needs - {module} for module, needs in imports().items()}
    # A package's __init__ imports its modules, which may import from the package. Such a cycle does
    # no harm, so these imports are left out.
    files = {
        module: {n for n in needs if not module.startswith(f"{n}.")}
        for module, needs in graph.items()
    }
    graphlib.TopologicalSorter(files).prepare()


def imported_packages(path: pathlib.Path) -> set[str]:
    """Returns the first words of the modules that a file imports anywhere."""
    names = []
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


def test_nothing_imports_another_framework():
    for folder in ("cnnjax", "experiments", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            packages = imported_packages(path)
            assert "tensorflow" not in packages, path
            # Comparisons with PyTorch import it on request.
            is_comparison = "benchmark" in path.parts or path.name == "zoo.py"
            assert "torch" not in packages or is_comparison, path


def test_no_study_imports_the_script_of_another():
    """What studies share is in the package. `basics` and `claims` are packages, not scripts."""
    folder = ROOT / "experiments"
    scripts = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    for path in folder.rglob("*.py"):
        for node in import_statements(path):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                root, *inner = name.split(".")
                assert root != "experiments" or inner[0] not in scripts, path


def options_of_commands(path: pathlib.Path) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Yields each option --NAME that a file adds to a parser, with its keywords."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = node.args[0]
        is_option = isinstance(name, ast.Constant) and str(name.value).startswith("--")
        if is_option and ast.unparse(node.func).rpartition(".")[2] in ("add", "add_argument"):
            yield name.value, {keyword.arg: keyword.value for keyword in node.keywords}


def keywords_of_lists(path: pathlib.Path) -> Iterator[dict[str, ast.expr]]:
    """Yields the keywords of each option --NAME in a file that takes a list of any length."""
    for _, keywords in options_of_commands(path):
        if ast.unparse(keywords.get("nargs", ast.Constant(None))) in ("'+'", "'*'"):
            yield keywords


def test_options_have_underscores_and_their_help_names_the_default():
    count = 0
    for folder in ("cnnjax", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for name, keywords in options_of_commands(path):
                count += 1
                assert "-" not in name.removeprefix("--"), f"{path}: {name}"
                assert "help" in keywords, f"{path}: {name} has no help"
                # An empty default needs no words: nothing is given.
                default = ast.unparse(keywords.get("default", ast.Constant(None)))
                if default not in ("None", "()", "[]", "{}", "''", "False", "argparse.SUPPRESS"):
                    explanation = ast.unparse(keywords["help"])
                    assert "default" in explanation, f"{path}: {name}'s help has no default"
    assert count > 0


def test_an_option_given_twice_adds_to_the_first():
    """argparse would keep the last list without a word.

    Options that replace a default list are left out: they would be added to the default.
    """
    count = 0
    for folder in ("cnnjax", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for keywords in keywords_of_lists(path):
                count += 1
                default = keywords.get("default")
                if default is None or ast.unparse(default) in ("[]", "()", "None"):
                    assert "action" in keywords, path
    assert count > 0


def test_editors_see_what_packages_import_at_its_first_use():
    """`TYPE_CHECKING` imports the names of `lazy.attributes`, from the same modules."""
    count = 0
    for path in (ROOT / "cnnjax").rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        static = {}
        at_first_use = {}
        exported = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                for statement in node.body:
                    for alias in statement.names:
                        static[alias.name] = f"{statement.module}.{alias.name}"
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                exported = ast.literal_eval(node.value)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy.attributes":
                count += 1
                for name, module in ast.literal_eval(node.args[1]).items():
                    at_first_use[name] = f"{package}.{module}.{name}"
                for keyword in node.keywords:
                    assert ast.unparse(keyword) == "submodules=__all__"
                    for name in exported:
                        at_first_use.setdefault(name, f"{package}.{name}")
        assert static == at_first_use, path
        assert set(static) <= set(exported), path
    assert count > 0


def test_requirements_are_the_package_and_all_its_extras():
    """Except the extra for ONNX, which only one test needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [extra for name, extra in project["optional-dependencies"].items() if name != "onnx"]
    listed = [*project["dependencies"], *sum(extras, [])]
    packages = {line for line in listed if not line.startswith("cnnjax[")}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = {line.partition("#")[0].strip() for line in lines}
    assert packages == requirements - {""}
    assert project["optional-dependencies"]["all"] == ["cnnjax[study,dev]"]


@pytest.mark.slow
def test_every_imported_package_is_required():
    """One that another package brings is gone when that package does without it.

    PyTorch is for comparisons, and onnx_files.py is not run without the extra for ONNX.
    """
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {distribution_name(re.match(r"[\w-]*", line)[0]) for line in lines}
    distributions = importlib.metadata.packages_distributions()
    tests = [*(ROOT / "tests").glob("*.py")]
    paths = tests + [ROOT / "docs" / "generate.py"]
    for folder in ("cnnjax", "configs", "experiments"):
        paths += (ROOT / folder).rglob("*.py")
    ours = {"cnnjax", "configs", "experiments"} | {path.stem for path in tests}
    ours |= {path.stem for path in (ROOT / "tests" / "golden").glob("*.py")}
    optional = {"torch", "torchvision", "jax2onnx", "onnxruntime"}
    missing = set()
    for path in paths:
        for package in imported_packages(path) - ours - sys.stdlib_module_names:
            providers = {distribution_name(name) for name in distributions.get(package, ())}
            if package not in optional and not providers & required:
                missing.add(f"{path.name} imports {package}")
    assert not missing


def distribution_name(name: str) -> str:
    """Normalizes the name of a distribution, as in PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()
