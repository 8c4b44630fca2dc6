"""Products of inputs and weights in float8, on GPUs that multiply such numbers.

With a scale Δ for each row of the input and Λ for each row of the weight, y = Δ Λ Σ q p, summed in float32 by
`torch._scaled_mm`. Elsewhere layers multiply the numbers that codes stand for, which is the reference.
"""

import torch
from torch import Tensor
from torch.nn import functional

from genlight.quantization.uniform import Grid
from genlight.quantization.weights import QuantizedWeight

_LEAST_CAPABILITY = (8, 9)
# of inputs and outputs, what the library's kernels take
_MULTIPLE = 16


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def require_float8(device: torch.device) -> None:
    """Refuse a GPU that has no float8.

    Raises:
        ValueError: a CUDA device below compute capability 8.9, or one of ROCm, whose float8 may be another.
    """
    if device.type != "cuda":
        return
    if torch.version.hip is not None:
        raise ValueError("numbers = 'float8' is multiplied on CUDA devices and the CPU, not on ROCm")
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, _LEAST_CAPABILITY))
        raise ValueError(
            f"numbers = 'float8' needs a GPU of compute capability {least} or more, and this one has {found}: "
            "use 'integer', or set_execution(model, 'fake'), which computes the same numbers slowly"
        )


def float8_is_valid(rows: int, weight: QuantizedWeight) -> bool:
    """Whether `float8_linear` multiplies `rows` inputs with this weight faster than their numbers are.

    Only on CUDA, with inputs and outputs in multiples of 16, and one scale for a row of the weight.

    Raises:
        ValueError: a GPU that has no float8.
    """
    require_float8(weight.codes.device)
    outputs, columns = len(weight.codes), weight.columns
    fits = rows > 0 and weight.group_size is None and columns % _MULTIPLE == 0 and outputs % _MULTIPLE == 0
    return weight.codes.is_cuda and fits


def float8_linear(
    codes: Tensor,
    grid: Grid,
    weight: QuantizedWeight,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """x Wᵀ + inner upᵀ + b, [rows, outputs].

    The product leaves the GPU's kernel in bfloat16, whose rounding is a sixteenth of float8's.

    Args:
        codes: of the inputs, float8 [rows, columns].
        grid: of the inputs, scale [1 | rows, 1].
        weight: in float8, with one scale in all or one a row.
        low_rank: inner [rows, rank] and up [outputs, rank], of one type.
        bias: b [outputs].
        dtype: of the output.
    """
    rows, outputs = len(codes), len(weight.codes)
    kind = torch.bfloat16 if codes.is_cuda else torch.float32
    output: Tensor = torch._scaled_mm(
        codes,
        weight.codes.t(),
        scale_a=grid.scale.expand(rows, 1).contiguous(),
        scale_b=weight.grid.scale.expand(outputs, 1).contiguous().t(),
        bias=None if bias is None else bias.to(kind),
        out_dtype=kind,
    )
    if low_rank is not None:
        output = output + functional.linear(*low_rank)
    return output.to(dtype)
