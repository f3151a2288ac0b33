"""The reference pages, which are generated from the code, are up to date."""

import ast
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import textwrap

import ml_collections
import pytest

from cnnjax.position import defaults as position
from cnnjax.train import defaults as training
from cnnjax.visualize.commands import COMMANDS as VISUALIZE

FOLDER = pathlib.Path(__file__).parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)


@pytest.mark.parametrize("page", generate.PAGES)
def test_the_page_is_what_the_code_says(page):
    """Run `PYTHONPATH=. python docs/generate.py` after a change of keys or options."""
    assert (FOLDER / "reference" / page).read_text() == generate.PAGES[page]()


@pytest.mark.parametrize("module", [training, position])
def test_every_key_is_explained(module):
    rows = generate.keys(pathlib.Path(module.__file__))
    # Nested keys have rows of their own.
    config = module.get_config()
    expected = set()
    for key, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        expected |= {f"{key}.{inner}" for inner in value} if nested else {key}
    assert {name for name, _, _ in rows} == expected
    for name, _, comment in rows:
        assert comment, f"{module.__name__}: config.{name} has no comment"


def test_subcommands_and_experiments_list_their_options():
    text = (FOLDER / "reference" / "commands.md").read_text()
    for name in VISUALIZE:
        assert f"\n### python -m cnnjax.visualize {name}\n" in text
    # What all share is listed once, and what two share twice.
    assert len(re.findall(r"^  --every_layer ", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^  --stage STAGE ", text, re.MULTILINE)) == 2
    text = (FOLDER / "reference" / "experiments.md").read_text()
    for name in re.findall(r"\| `python -m (experiments\.\w+)`", text):
        _, section = text.split(f"\n## python -m {name}\n")
        assert "  --workdir " in section.partition("\n#")[0]


def public(nodes: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    """Returns the functions and classes without an underscore at their start."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node for node in nodes if isinstance(node, kinds) and not node.name.startswith("_")]


def listed_entries() -> set[str]:
    """Returns what the reference pages list: modules, packages, classes and functions."""
    entries = set()
    for page in (FOLDER / "reference").glob("*.md"):
        entries |= set(re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE))
    return entries


def test_everything_on_a_reference_page_has_a_docstring():
    """The pages leave out what has none."""
    paths = set()
    for entry in listed_entries():
        # The tests' checks of types wrap functions.
        value = inspect.unwrap(pkgutil.resolve_name(entry))
        path = pathlib.Path(inspect.getfile(value))
        is_package = path.name == "__init__.py"
        paths |= set(path.parent.glob("[!_]*.py")) if is_package else {path}
    missing = []
    for path in paths:
        for node in public(ast.parse(path.read_text()).body):
            members = public(node.body) if isinstance(node, ast.ClassDef) else []
            missing += [
                f"{path.name}: {node.name}, {each.name}"
                for each in (node, *members)
                if not ast.get_docstring(each)
            ]
    assert paths and not missing


@pytest.mark.parametrize("name", ["nn", "inspect", "combine", "visualize", "weights"])
def test_what_a_package_exports_is_on_a_reference_page(name):
    package = importlib.import_module(f"cnnjax.{name}")
    entries = listed_entries()
    missing = set()
    for exported in package.__all__:
        value = getattr(package, exported)
        # Constants do not know their module, and `main` is on the page of commands.
        if exported == "main" or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        module = value.__module__
        if not module.startswith("cnnjax."):
            continue
        if not entries & {f"cnnjax.{name}", module, f"{module}.{value.__name__}"}:
            missing.add(exported)
    assert not missing


def names_for_users() -> set[str]:
    """Returns the names of the package that pages use in code, except commands."""
    names = set()
    for page in (FOLDER.parent / "README.md", *FOLDER.glob("*.md")):
        text = page.read_text()
        names |= set(re.findall(r"`(?:with )?(cnnjax(?:\.\w+)+)", text))
        for block in re.findall(r"```py(?:thon)?\n(.*?)```", text, re.DOTALL):
            for node in ast.walk(ast.parse(textwrap.dedent(block))):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("cnnjax"):
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names - {f"cnnjax.{command}" for command in generate.COMMANDS}


@pytest.mark.parametrize("name", sorted(names_for_users()))
def test_a_name_that_pages_use_is_on_a_reference_page(name):
    listed = listed_entries()
    value = pkgutil.resolve_name(name)
    # A function or a class is on the page of the module or the package that defines it.
    module = value.__name__ if inspect.ismodule(value) else value.__module__
    parts = module.split(".")
    packages = {".".join(parts[:count]) for count in range(2, len(parts) + 1)}
    # The modules of a package may be listed instead of the package.
    assert listed & packages or any(entry.startswith(f"{module}.") for entry in listed)
