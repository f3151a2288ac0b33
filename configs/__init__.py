"""One file per experiment: `get_config()`, and a docstring with its command, time and result."""
