"""One file per experiment: `get_config()`, and a docstring with command, time and result."""
