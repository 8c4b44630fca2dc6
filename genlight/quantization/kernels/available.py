"""Whether Triton's kernels run where tensors lie."""

import os
from functools import cache

import torch

# Triton reads this when it is imported: kernels are then interpreted on the CPU, slowly, for tests
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_runs_on(device: torch.device) -> bool:
    """On CUDA from compute capability 8.0 and on ROCm where Triton can be imported; on the CPU only interpreted."""
    return device.type == ("cpu" if INTERPRETED else "cuda") and _has_kernels(device)


@cache
def _has_kernels(device: torch.device) -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return INTERPRETED or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
