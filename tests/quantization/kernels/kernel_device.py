"""Where the kernels' tests run: on CUDA as tests marked `gpu`, or anywhere by Triton's interpreter, which needs a
process of its own: see test_available. Importing this skips a file where Triton is missing."""

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [] if INTERPRETED else [pytest.mark.gpu]
