"""Benchmarks in which every side is measured in the same run.

The commands are in `__main__`.
"""
