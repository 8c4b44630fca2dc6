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

    def windows(self, padded: Tensor) -> Tensor:
        """What each output sums over: [batch, channels, height', width', *kernel], a view of what `pad` gives."""
        reach = [step * (size - 1) + 1 for step, size in zip(self.dilation, self.kernel_size)]
        rows = padded.unfold(2, reach[0], self.stride[0]).unfold(3, reach[1], self.stride[1])
        return rows[..., :: self.dilation[0], :: self.dilation[1]]

    def patches(self, padded: Tensor) -> Tensor:
        """What each output sums over: [batch × places, channels × kernel] of what `pad` gives.

        Places are last in memory, as they are in the input: many times as fast to copy as patch by patch.
        """
        return self.windows(padded).permute(1, 4, 5, 0, 2, 3).flatten(0, 2).flatten(1).t()

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
        weight, grid, where = self.quantized_weight, self.grid(inputs), self.geometry
        assert weight is not None
        codes = self._padded(quantize(inputs, grid), grid.zero_point)
        patches = where.patches(codes)
        # a patch sums over channels first, and then over the few places of the kernel
        sums = where.windows(codes.sum(dim=1, keepdim=True, dtype=torch.int32)).sum(dim=(1, 4, 5), dtype=torch.int32)
        rows = row_grid(_of_patches(grid), sums.flatten(1)[..., None])
        if codes.device.type != "cpu":
            patches = patches.contiguous()
        product = integer_linear(patches, rows, weight, sums=sums.flatten())
        return product.reshape(len(inputs), height, width, self.outputs).permute(0, 3, 1, 2)

    def _padded(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """Codes with their border, which has the code of the number zero where it is of zeros."""
        where = self.geometry
        if where.pad_mode != "constant":
            return where.pad(codes.float()).to(torch.int8)  # other modes do not know int8
        padded = where.pad(codes)
        if zero_point is None or padded is codes:
            return padded
        inside = where.pad(torch.ones_like(codes[:1, :1]))
        return torch.where(inside.bool(), padded, zero_point.to(torch.int8))


def _of_patches(grid: Grid) -> Grid:
    """A grid [batch | 1, 1, 1, 1] for pixels as one [batch | 1, 1, 1] for patches."""
    zero_point = grid.zero_point
    return replace(grid, scale=grid.scale[..., 0], zero_point=None if zero_point is None else zero_point[..., 0])
