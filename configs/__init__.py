"""One file per experiment: `get_config()`, and a docstring with the command.

The docstring also has the time and the result where they were measured.
"""
