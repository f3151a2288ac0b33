"""Benchmarks in which every side is measured in the same run; the commands are in `__main__`."""
