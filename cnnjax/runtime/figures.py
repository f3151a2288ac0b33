"""What all figures share."""

import functools
from collections.abc import Sequence

from matplotlib import font_manager


def _drawable_characters() -> set[int]:
    """Returns the characters that the font has, as numbers."""
    # All but the first are fallbacks, which the user's matplotlibrc may name.
    return _characters_of(tuple(font_manager.FontProperties().get_family()))


# Cached: a figure may have hundreds of titles.
@functools.cache
def _characters_of(families: tuple[str, ...]) -> set[int]:
    drawable: set[int] = set()
    for family in families:
        file = font_manager.findfont(font_manager.FontProperties(family=[family]))
        drawable |= font_manager.get_font(file).get_charmap().keys()
    return drawable


def replace_undrawable(text: str) -> str:
    """Replaces each character that the font lacks by a question mark.

    matplotlib would draw an empty box for it, and warn each time. It cannot draw the bytes of names
    that are not UTF-8 at all.
    """
    drawable = _drawable_characters() | {ord("\n")}
    return "".join(letter if ord(letter) in drawable else "?" for letter in text)


def label_classes(names: Sequence[str]) -> list[str]:
    """Returns the classes' names; #NUMBER where the font lacks a character of a name.

    Question marks, as of `replace_undrawable`, could make two names one.
    """
    drawable = _drawable_characters()
    labels = []
    for number, name in enumerate(names):
        is_drawable = drawable.issuperset(map(ord, name))
        labels.append(name if is_drawable else f"#{number}")
    return labels
