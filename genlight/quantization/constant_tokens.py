"""A quantized linear layer that keeps the outputs for tokens that never change, so that they cost and lose nothing.

MixDQ (Zhao et al. 2024, arXiv:2405.17873): keys and values of the first token of CLIP, an outlier that is the same for
every prompt, are computed once in full precision; the other tokens get a scale of their own.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from genlight.quantization.formats import LayerFormat
from genlight.quantization.layers import LayerParts, QuantizedLayer, QuantizedLinear
from genlight.quantization.special_inputs import same_tokens, without_positions
from genlight.quantization.weights import QuantizedWeight

Mismatch = Literal["warn", "raise"]
_OTHER_TOKENS = (
    "tokens that were the same for every prompt of the calibration are others now: another text encoder, "
    "weighted prompts or a learned token; they are multiplied with the rounded weight"
)


@dataclass(frozen=True, eq=False)
class ConstantRows:
    """What is known of tokens that never change.

    Attributes:
        positions: where they stand, ascending.
        inputs: [positions, features].
        outputs: of the layer before quantization, with its bias, [positions, outputs].
        mismatch: what is done where an input has other numbers there: "warn" multiplies them with the rounded weight,
            "raise" refuses.
    """

    positions: tuple[int, ...]
    inputs: Tensor
    outputs: Tensor
    mismatch: Mismatch = "warn"


class ConstantTokenLinear(QuantizedLinear):
    """A `QuantizedLinear` for inputs [batch, tokens, features] some of whose tokens are known.

    Attributes:
        positions, mismatch: as in `ConstantRows`.
    """

    constant_inputs: Tensor
    constant_outputs: Tensor

    def __init__(
        self, form: LayerFormat, weight: QuantizedWeight | Tensor, parts: LayerParts | None, rows: ConstantRows
    ) -> None:
        """As `QuantizedLinear`, with the known rows; a static range is that of the other tokens.

        Raises:
            ValueError: rows that do not fit the layer.
        """
        super().__init__(form, weight, parts)
        count = len(rows.positions)
        expected = ((count, self.in_features), (count, self.out_features))
        if not count or (tuple(rows.inputs.shape), tuple(rows.outputs.shape)) != expected:
            raise ValueError(
                f"rows of shapes {list(rows.inputs.shape)} and {list(rows.outputs.shape)} must be "
                f"{list(expected[0])} and {list(expected[1])}, one for each of the positions {rows.positions}"
            )
        self.positions, self.mismatch = rows.positions, rows.mismatch
        self.register_buffer("constant_inputs", rows.inputs.detach())
        self.register_buffer("constant_outputs", rows.outputs.detach())

    def forward(self, values: Tensor) -> Tensor:
        """[batch, tokens, features] to [batch, tokens, outputs]; the guard is in every call.

        Raises:
            ValueError: other tokens, where `mismatch` is "raise"; or no token at one of the positions.
        """
        if values.ndim < 2 or values.shape[-2] <= max(self.positions):
            raise ValueError(f"an input of shape {list(values.shape)} has no tokens at the positions {self.positions}")
        others = super().forward(without_positions(values, self.positions))
        rows = self._rows(torch.cat([values[..., position : position + 1, :] for position in self.positions], dim=-2))
        rows = rows.expand(*values.shape[:-2], -1, -1)
        parts: list[Tensor] = []
        begin = 0
        for index, position in enumerate(self.positions):
            end = position - index  # so many others stand before it
            parts += [others[..., begin:end, :], rows[..., index : index + 1, :]]
            begin = end
        return torch.cat([*parts, others[..., begin:, :]], dim=-2)

    def _rows(self, given: Tensor) -> Tensor:
        known, kept = self.constant_inputs.to(given.dtype), self.constant_outputs.to(given.dtype)
        same = same_tokens(given, known)
        return torch.where(same, kept, self._products(given, (same | ~given.any(dim=-1, keepdim=True)).all()))

    def _products(self, given: Tensor, expected: Tensor) -> Tensor:
        """What tokens give that are not known; `expected`, bool []: all are known, or zeros."""

        def of_zeros(inputs: Tensor) -> Tensor:
            # what pipelines write for no text, such as SDXL's for no negative prompt
            zeros = given.new_zeros(*inputs.shape[:-1], self.outputs)
            return zeros if self.bias is None else zeros + self.bias.to(given.dtype)

        def unrounded(inputs: Tensor) -> Tensor:
            return self._product_of_numbers(inputs, inputs).to(given.dtype)

        # a decision by numbers would stop a captured program, and have a compiled one wait for its GPU
        compiled = torch.compiler.is_compiling()
        if not (compiled or (given.is_cuda and torch.cuda.is_current_stream_capturing())):
            if bool(expected):
                return of_zeros(given)
            if self.mismatch == "raise":
                raise ValueError(f"{_OTHER_TOKENS.partition(';')[0]}: quantize with this text encoder")
            warnings.warn(_OTHER_TOKENS, stacklevel=4)
        inputs = self.balanced(given)
        if compiled and given.device.type == "cpu":
            return torch.cond(expected, of_zeros, unrounded, (inputs,))  # type: ignore[no-any-return]
        return unrounded(inputs)


def with_constant_rows(
    layer: QuantizedLayer, plain: nn.Linear, positions: tuple[int, ...], inputs: Tensor, mismatch: Mismatch = "warn"
) -> ConstantTokenLinear:
    """A quantized layer that keeps what the plain one makes of some tokens.

    Args:
        layer: quantized, from `plain`.
        plain: in full precision.
        positions: of the tokens.
        inputs: of the tokens [positions, features].
        mismatch: as in `ConstantRows`.
    """
    weight = layer.quantized_weight or layer.weight_matrix
    up, down = layer.up, layer.down
    low_rank = None if up is None or down is None else (up, down)
    parts = LayerParts(layer.bias, layer.balance, low_rank, layer.activation_range)
    with torch.no_grad():
        outputs = plain(inputs.to(plain.weight))
    return ConstantTokenLinear(layer.form, weight, parts, ConstantRows(positions, inputs, outputs, mismatch))
