"""The kernel that mixes experts, against a sum in float64; quantization/kernels/test_available says where it runs."""

import pytest
import torch
from quantization.kernels.kernel_device import DEVICE, MARKS

from genlight.experts import mixing
from genlight.experts.mixing import mix

pytestmark = MARKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "experts"), [(1, 1), (2, 8), (3, 5), (4, 8), (30, 60)])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (129, 33)])
def test_a_mixture_is_the_sum_rounded_once(
    rows: int, experts: int, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(mixing, "_mixed_in_blocks")  # the kernel must be what runs
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.randn(rows, experts, generator=generator)
    tensor = torch.randn(experts, *shape, generator=generator).to(dtype)
    mixed = mix(matrix, tensor.to(DEVICE))
    assert mixed.dtype == dtype and mixed.device.type == DEVICE
    terms = matrix.double()[:, :, None] * tensor.double().reshape(1, experts, -1)
    # half a unit in the last place, and what float32 loses in a sum of so many terms
    allowed = torch.finfo(dtype).eps * terms.sum(1).abs() + experts * torch.finfo(torch.float32).eps * terms.abs().sum(
        1
    )
    assert bool(((mixed.cpu().double().reshape(rows, -1) - terms.sum(1)).abs() <= allowed).all())


def test_strided_weights_are_mixed_as_dense_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, tensor = torch.randn(2, 4, generator=generator), torch.randn(4, 6, 5, generator=generator).to(DEVICE)
    assert torch.equal(mix(matrix, tensor.mT), mix(matrix, tensor.mT.contiguous()))
    assert torch.equal(mix(matrix, tensor[:, 1:4]), mix(matrix, tensor[:, 1:4].contiguous()))
