"""The report: how many claims hold, the wrong ones first, then all of them."""

from cnnjax.runtime import tables
from experiments.claims.ledger import (
    CONTRADICTED,
    LECTURES,
    VERDICTS,
    WRONG,
    Finding,
    Section,
)

# Claims with a figure.
PICTURES = {
    "A5.2": "worked.png",
    "A31": "collapse.png",
    "A33": "survivors.png",
    "B1": "position.png",
}


def format_value(value) -> str:
    """Returns a computed value for a table's cell."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {format_value(item)}" for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def cell(value: str) -> str:
    return value.replace("|", "\\|")


def count(findings: list[Finding], verdict: str, lecture: str | None = None) -> int:
    of_verdict = [finding for finding in findings if finding.verdict == verdict]
    if lecture is None:
        return len(of_verdict)
    return sum(lecture in finding.sources for finding in of_verdict)


def summary(findings: list[Finding]) -> str:
    """Returns a table of the number of claims by lecture and verdict.

    A claim of several lectures counts for each of them.
    """
    lines = []
    for lecture, title in LECTURES.items():
        counts = [str(count(findings, verdict, lecture)) for verdict in VERDICTS]
        lines.append([title, *counts])
    lines.append(["all, each claim once", *(str(count(findings, verdict)) for verdict in VERDICTS)])
    return tables.table(["lecture", *VERDICTS], lines)


def wrong_claims(findings: list[Finding], verdict: str) -> str:
    """Returns a list of the claims of a verdict, each with the right value and its figure."""
    lines = []
    for finding in findings:
        if finding.verdict == verdict:
            sources = ", ".join(finding.sources)
            lines.append(
                f"- **{finding.id}** ({sources}). {finding.statement}. Right: {finding.note}."
            )
            if finding.id in PICTURES:
                lines.append(f"\n  ![{finding.id}]({PICTURES[finding.id]})\n")
    return "\n".join(lines)


def table_of_section(section: Section, findings: dict[str, Finding]) -> str:
    """Returns one section's claims as a table, under the section's title."""
    lines = []
    for claim in section.claims:
        finding = findings[claim.id]
        lines.append(
            [
                finding.id,
                ", ".join(finding.sources),
                cell(finding.statement),
                f"**{finding.verdict}**",
                cell(finding.note),
                cell(format_value(finding.computed)),
            ]
        )
    header = ["no.", "lectures", "claim", "verdict", "note", "computed"]
    return f"## {section.title}\n\n{tables.table(header, lines)}"


def render_section(section: Section, findings: dict[str, Finding]) -> str:
    """Returns one section's claims as a table, with their figures below."""
    pictures = []
    for claim in section.claims:
        if findings[claim.id].verdict != WRONG and claim.id in PICTURES:
            pictures.append(f"\n![{claim.id}]({PICTURES[claim.id]})\n")
    return table_of_section(section, findings) + "".join(pictures)


def render(sections: tuple[Section, ...], findings: list[Finding]) -> str:
    """Returns the whole report in Markdown."""
    by_id = {finding.id: finding for finding in findings}
    parts = [
        "# What five lectures state, computed and judged",
        f"{len(findings)} claims. A claim that several lectures make counts for each of them.",
        summary(findings),
        "## Wrong as printed",
        wrong_claims(findings, WRONG),
        "## Wrong by publications",
        wrong_claims(findings, CONTRADICTED),
    ]
    parts += [render_section(section, by_id) for section in sections]
    return "\n\n".join(parts) + "\n"


_VERDICTS = """\
- **holds**: as stated.
- **holds under a stated reading**: the lecture leaves something open, or is right in one sense
  only; the note says in which.
- **wrong**: the note says what is right.
- **wrong by publications**: not computed; the publications that the note names say otherwise.
- **undecided**: measured or computed, but the spread over seeds is too large or unknown, or the
  lecture leaves out a setting that the number depends on.
- **not computed**: the note says why."""

_COMPUTED = """\
The last column has what was computed. Maps have their channels last: [1, 6, 6, 5] is PyTorch's
1x5x6x6. ± is the sample standard deviation over n seeds (in the position study, over seeds and
images). H, V, G, HS and SPC are [terms of the position study](../position.md#terms); f1 to f5 are
the blocks of VGG-16. For statements about trained networks, the column ends with the command that
measured the values. In these commands, DATA is a folder for data sets, FOLDER one of photographs,
and WEIGHTS one of ImageNet weights."""


def render_page(sections: tuple[Section, ...], findings: list[Finding]) -> str:
    """Returns docs/reference/statements.md: all claims in tables, without figures."""
    by_id = {finding.id: finding for finding in findings}
    introduction = (
        f"All {len(findings)} statements of [the lectures](../lectures.md), in our words, as\n"
        "`python -m experiments.claims` judges them. The number of a statement only names it."
    )
    parts = ["# Statements of the lectures", introduction, _VERDICTS, _COMPUTED]
    parts += [table_of_section(section, by_id).rstrip("\n") for section in sections]
    return "\n\n".join(parts) + "\n"
