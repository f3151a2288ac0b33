"""Writes the pages of docs/reference/ that are made from the code.

    PYTHONPATH=. python docs/generate.py

`configuration.md` lists every configuration key with its default and comment, read from the two
files that define them. `commands.md` holds what each command prints for `--help`, `networks.md` the
registered networks, and `experiments.md` the commands of `experiments/` and their options.
`statements.md` has the statements of the lectures; to compute them takes about a minute. A test
fails if a page is out of date.
"""

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import pathlib
import re
from unittest import mock

ROOT = pathlib.Path(__file__).parents[1]

KEYS = {
    "Training": "cnnjax/train/defaults.py",
    "The position study": "cnnjax/position/defaults.py",
}
COMMANDS = (
    "main",
    "sweep",
    "combine",
    "summary",
    "predict",
    "evaluate",
    "weights",
    "visualize",
    "benchmark",
)


def comment_of(lines: list[str], first: int, last: int) -> str:
    """Returns the comment behind a statement, or the comment block above it.

    Args:
      lines: the lines of the file.
      first, last: the numbers of the statement's first and last line, counted from 1.
    """
    behind = lines[last - 1].partition("  # ")[2]
    if behind:
        return behind
    above: list[str] = []
    for line in reversed(lines[: first - 1]):
        # "# ---- Data" is the heading of a section.
        if not line.strip().startswith("#") or line.strip().startswith("# ----"):
            break
        above.insert(0, line.strip().removeprefix("#").strip())
    return " ".join(above)


def keys(path: pathlib.Path) -> list[tuple[str, str, str]]:
    """Lists (key, default as written, comment) for each assignment to `config.KEY`."""
    text = path.read_text()
    lines = text.splitlines()
    rows = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Assign):
            continue
        name = ast.unparse(node.targets[0])
        # The keys of a nested configuration follow it, each in an assignment of its own.
        is_parent = ast.unparse(node.value) == "ml_collections.ConfigDict()"
        if name.startswith("config.") and not is_parent:
            comment = comment_of(lines, node.lineno, node.end_lineno or node.lineno)
            rows.append((name.removeprefix("config."), ast.unparse(node.value), comment))
    return rows


def cell(text: str) -> str:
    """Escapes a text for a table's cell."""
    return text.replace("|", "\\|")


def configuration() -> str:
    sections = [
        "# Configuration keys\n\nChange any key from the command line: `--config.KEY=VALUE`.\n"
    ]
    for title, path in KEYS.items():
        sections.append(f"## {title}\n\nFrom `{path}`.\n")
        sections.append("| key | default | meaning |\n| --- | --- | --- |")
        for name, default, comment in keys(ROOT / path):
            sections.append(f"| `{name}` | `{cell(default)}` | {cell(comment)} |")
        sections.append("")
    return "\n".join(sections)


def help_of(module: str, *words: str) -> str:
    """Returns what `python -m MODULE WORDS --help` prints."""
    # The command of a package is its __main__.
    if importlib.util.find_spec(module).submodule_search_locations:
        module = f"{module}.__main__"
    printed = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(printed):
        # argparse ends the process after its help.
        with contextlib.suppress(SystemExit):
            importlib.import_module(module).main([*words, "--help"])
    return printed.getvalue().strip()


def options_of(text: str) -> list[str]:
    """Lists the entries below "options:" of a help, each with its explanation."""
    _, _, options = text.partition("\noptions:\n")
    return re.findall(r"^  -.*(?:\n {3,}.*)*", options, re.MULTILINE)


def visualizations() -> list[str]:
    """Shows the options that all commands of `cnnjax.visualize` share, then each one's own."""
    from cnnjax.visualize.commands import COMMANDS as VISUALIZE

    helps = {name: help_of("cnnjax.visualize", name) for name in VISUALIZE}
    options = {name: options_of(text) for name, text in helps.items()}
    shared = [
        entry for entry in options["filters"] if all(entry in each for each in options.values())
    ]
    joined = "\n".join(shared)
    sections = [
        "Every COMMAND takes these options. `--workdir` is required, and so are `--model` and\n"
        f"`--weights`, unless `--run` is given.\n\n```text\n{joined}\n```\n"
    ]
    for name, text in helps.items():
        # The description stands between the usage and the options.
        _, description, _ = text.split("\n\n", 2)
        own = [entry for entry in options[name] if entry not in shared]
        if own:
            description += "\n\n" + "\n".join(own)
        title = f"### python -m cnnjax.visualize {name}"
        sections.append(f"{title}\n\n```text\n{description}\n```\n")
    return sections


def commands() -> str:
    """Shows the help of every command and of every subcommand."""
    sections = ["# Commands\n\nWhat each command prints for `--help`.\n"]
    for name in COMMANDS:
        text = help_of(f"cnnjax.{name}")
        sections.append(f"## python -m cnnjax.{name}\n\n```text\n{text}\n```\n")
        if name == "visualize":
            sections += visualizations()
    return "\n".join(sections)


def networks() -> str:
    from cnnjax.models import create_model, list_models

    # The names of one class that share its defaults stand in one row.
    families: dict[tuple, list[str]] = {}
    for name in list_models():
        model = create_model(name)
        # A user's file may have registered others.
        if not type(model).__module__.startswith("cnnjax."):
            continue
        families.setdefault((type(model), model.input_shape, model.num_classes), []).append(name)
    lines = []
    for (network, input_shape, num_classes), names in families.items():
        size = "x".join(map(str, input_shape))
        title = network.__doc__.strip().partition("\n")[0]
        file = network.__module__.replace(".", "/") + ".py"
        joined = ", ".join(f"`{name}`" for name in names)
        lines.append(f"| {joined} | {title} | {size} | {num_classes} | `{file}` |")
    return (
        "# Networks\n\n"
        "The names that `cnnjax.create_model` and `--config.model` accept. Size and classes are\n"
        "the defaults; most networks take other sizes, and all but `lenet5` any number of\n"
        "classes. `python -m cnnjax.summary NAME` prints a network's layers, and\n"
        "`cnnjax.list_models()` these names. The files name their sources. [Compared with\n"
        "torchvision](../zoo.md) has parameters and speed of 33 of them.\n\n"
        "| names | network | image | classes | file |\n| --- | --- | --- | --- | --- |\n"
        + "\n".join(lines)
        + "\n"
    )


def experiments() -> str:
    """Tabulates the commands of experiments/ with the pages that name them; lists their options."""
    lines = []
    sections = []
    for path in sorted((ROOT / "experiments").iterdir()):
        # An experiment is a file or a package.
        file = path / "__main__.py" if path.is_dir() else path
        if file.suffix != ".py" or file.name == "__init__.py" or not file.exists():
            continue
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        title = docstring.partition("\n")[0]
        links = []
        for page in sorted((ROOT / "docs").glob("*.md")):
            if re.search(rf"\bexperiments\.{path.stem}\b", page.read_text()):
                links.append(f"[{page.stem}](../{page.name})")
        command = f"python -m experiments.{path.stem}"
        lines.append(f"| `{command}` | {title} | {', '.join(links)} |")
        # The usage and the docstring come first.
        arguments = r"^(positional arguments|options):$.*"
        text = re.search(arguments, help_of(f"experiments.{path.stem}"), re.DOTALL | re.MULTILINE)
        sections.append(f"## {command}\n\n```text\n{text[0]}\n```\n")
    return (
        "# Experiments\n\n"
        "Each command writes a report; `--help` explains it. The last column names the pages that\n"
        "use the command. The options of each command stand below the table.\n\n"
        "| command | question or task | pages |\n| --- | --- | --- |\n"
        + "\n".join([*lines, "", *sections])
    )


def statements() -> str:
    """Computes and judges what the lectures state."""
    from experiments.claims import report
    from experiments.claims.ledger import check_claims
    from experiments.claims.sections import SECTIONS

    findings = check_claims(claim for section in SECTIONS for claim in section.claims)
    return report.render_page(SECTIONS, findings)


PAGES = {
    "configuration.md": configuration,
    "commands.md": commands,
    "networks.md": networks,
    "experiments.md": experiments,
}
# Compared with the computed ledger in tests/test_claims.py.
COMPUTED_PAGES = {"statements.md": statements}


if __name__ == "__main__":
    for name, make in (PAGES | COMPUTED_PAGES).items():
        (ROOT / "docs" / "reference" / name).write_text(make())
