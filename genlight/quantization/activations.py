"""Grids for the inputs of layers: measured on the spot, or chosen from a table of calibrated ranges."""

from torch import Tensor

from genlight.quantization.context import SamplingContext, SamplingSteps, branch_parts, current_context
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
        return current_grid(values, static_grids(ranges, form))
    return dynamic_grid(values, form)


def dynamic_grid(values: Tensor, form: ActivationFormat) -> Grid:
    """The grid over the input's own range, per token (last dimension), per sample, or of all."""
    if form.granularity == "token":
        dims = [values.ndim - 1]
    else:
        dims = list(range(1 if form.granularity == "sample" else 0, values.ndim))
    least, greatest = values.amin(dim=dims, keepdim=True), values.amax(dim=dims, keepdim=True)
    return grid_from_range(least, greatest, form.bits, symmetric=form.symmetric, numbers=form.numbers)


def static_grids(ranges: Tensor, form: ActivationFormat) -> Grid:
    """The grids over a table of ranges, see `activation_grid`: one for each branch, step and channel."""
    return grid_from_range(ranges[:, :, 0], ranges[:, :, 1], form.bits, symmetric=form.symmetric, numbers=form.numbers)


def current_grid(values: Tensor, grids: Grid, steps: SamplingSteps | None = None) -> Grid:
    """Of `static_grids`, the one for an input at the current step.

    Args:
        values: the input.
        grids: of one branch where `steps` are given.
        steps: say which step that is; None: the current context does.

    Raises:
        ValueError: as `activation_grid`.
    """
    zero_point = None if grids.zero_point is None else _current(values, grids.zero_point, steps)
    return Grid(_current(values, grids.scale, steps), zero_point, grids.bits, grids.numbers)


def _current(values: Tensor, table: Tensor, steps: SamplingSteps | None) -> Tensor:
    # a compiled program cannot read the context, and one range for all needs none
    if table.shape[0] == 1 and table.shape[1] == 1:
        chosen = table[:, 0]
    elif steps is not None:
        chosen = table.index_select(1, steps.index.to(table.device))[:, 0]
    else:
        chosen = _of_step(len(values), table, current_context())
    return chosen.reshape(*chosen.shape, *[1] * (values.ndim - chosen.ndim))


def _of_step(batch: int, table: Tensor, context: SamplingContext) -> Tensor:
    """Entries [1 | batch] or [1 | batch, channels] of a table [branches, steps] or [branches, steps, channels]."""
    branches, steps = table.shape[:2]
    if steps > 1 and steps != context.num_steps:
        raise ValueError(
            f"the ranges were calibrated for {steps} steps and the sampling has {context.num_steps}: calibrate again"
        )
    at_step = table[:, context.step if steps > 1 else 0]
    if branches == 1:
        return at_step
    if max(context.branches) >= branches:
        raise ValueError(f"the ranges hold {branches} guidance branches, and branches is {context.branches}")
    chosen = at_step[list(context.branches)]
    if len(context.branches) > 1:
        chosen = chosen.repeat_interleave(branch_parts(batch, context), dim=0)
    return chosen
