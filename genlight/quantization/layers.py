"""A linear layer whose weight is stored in few bits and whose input is rounded as it comes, and what it is made of.

What it computes is

    y = Q(x'') W''ᵀ + x'' downᵀ upᵀ + b,     x'' = (x / s) R

with s, R and the low-rank branch where there are any. Scales stay float32 when the model is cast. Convolutions have the
same parts: see `conv`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from genlight.quantization.activations import activation_grid, current_grid, static_grids
from genlight.quantization.balance import Balance, balance_input, unbalance_weight
from genlight.quantization.context import SamplingSteps
from genlight.quantization.float8 import float8_is_valid, float8_linear
from genlight.quantization.formats import FLOAT_BITS, LayerFormat
from genlight.quantization.hadamard import Rotation
from genlight.quantization.integer import integer_is_valid, integer_linear
from genlight.quantization.rows import quantize_rows
from genlight.quantization.uniform import Grid, fake_quantize, quantize
from genlight.quantization.weights import QuantizedWeight

_NOT_FASTER = (
    "a quantized layer cannot multiply its codes here, for its scales per group, its shape or its device: "
    "it takes the memory of its bits, and nothing is faster"
)
# whatever type the model is cast to
_KEPT_TYPES = ("weight_codes", "weight_scale", "input_scale", "activation_range", "static_scale")
# so many of a thousand numbers, and their codes, fit the cache of a core
_ROWS_OF_A_CORE = 256


@dataclass(frozen=True, eq=False)
class LayerParts:
    """What a quantized layer has beside its weight.

    Attributes:
        bias: [outputs].
        balance: of the input.
        low_rank: up [outputs, rank] and down [rank, columns], of balanced inputs.
        activation_range: minimum and maximum of balanced inputs, float32 [branches, steps, 2], or of each channel of a
            convolution's, [branches, steps, 2, channels].
    """

    bias: Tensor | None = None
    balance: Balance = field(default_factory=Balance)
    low_rank: tuple[Tensor, Tensor] | None = None
    activation_range: Tensor | None = None


class QuantizedLayer(nn.Module):
    """The parts of a quantized layer, as buffers; `QuantizedLinear` and `QuantizedConv2d` add how they multiply.

    Attributes:
        form: bits and granularities.
        rotation_factors: orders of the Hadamard matrices of R, () without a rotation.
        outputs: rows of the weight's matrix.
        columns: inputs of one output, channels × kernel.
        steps: what chooses among the ranges of a table by step, see `steps.follow_steps`; None: the sampling context.
        execution: "integer" multiplies codes (those in float8 too) where that is valid, else, as "fake" always, the
            numbers they stand for.
    """

    weight_codes: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    float_weight: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    rotation_signs: Tensor | None
    up: Tensor | None
    down: Tensor | None
    activation_range: Tensor | None
    # what follows from these and is not saved, see `derive`
    weight_sums: Tensor | None
    static_scale: Tensor | None
    static_zero_point: Tensor | None
    steps: SamplingSteps | None

    def __init__(self, form: LayerFormat, weight: QuantizedWeight | Tensor, parts: LayerParts | None = None) -> None:
        """
        Args:
            form: of the weight and the input.
            weight: balanced and quantized; a plain matrix [outputs, columns] where its bits are 16.
            parts: all else.

        Raises:
            ValueError: static activations without their ranges, or ranges that nothing reads.
        """
        super().__init__()
        parts = parts or LayerParts()
        needs_range = form.activation.mode == "static" and form.activation.bits != FLOAT_BITS
        if needs_range != (parts.activation_range is not None):
            raise ValueError("activation_range must be given where activation.mode is 'static', and only there")
        rotation = parts.balance.rotation
        up, down = parts.low_rank or (None, None)
        quantized = weight if isinstance(weight, QuantizedWeight) else None
        self.form = form
        self.rotation_factors = () if rotation is None else rotation.factors
        if isinstance(weight, QuantizedWeight):
            self.outputs, self.columns = len(weight.codes), weight.columns
        else:
            self.outputs, self.columns = weight.shape
        self.execution: Literal["integer", "fake"] = "integer"
        self.steps = None
        tensors = {
            "weight_codes": None if quantized is None else quantized.codes,
            "weight_scale": None if quantized is None else quantized.grid.scale,
            "weight_zero_point": None if quantized is None else quantized.grid.zero_point,
            "float_weight": weight if isinstance(weight, Tensor) else None,
            "bias": parts.bias,
            "input_scale": parts.balance.scale,
            "rotation_signs": None if rotation is None else rotation.signs,
            "up": up,
            "down": down,
            "activation_range": parts.activation_range,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach())
        for name in ("weight_sums", "static_scale", "static_zero_point"):
            self.register_buffer(name, None)
        self.derive()

    def derive(self) -> None:
        """Compute what is the same in every call: static grids, and Σ p where inputs have a zero point.

        Whoever sets a tensor calls this; loading a `state_dict` does.
        """
        weight, form, ranges = self.quantized_weight, self.form.activation, self.activation_range
        if ranges is not None and not ranges.is_meta:
            grids = static_grids(ranges, form)
            self._keep_derived("static_scale", grids.scale)
            self._keep_derived("static_zero_point", grids.zero_point)
        shifted = form.bits != FLOAT_BITS and form.numbers == "integer" and not form.symmetric
        if shifted and weight is not None and weight.group_size is None and not weight.codes.is_meta:
            self._keep_derived("weight_sums", replace(weight, sums=None).row_sums())

    def _keep_derived(self, name: str, tensor: Tensor | None) -> None:
        # accelerate takes each name of a buffer that is not saved for that of a tensor
        self.register_buffer(name, tensor, persistent=tensor is None)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self.derive()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: getattr(self, name) for name in _KEPT_TYPES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != before.dtype:
                setattr(self, name, before.to(moved.device))
        return self

    @property
    def balance(self) -> Balance:
        """s and R."""
        signs = self.rotation_signs
        return Balance(self.input_scale, None if signs is None else Rotation(signs, self.rotation_factors))

    @property
    def quantized_weight(self) -> QuantizedWeight | None:
        """The packed weight; None where it stays in floating point."""
        if self.weight_codes is None or self.weight_scale is None:
            return None
        form = self.form.weight
        grid = Grid(self.weight_scale, self.weight_zero_point, form.bits, form.numbers)
        return QuantizedWeight(self.weight_codes, grid, self.columns, form.group_size, self.weight_sums)

    @property
    def has_steps(self) -> bool:
        """Whether the input has a range for each of several steps."""
        return self.activation_range is not None and self.activation_range.shape[1] > 1

    @property
    def weight_matrix(self) -> Tensor:
        """W'' as numbers, [outputs, columns]: balanced, without the low-rank branch."""
        weight = self.quantized_weight
        if weight is not None:
            return weight.dequantized()
        assert self.float_weight is not None
        return self.float_weight

    def effective_weight(self) -> Tensor:
        """The weight [outputs, columns] that gives the same output on inputs as they are, but for their rounding."""
        matrix = self.weight_matrix
        if self.up is not None and self.down is not None:
            matrix = matrix + self.up.to(matrix.dtype) @ self.down.to(matrix.dtype)
        return unbalance_weight(matrix, self.balance)

    def uses_integers(self, rows: int) -> bool:
        """Whether the codes of an input of `rows` rows are multiplied; where they cannot be, a warning says so.

        Raises:
            ValueError: codes in float8 on a GPU that has no float8.
        """
        weight = self.quantized_weight
        if self.execution != "integer" or self.form.activation.bits == FLOAT_BITS or weight is None:
            return False
        by_channel = self.activation_range is not None and self.activation_range.ndim == 4
        numbers = self.form.activation.numbers
        fits = float8_is_valid if numbers == "float8" else integer_is_valid
        valid = numbers == weight.grid.numbers and not by_channel and fits(rows, weight)
        if not valid and rows and not torch.compiler.is_compiling():
            # of one text, so that Python shows it once
            warnings.warn(_NOT_FASTER, stacklevel=3)
        return valid

    def balanced(self, values: Tensor, dim: int = -1) -> Tensor:
        """Inputs as the weight sees them: (x / s) R along the dimension of channels."""
        return balance_input(values, self.balance, dim)

    def grid(self, inputs: Tensor) -> Grid:
        """The grid for balanced inputs."""
        form = self.form.activation
        if self.static_scale is None:
            return activation_grid(inputs, form, self.activation_range)
        grids = Grid(self.static_scale, self.static_zero_point, form.bits, form.numbers)
        return current_grid(inputs, grids, self.steps)

    def rounded(self, inputs: Tensor) -> Tensor:
        """Balanced inputs as the numbers that their codes stand for."""
        return inputs if self.form.activation.bits == FLOAT_BITS else fake_quantize(inputs, self.grid(inputs))

    def extra_repr(self) -> str:
        """Bits and what is done to the input."""
        weight, activation = self.form.weight, self.form.activation
        rank = 0 if self.up is None else self.up.shape[1]
        return (
            f"columns={self.columns}, weight={weight.bits} bits per {weight.granularity}, input={activation.bits} bits "
            f"{activation.mode} per {activation.granularity}, scale={self.input_scale is not None}, "
            f"rotation={self.rotation_factors}, rank={rank}"
        )


class QuantizedLinear(QuantizedLayer):
    """Stands in for `torch.nn.Linear`."""

    @property
    def in_features(self) -> int:
        """Input channels."""
        return self.columns

    @property
    def out_features(self) -> int:
        """Output channels."""
        return self.outputs

    def forward(self, values: Tensor) -> Tensor:
        """[…, in_features] to […, out_features], in the type of the input."""
        rows = values.numel() // max(1, self.columns)
        if self.uses_integers(rows):
            return self._product_of_codes(values, rows)
        inputs = self.balanced(values)
        return self._product_of_numbers(self.rounded(inputs), inputs).to(values.dtype)

    def _product_of_numbers(self, rounded: Tensor, inputs: Tensor) -> Tensor:
        output = functional.linear(rounded, self.weight_matrix.to(rounded.dtype))
        low_rank = self._low_rank(inputs)
        if low_rank is not None:
            output = output + functional.linear(*low_rank)
        return output if self.bias is None else output + self.bias

    def _product_of_codes(self, values: Tensor, rows: int) -> Tensor:
        form, inputs, grid = self.form.activation, values, None
        if form.mode != "dynamic" or form.granularity != "token":
            inputs = self.balanced(values)
            grid = row_grid(self.grid(inputs), inputs)
        inputs, size, weight = inputs.reshape(-1, self.columns), _rows_at_once(inputs), self.quantized_weight
        assert weight is not None
        if rows <= size:
            output = self._product_of_rows(inputs, grid, weight, values.dtype)
        else:
            output, weight = values.new_empty(rows, self.outputs), weight.in_bytes()
            for start in range(0, rows, size):
                part = slice(start, start + size)
                own = None if grid is None else grid.of_rows(part)
                output[part] = self._product_of_rows(inputs[part], own, weight, values.dtype)
        return output.reshape(*values.shape[:-1], -1)

    def _product_of_rows(
        self, inputs: Tensor, grid: Grid | None, weight: QuantizedWeight, dtype: torch.dtype
    ) -> Tensor:
        """Of [rows, columns]: balanced already if there is a grid, [rows | 1, 1]; else each row gets its own."""
        sums = None
        if grid is None:
            found = quantize_rows(inputs, self.form.activation, balance=self.balance, keep=self.up is not None)
            codes, grid, sums = found.codes, found.grid, found.sums
            low_rank = None if found.inputs is None else self._low_rank(found.inputs)
        else:
            codes, low_rank = quantize(inputs, grid), self._low_rank(inputs)
        if grid.numbers == "float8":
            return float8_linear(codes, grid, weight, low_rank=low_rank, bias=self.bias, dtype=dtype)
        return integer_linear(codes, grid, weight, sums=sums, low_rank=low_rank, bias=self.bias, dtype=dtype)

    def _low_rank(self, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """x'' downᵀ and up, whose product is the low-rank branch, of one type."""
        if self.up is None or self.down is None:
            return None
        inner = functional.linear(inputs, self.down.to(inputs.dtype))  # of another type than inputs under autocast
        return inner, self.up.to(inner.dtype)


def _rows_at_once(values: Tensor) -> int:
    """Rows for which everything is done before the next are begun: on a CPU, what is made on the way stays in cache."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return values.numel()
    return _ROWS_OF_A_CORE * torch.get_num_threads()


def row_grid(grid: Grid, inputs: Tensor) -> Grid:
    """A grid for inputs [..., features] as one for their rows, scale [rows, 1] or [1, 1]."""

    def rows(part: Tensor) -> Tensor:
        return part.reshape(1, 1) if part.numel() == 1 else part.expand(*inputs.shape[:-1], 1).reshape(-1, 1)

    zero_point = None if grid.zero_point is None else rows(grid.zero_point)
    return replace(grid, scale=rows(grid.scale), zero_point=zero_point)
