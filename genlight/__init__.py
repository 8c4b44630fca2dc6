"""genlight: make an existing generator cheaper. See `python -m genlight --help`."""

__version__ = "0.1.0"
