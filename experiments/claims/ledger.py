"""What a claim is, and how it is judged."""

import dataclasses
from collections.abc import Callable, Iterable

LECTURES = {
    "WPI": "WPI CS 539, Machine Learning",
    "UBC": "UBC CPSC 532S, lecture 6",
    "UTSA": "UTSA EE 6973, Applied Machine Learning with Big Data",
    "NUS": "NUS CS5242, lecture 8",
    "Inha": "Inha, Machine Learning",
}

HOLDS = "holds"
# The source leaves something open, or is right in one sense only; the note says in which.
READING = "holds under a stated reading"
# The note gives the right value.
WRONG = "wrong"
# A publication that the note names says otherwise; nothing is computed.
CONTRADICTED = "wrong by publications"
# Measured or computed, but the numbers do not carry a verdict; the note says why.
UNDECIDED = "undecided"
# The note gives the reason.
NOT_COMPUTED = "not computed"
VERDICTS = (WRONG, CONTRADICTED, READING, UNDECIDED, HOLDS, NOT_COMPUTED)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of one check, with the numbers behind it in `computed`."""

    word: str
    note: str
    computed: dict


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of one or several lectures, and the check that judges it."""

    id: str
    sources: tuple[str, ...]
    statement: str
    check: Callable[[], Verdict]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim with its verdict, as it is written to claims.json."""

    id: str
    sources: tuple[str, ...]
    statement: str
    verdict: str
    note: str
    computed: dict


class Section:
    """The claims of one topic, in the order in which they are defined."""

    def __init__(self, title: str):
        self.title = title
        self.claims: list[Claim] = []

    def claim(self, id: str, sources: str, statement: str) -> Callable:
        """Adds the decorated check to the section.

        - `sources`: names of lectures, separated by spaces.
        """

        def add(check: Callable[[], Verdict]) -> Callable[[], Verdict]:
            self.claims.append(Claim(id, tuple(sources.split()), statement, check))
            return check

        return add


def judge(
    literally: bool | None,
    computed: dict,
    *,
    as_read: bool | None = False,
    note: str = "",
    undecided: str = "the 95 % interval of a measured number includes the boundary, or is unknown",
) -> Verdict:
    """Returns a verdict: a claim holds as stated, as the note reads it, or not, or is undecided.

    Args:
      literally: whether the claim holds as stated; None if the numbers do not decide.
      computed: the numbers behind the verdict, by what they are.
      as_read: whether the claim holds in the sense that `note` states, or None; counts only if it
        does not hold literally.
      note: the sense in which the claim holds, or the right value of a wrong claim.
      undecided: the note of an undecided claim.
    """
    if literally:
        return Verdict(HOLDS, note, computed)
    if as_read:
        return Verdict(READING, note, computed)
    if literally is None or as_read is None:
        return Verdict(UNDECIDED, undecided, computed)
    return Verdict(WRONG, note, computed)


def every(*conditions: bool | None) -> bool | None:
    """Returns False if a condition is False, else None if one is None, else True."""
    if any(condition is False for condition in conditions):
        return False
    return None if None in conditions else True


def not_computed(reason: str) -> Verdict:
    """Returns the verdict on a statement that this library cannot check."""
    return Verdict(NOT_COMPUTED, reason, {})


def is_above(value: float, boundary: float, half: float) -> bool | None:
    """Tells whether value ± half is above a boundary; None if the interval includes it."""
    if abs(value - boundary) <= half:
        return None
    return value > boundary


def contradicted(reason: str) -> Verdict:
    """Returns the verdict on a statement that a publication named in `reason` contradicts."""
    return Verdict(CONTRADICTED, reason, {})


def check_claims(claims: Iterable[Claim]) -> list[Finding]:
    """Checks each claim, and returns the findings."""
    findings = []
    for claim in claims:
        verdict = claim.check()
        findings.append(
            Finding(
                id=claim.id,
                sources=claim.sources,
                statement=claim.statement,
                verdict=verdict.word,
                note=verdict.note,
                computed=verdict.computed,
            )
        )
    return findings
