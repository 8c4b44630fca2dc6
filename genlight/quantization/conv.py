"""A convolution over quantized parts: codes are multiplied as one matrix product over patches."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from genlight.quantization.formats import FLOAT_BITS, LayerFormat
from genlight.quantization.integer import integer_linear
from genlight.quantization.layers import LayerParts, QuantizedLayer, row_grid
from genlight.quantization.uniform import Grid, quantize
from genlight.quantization.weights import QuantizedWeight


@dataclass(frozen=True)
class Geometry:
    """Where a convolution looks.

    Attributes:
        kernel_size: height and width.
        stride: likewise.
        dilation: likewise.
        groups: of channels that are convolved by themselves.
        pads: left, right, top, bottom.
        pad_mode: as `torch.nn.functional.pad` names it.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pads: tuple[int, int, int, int]
    pad_mode: str

    @classmethod
    def of(cls, layer: nn.Conv2d) -> "Geometry":
        """That of a layer of torch."""

        def pair(values: tuple[int, ...]) -> tuple[int, int]:
            return values[0], values[1]

        left, right, top, bottom = layer._reversed_padding_repeated_twice
        pad_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        kernel, stride, dilation = pair(layer.kernel_size), pair(layer.stride), pair(layer.dilation)
        return cls(kernel, stride, dilation, layer.groups, (left, right, top, bottom), pad_mode)

    def pad(self, values: Tensor) -> Tensor:
        """[batch, channels, height, width] with its border."""
        return functional.pad(values, self.pads, mode=self.pad_mode) if any(self.pads) else values

    def patches(self, values: Tensor) -> Tensor:
        """What each output sums over: [batch, places, channels × kernel] of [batch, channels, height, width]."""
        columns = functional.unfold(self.pad(values), self.kernel_size, self.dilation, 0, self.stride)
        return columns.transpose(1, 2)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of `height` and `width`."""
        left, right, top, bottom = self.pads
        sizes = (height + top + bottom, width + left + right)
        kernel, dilation, stride = self.kernel_size, self.dilation, self.stride
        return (
            (sizes[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1,
            (sizes[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1,
        )


class QuantizedConv2d(QuantizedLayer):
    """Stands in for `torch.nn.Conv2d`, with any stride, padding, dilation and groups.

    Padding is with zeros as numbers, not as codes. With more than one group, and in float8, the numbers that codes
    stand for are convolved.

    Attributes:
        geometry: where it looks.
    """

    def __init__(
        self, form: LayerFormat, weight: QuantizedWeight | Tensor, parts: LayerParts | None, geometry: Geometry
    ) -> None:
        """As `QuantizedLayer`, with the geometry; the weight is [outputs, channels / groups × kernel].

        Raises:
            ValueError: activations per token: a convolution sums over pixels, which must share their scale; or a
                balance or a low-rank branch with more than one group.
        """
        if form.activation.granularity == "token" and form.activation.bits != FLOAT_BITS:
            raise ValueError(
                "activation.granularity = 'token' must be 'sample' or 'tensor' for a convolution: it sums over pixels"
            )
        super().__init__(form, weight, parts)
        self.geometry = geometry
        special = (self.input_scale, self.rotation_signs, self.up)
        if geometry.groups > 1 and any(part is not None for part in special):
            raise ValueError(f"groups = {geometry.groups} must be 1 for a balance or a low-rank branch")

    def forward(self, values: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, outputs, height', width'], in the type of the input."""
        inputs = self.balanced(values, dim=1)
        height, width = self.geometry.output_size(*inputs.shape[2:])
        # patches are made of codes that are integers
        foldable = self.geometry.groups == 1 and self.form.activation.numbers == "integer"
        if foldable and self.uses_integers(len(inputs) * height * width):
            output = self._integer_convolution(inputs, height, width)
        else:
            rounded = self.rounded(inputs)
            output = self._convolution(rounded, self.weight_matrix.to(rounded.dtype))
        if self.up is not None and self.down is not None:
            inner = self._convolution(inputs, self.down.to(inputs.dtype))
            output = output + functional.conv2d(inner, self.up.to(inputs.dtype)[:, :, None, None])
        return (output if self.bias is None else output + self.bias[:, None, None]).to(values.dtype)

    def _convolution(self, inputs: Tensor, matrix: Tensor) -> Tensor:
        where = self.geometry
        weight = matrix.reshape(len(matrix), -1, *where.kernel_size)
        return functional.conv2d(where.pad(inputs), weight, None, where.stride, 0, where.dilation, where.groups)

    def _integer_convolution(self, inputs: Tensor, height: int, width: int) -> Tensor:
        weight, grid = self.quantized_weight, self.grid(inputs)
        assert weight is not None
        codes = quantize(inputs, grid).float()
        # zeros of the border are zeros only where code 0 means zero
        centred = codes if grid.zero_point is None else codes - grid.zero_point
        patches = self.geometry.patches(centred)
        rows = row_grid(_of_patches(grid), patches)
        flat = patches.flatten(0, 1)
        flat = flat if rows.zero_point is None else flat + rows.zero_point
        product = integer_linear(flat.to(torch.int8), rows, weight)
        return product.reshape(len(inputs), height, width, self.outputs).permute(0, 3, 1, 2)


def _of_patches(grid: Grid) -> Grid:
    """A grid [batch | 1, 1, 1, 1] for pixels as one [batch | 1, 1, 1] for patches."""
    zero_point = grid.zero_point
    return replace(grid, scale=grid.scale[..., 0], zero_point=None if zero_point is None else zero_point[..., 0])
