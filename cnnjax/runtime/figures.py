"""What all figures share."""

from collections.abc import Sequence

from matplotlib import font_manager


def label_classes(names: Sequence[str]) -> list[str]:
    """Returns the classes' names; #NUMBER where the font lacks a character of a name.

    matplotlib would draw an empty box for it, and warn each time.
    """
    drawable: set[int] = set()
    # All but the first are fallbacks, which the user's matplotlibrc may name.
    for family in font_manager.FontProperties().get_family():
        file = font_manager.findfont(font_manager.FontProperties(family=[family]))
        drawable |= font_manager.get_font(file).get_charmap().keys()
    labels = []
    for number, name in enumerate(names):
        is_drawable = drawable.issuperset(map(ord, name))
        labels.append(name if is_drawable else f"#{number}")
    return labels
