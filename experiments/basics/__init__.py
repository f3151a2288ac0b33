"""The lectures' basics as pictures and numbers: `python -m experiments.basics`."""
