"""Where kernels run; and the tests of the kernels themselves, run by Triton's interpreter in a process of their own,
as Triton decides when it is imported whether it interprets."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genlight.quantization.kernels.available import INTERPRETED, triton_runs_on

HERE = Path(__file__).parent
KERNELS = (
    HERE / "test_row_quantization.py",
    HERE / "test_integer_product.py",
    HERE.parent / "test_fusion.py",
    HERE.parents[1] / "experts" / "test_mixing_kernel.py",
)
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process")
def test_without_the_interpreter_nothing_runs_on_the_cpu() -> None:
    assert not triton_runs_on(torch.device("cpu")) and not triton_runs_on(torch.device("meta"))


@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
def test_interpreted_kernels() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *map(str, KERNELS)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
