"""The reference pages, which are generated from the code, are up to date."""

import importlib.util
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("generate", FOLDER / "generate.py")
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)


@pytest.mark.parametrize("page", generate.PAGES)
def test_the_page_is_what_the_code_says(page):
    """Run `python docs/generate.py` after a change of keys or options."""
    assert (FOLDER / "reference" / page).read_text() == generate.PAGES[page]()


def test_every_key_is_explained():
    for path in generate.KEYS.values():
        for name, _, comment in generate.keys(generate.ROOT / path):
            assert comment, f"{path}: config.{name} has no comment"
