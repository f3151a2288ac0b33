"""One file per experiment: `get_config()`, and a docstring with command, and time and result if measured."""
