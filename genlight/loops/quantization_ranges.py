"""Calibrated ranges of the inputs of layers: one for all steps of the sampling, or one for each of its timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from genlight.errors import in_config
from genlight.loops.quantization_variants import Variant
from genlight.quantization.context import SamplingSteps
from genlight.quantization.formats import FLOAT_BITS, LayerFormat
from genlight.quantization.recipe import shared_range, step_ranges
from genlight.quantization.special_inputs import balanced_ranges
from genlight.quantization.steps import timestep_of
from genlight.quantization.trajectory import NetworkCall

if TYPE_CHECKING:
    from genlight.loops.quantization_work import QuantizationWork


@dataclass
class InputRanges:
    """Ranges of the inputs of layers, found where they are asked for.

    Attributes:
        work: of the run, with its network in full precision.
    """

    work: QuantizationWork
    _balanced: dict[tuple[Any, ...], dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def steps(self) -> SamplingSteps | None:
        """The different timesteps of a sampling, from noise to image; None where one range serves all.

        Raises:
            UserError: the network takes no timestep, or different ones for the samples of a call.
        """
        work = self.work
        if not work.method.by_step:
            return None
        with in_config("method.activation_ranges"):
            times = {timestep_of(work.network, call) for call in work.reference("search", 1).calls}
        return SamplingSteps(sorted(times, reverse=True), next(work.network.parameters()).device)

    def places(self, calls: Sequence[NetworkCall]) -> list[int] | None:
        """Which of the timesteps each call has; None where one range serves all."""
        if self.steps is None:
            return None
        return [int(self.steps.nearest(timestep_of(self.work.network, call))) for call in calls]

    def of(self, variant: Variant, name: str, form: LayerFormat, lowest: LayerFormat) -> Tensor | None:
        """Of the balanced input of a layer, float32 [1, timesteps | 1, 2]; None where no range is calibrated for it.

        Args:
            variant: how the network is quantized.
            name: of the layer.
            form: of the layer.
            lowest: of the layer with the fewest bits that has this input, for which its balance is.
        """
        if form.activation.mode != "static" or form.activation.bits == FLOAT_BITS:
            return None
        work = self.work
        if variant.balance != "none":
            found = self._of_balanced(variant, lowest)[name]
        elif variant.constant_tokens and name in work.special.text:
            found = work.special.ranges[name]
        else:
            network = work.calibrated
            statistics = network.statistics[network.groups[network.group_of(name)][0]]
            found = step_ranges(statistics, self._places_of_steps)
        return found if variant.by_step else shared_range(found)

    def of_parts(self, variant: Variant, name: str) -> Tensor:
        """Of both feature maps of a shortcut, float32 [2, timesteps | 1, 2]."""
        found = self.work.special.ranges[name]
        return found if variant.by_step else shared_range(found)

    @cached_property
    def _places_of_steps(self) -> list[int]:
        """Of the steps that statistics tell apart; in one sampling two of them may have the same timestep."""
        contexts = self.work.contexts
        places = [0] * contexts[0].num_steps
        if self.steps is not None:
            calls = self.work.reference("search", 1).calls
            for context, place in zip(contexts, self.places(calls) or (), strict=True):
                places[context.step] = place
        return places

    def _of_balanced(self, variant: Variant, lowest: LayerFormat) -> dict[str, Tensor]:
        """Ranges of balanced inputs by layer, for all layers at once, in one more pass over the calibration for each
        format that balances are found for.
        """
        work, key = self.work, (lowest.weight.bits, lowest.activation, variant.balance, variant.constant_tokens)
        if key not in self._balanced:
            groups = enumerate(work.calibrated.groups)
            balances = {n: work.balance(i, lowest, variant.balance).balance for i, names in groups for n in names}
            calls = work.reference("search", work.method.samples).calls
            apart: dict[str, Any] = {"places": self.places(calls)}
            if variant.constant_tokens:
                apart |= {"text": work.special.text, "positions": work.special.positions}
            self._balanced[key] = work.inside(lambda: balanced_ranges(work.network, balances, calls, **apart))
        return self._balanced[key]
