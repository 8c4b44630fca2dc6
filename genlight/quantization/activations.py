"""Grids for the inputs of layers: measured on the spot, or chosen from a table of calibrated ranges."""

from torch import Tensor

from genlight.quantization.context import SamplingContext, branch_parts, current_context
from genlight.quantization.formats import ActivationFormat
from genlight.quantization.uniform import Grid, grid_from_range


def activation_grid(values: Tensor, form: ActivationFormat, ranges: Tensor | None = None) -> Grid:
    """The grid for one input; its scale has as many dimensions as the input.

    Args:
        values: [batch, …, features], or [batch, channels, height, width] with a granularity other than "token".
        form: bits 2 to 8.
        ranges: with mode "static", calibrated minimum and maximum, float32 [branches, steps, 2], or for images
            [branches, steps, 2, channels] with a range for each channel; a table of one branch or one step serves all.

    Raises:
        ValueError: static without ranges, or ranges for other branches or another number of steps than those of the
            current context.
    """
    if form.mode == "static":
        if ranges is None:
            raise ValueError("ranges must be given where activation.mode is 'static'")
        return _static_grid(values, form, ranges)
    return dynamic_grid(values, form)


def dynamic_grid(values: Tensor, form: ActivationFormat) -> Grid:
    """The grid over the input's own range, per token (last dimension), per sample, or of all."""
    if form.granularity == "token":
        dims = [values.ndim - 1]
    else:
        dims = list(range(1 if form.granularity == "sample" else 0, values.ndim))
    if form.symmetric:
        greatest = values.abs().amax(dim=dims, keepdim=True)
        return grid_from_range(-greatest, greatest, form.bits, symmetric=True, numbers=form.numbers)
    least, greatest = values.amin(dim=dims, keepdim=True), values.amax(dim=dims, keepdim=True)
    return grid_from_range(least, greatest, form.bits, symmetric=False, numbers=form.numbers)


def _static_grid(values: Tensor, form: ActivationFormat, ranges: Tensor) -> Grid:
    # a compiled program cannot read the context, and one range for all needs none
    single = ranges.shape[0] == 1 and ranges.shape[1] == 1
    chosen = ranges[:, 0] if single else _current_ranges(len(values), ranges, current_context())
    by_channel = chosen.shape[2:]
    chosen = chosen.reshape(len(chosen), 2, *by_channel, *[1] * (values.ndim - 1 - len(by_channel)))
    return grid_from_range(chosen[:, 0], chosen[:, 1], form.bits, symmetric=form.symmetric, numbers=form.numbers)


def _current_ranges(batch: int, ranges: Tensor, context: SamplingContext) -> Tensor:
    """Those of the current step, [1 | batch, 2] or [1 | batch, 2, channels]."""
    branches, steps = ranges.shape[:2]
    if steps > 1 and steps != context.num_steps:
        raise ValueError(
            f"the ranges were calibrated for {steps} steps and the sampling has {context.num_steps}: calibrate again"
        )
    at_step = ranges[:, context.step if steps > 1 else 0]
    if branches == 1:
        return at_step
    if max(context.branches) >= branches:
        raise ValueError(f"the ranges hold {branches} guidance branches, and branches is {context.branches}")
    chosen = at_step[list(context.branches)]
    if len(context.branches) > 1:
        chosen = chosen.repeat_interleave(branch_parts(batch, context), dim=0)
    return chosen
