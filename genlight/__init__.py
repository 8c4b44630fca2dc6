"""genlight: make an existing generator cheaper. See `python -m genlight --help`."""

from genlight.diffusers_hook import install

__version__ = "0.1.0"
install()
