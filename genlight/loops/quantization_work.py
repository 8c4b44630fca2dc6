"""The work of a calibration: what is known of the network, its layers in few bits, and how good it is with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genlight.errors import UserError, in_config
from genlight.loops.evaluation import CandidateTrainer, measured, noise_of
from genlight.loops.quantization_ranges import InputRanges
from genlight.loops.quantization_settings import GroupSettings, fitting_form, formats_by_layer, network_of
from genlight.loops.quantization_statistics import calibrated_statistics, read_statistics
from genlight.loops.quantization_variants import Variant
from genlight.memory import Halves
from genlight.metrics.paired import image_scores, perceptual_scores, score_intervals
from genlight.metrics.text_image import middle_frame
from genlight.quantization.accounting import ModelCost, count_inputs, count_macs, file_bytes, model_cost
from genlight.quantization.calls import sampling_calls
from genlight.quantization.constant_tokens import Mismatch, with_constant_rows
from genlight.quantization.context import SamplingContext
from genlight.quantization.convert import check_replaceable, quantize_split, replace_layers
from genlight.quantization.float8 import require_float8
from genlight.quantization.formats import LayerFormat
from genlight.quantization.layers import QuantizedLayer
from genlight.quantization.observers import layers_by_input
from genlight.quantization.recipe import (
    BalancedInput,
    BalanceKind,
    CalibratedNetwork,
    balanced_input,
    quantized_layer,
)
from genlight.quantization.special_inputs import SpecialInputs, special_inputs
from genlight.quantization.statistics import StatisticsSettings
from genlight.quantization.steps import following_steps
from genlight.quantization.torchao_format import check_for_torchao
from genlight.quantization.trajectory import NetworkCall, Reference, decibels, noise_to_signal, recorded_calls, replay

if TYPE_CHECKING:
    from genlight.loops.quantization_calibrate import QuantizationCalibration

CALIBRATION = "calibration.safetensors"
SAMPLE_ROWS = 512


@dataclass
class QuantizationWork:
    """Everything that the steps of the method share.

    Attributes:
        method: the settings.
        evaluations, module, datamodule: of the run.
    """

    method: QuantizationCalibration
    evaluations: CandidateTrainer
    module: Any
    datamodule: Any
    _samples: Halves = field(default_factory=Halves, init=False, repr=False)
    _rows: Halves = field(default_factory=partial(Halves, "rows of a call", ""), init=False, repr=False)
    _references: dict[str, Reference] = field(default_factory=dict, init=False, repr=False)
    _full_metrics: dict[tuple[str, int], float] = field(default_factory=dict, init=False, repr=False)
    _balances: dict[tuple[Any, ...], BalancedInput] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def network(self) -> Any:
        """The network that is quantized."""
        return network_of(self.module)

    @cached_property
    def _chosen(self) -> tuple[dict[str, LayerFormat], dict[str, GroupSettings]]:
        method = self.method
        return formats_by_layer(self.network, method.form, method.keep, method.groups, whole=method.balances)

    @property
    def forms(self) -> dict[str, LayerFormat]:
        """What each layer becomes, by name."""
        return self._chosen[0]

    @property
    def groups(self) -> dict[str, GroupSettings]:
        """The group of each layer, by name."""
        return self._chosen[1]

    @cached_property
    def metrics(self) -> dict[str, str]:
        """What chooses each layer's bits, by name."""
        return {name: group.metric for name, group in self.groups.items()}

    @cached_property
    def folder(self) -> Path:
        """Of the run: that of the first process, for in a dry run each has one of its own."""
        return Path(self.evaluations.agreed(self.evaluations.trainer.default_root_dir))

    @cached_property
    def contexts(self) -> tuple[SamplingContext, ...]:
        """The place of each call of the network in one sampling."""
        noise, label = self._noise("search", 1)
        with in_config("method"):
            found: tuple[SamplingContext, ...] = self.inside(
                lambda: sampling_calls(self.network, lambda: self.module.sample_latents(*self._placed(noise, label)))
            )
        return found

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What all numbers depend on: model, data, sampler."""
        data = hashlib.sha256(str(self.datamodule.fingerprint).encode()).hexdigest()[:16]
        sampler = type(self.module.build_scheduler()).__name__
        return {
            "model": self.evaluations.fingerprint(self.module)[:16],
            "data": data,
            "sampler": f"{sampler}, {len(self.contexts)} calls, guidance {self.module.guidance_scale}",
        }

    @cached_property
    def calibrated(self) -> CalibratedNetwork:
        """The layers with the statistics of their inputs; runs the calibration."""
        method, names = self.method, list(self.forms)
        call = self.reference("search", 1).calls[0]
        with in_config("method.keep"):
            groups = self.inside(lambda: layers_by_input(self.network, names, lambda: replay(self.network, call)))
            self.inside(lambda: check_replaceable(self.network, names, lambda: replay(self.network, call)))
        branches = {branch for context in self.contexts for branch in context.branches}
        settings = StatisticsSettings(
            branches=len(branches),
            steps=self.contexts[0].num_steps,
            hessian=torch.float32 if method.form.weight.needs_hessian else None,
            sample_rows=SAMPLE_ROWS,
            seed=method.seed,
        )
        observed, size = [group[0] for group in groups], int(self.datamodule.eval_batch_size)
        described = {**self.fingerprint, "samples": f"{method.samples} in batches of {size}", "kept": str(settings)}
        fingerprint = json.dumps({**described, "layers": _digest(observed)}, sort_keys=True)
        if method.statistics is not None:
            batches = -(-method.samples // size)
            statistics = read_statistics(Path(method.statistics), self.network, fingerprint, batches)
        else:
            statistics = calibrated_statistics(
                self.evaluations, self.module, self.datamodule, self.network, self.contexts,
                observed, settings, method.samples, self.folder / CALIBRATION, fingerprint,
            )  # fmt: skip
        layers = {name: self.network.get_submodule(name) for name in names}
        return CalibratedNetwork(layers, tuple(groups), statistics)

    @cached_property
    def special(self) -> SpecialInputs:
        """Layers with inputs of two kinds, as far as the settings ask for them; samples the calibration once more."""
        method, calls = self.method, self.reference("search", self.method.samples).calls
        with in_config("method"):
            found: SpecialInputs = self.inside(
                lambda: special_inputs(
                    self.network,
                    calls,
                    split=method.split_shortcuts,
                    ratio=None if method.constant_tokens == "off" else method.constant_ratio,
                    places=self.ranges.places(calls),
                )
            )
        return found

    @cached_property
    def ranges(self) -> InputRanges:
        """Of the inputs of layers, for formats with static ones."""
        return InputRanges(self)

    @cached_property
    def inputs(self) -> dict[str, int]:
        """Numbers that each layer reads for one sample, in one call of the network."""
        call = self.reference("search", 1).calls[0]
        found: dict[str, int] = self.inside(lambda: count_inputs(self.network, lambda: replay(self.network, call)))
        return found

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiplications of each layer for one sample, in one call of the network."""
        call = self.reference("search", 1).calls[0]
        found: dict[str, int] = self.inside(lambda: count_macs(self.network, lambda: replay(self.network, call)))
        return found

    def inside(self, work: Callable[[], Any]) -> Any:
        """`work` where the network is on its device, in the trainer's precision, without gradients."""
        return self.evaluations.inside(self.module, work)

    def reference(self, draw: str, count: int) -> Reference:
        """What full precision makes of the first `count` noises of a draw; made once, before anything is quantized.

        Raises UserError where a group is judged by motion and the generator makes no videos.
        """
        key = f"{draw} {count}"
        if key not in self._references:
            noise, label = self._noise(draw, count)

            def sample(rows: int) -> tuple[list[NetworkCall], Tensor]:
                with recorded_calls(self.network) as calls:
                    images = self._images(noise, label, rows)
                return calls, images

            found = self._references[key] = Reference(noise, label, *self._fitting(sample))
            if "motion" in self.metrics.values() and found.images.ndim < 5:
                raise UserError("method.groups: metric = motion needs a generator of videos; take ssim")
        return self._references[key]

    def layers(self, variant: Variant) -> dict[str, QuantizedLayer]:
        """The quantized layers of a variant, by name."""
        return self.layers_of(variant, list(self.forms))

    def layers_of(self, variant: Variant, chosen: Sequence[str]) -> dict[str, QuantizedLayer]:
        """Some of the quantized layers of a variant."""

        def form_of(name: str) -> LayerFormat:
            plain = self.calibrated.layers[name]
            columns = plain.weight.shape[1:].numel()
            return fitting_form(plain, variant.form(name, self.forms[name], columns))

        made: dict[str, QuantizedLayer] = {}
        for name in chosen:
            group = self.calibrated.group_of(name)
            with in_config(f"method: {name}"):
                forms = {each: form_of(each) for each in self.calibrated.groups[group]}
                # one balance for all that read the input: for the layer with the fewest bits
                lowest = min(forms.values(), key=lambda form: form.weight.bits)
                made[name] = self._layer(variant, name, forms[name], group, lowest)
            # a rival: to warn that nothing is faster would mislead
            if variant.group_size is not None:
                made[name].execution = "fake"
            if made[name].has_steps:
                made[name].steps = self.ranges.steps
        return made

    def _layer(self, variant: Variant, name: str, form: LayerFormat, group: int, lowest: LayerFormat) -> QuantizedLayer:
        balance = self.balance(group, lowest, variant.balance).balance
        plain = self.calibrated.layers[name]
        if variant.split and name in self.special.splits:
            assert isinstance(plain, nn.Conv2d)
            return quantize_split(plain, form, self.special.splits[name], self.ranges.of_parts(variant, name))
        ranges = self.ranges.of(variant, name, form, lowest)
        layer = quantized_layer(self.calibrated, name, form, balance, variant.rank, ranges)
        if variant.constant_tokens and name in self.special.text:
            assert isinstance(plain, nn.Linear)
            guard: Mismatch = "raise" if self.method.constant_tokens == "raise" else "warn"
            return with_constant_rows(layer, plain, self.special.positions, self.special.rows, guard)
        return layer

    def balance(self, group: int, form: LayerFormat, kind: BalanceKind) -> BalancedInput:
        """The balance of a group of layers for a format; found once."""
        key = (group, form.weight.bits, form.activation, kind)
        if key not in self._balances:
            settings = replace(self.method.balancing, kind=kind)
            self._balances[key] = balanced_input(self.calibrated, group, form, settings)
        return self._balances[key]

    @contextmanager
    def replaced(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """The network has these layers in the block, and its own again afterwards."""
        steps = self.ranges.steps
        replace_layers(self.network, layers)
        try:
            with following_steps(self.network, steps):
                yield
        finally:
            replace_layers(self.network, {name: self.calibrated.layers[name] for name in layers})

    def noise(self, reference: Reference) -> float:
        """Noise-to-signal ratio of the network, as it is, along a trajectory of full precision."""
        return float(self.inside(lambda: noise_to_signal(self.network, reference.calls, self._rows)))

    def images(self, reference: Reference) -> Tensor:
        """What the network, as it is, makes of the noise of a reference."""
        found: Tensor = self._fitting(partial(self._images, reference.noise, reference.label))
        return found

    def metric(self, name: str, samples: int) -> float:
        """What `validate` logs of the network, as it is, on the first so many samples of the select draw."""
        return measured(self.evaluations, self.module, self.datamodule, "select", samples)[name]

    def full_metric(self, name: str, samples: int) -> float:
        """The same of full precision; measured once, before anything is quantized."""
        if (name, samples) not in self._full_metrics:
            self._full_metrics[name, samples] = self.metric(name, samples)
        return self._full_metrics[name, samples]

    def image_error(self, variant: Variant, samples: int) -> float:
        """Mean squared error of the images of a variant against full precision, on the select draw."""
        reference = self.reference("select", samples)
        with self.replaced(self.layers(variant)):
            return float((self.images(reference) - reference.images).square().mean())

    def measure(
        self, layers: Mapping[str, nn.Module], bits: Mapping[str, tuple[int, int]] | None = None
    ) -> tuple[dict[str, Any], Tensor]:
        """All numbers of the network with these layers on the report draw, and images of it; `bits`: of `size`.

        Of videos the images are their middle frames.
        """
        reference = self.reference("report", self.method.trajectory)
        with self.replaced(layers):
            images = self.images(reference)
            row: dict[str, Any] = {"sqnr": decibels(self.noise(reference)), **image_scores(images, reference.images)}
            row |= perceptual_scores(images, reference.images, self.module.device)
            row |= score_intervals(images, reference.images)
            own = measured(self.evaluations, self.module, self.datamodule, "report", self.datamodule.num_samples)
            row |= {name.removeprefix("val/"): value for name, value in own.items()} | self.size(bits)
        return row, middle_frame(images)

    def size(self, bits: Mapping[str, tuple[int, int]] | None = None) -> dict[str, float]:
        """Bits, 10⁶ bytes in memory and in a file, of the network as it is, and 10⁹ bit operations of one call.

        Args:
            bits: of weight and input of layers that another library quantized.
        """
        cost = model_cost(self.network, self.macs, bits)
        chosen = [cost.layers[name] for name in self.forms]
        total = sum(layer.weights * layer.weight_bits for layer in chosen)
        return {
            "bits": total / sum(layer.weights for layer in chosen),
            "input_bits": self._input_bits(cost),
            "bits_all": cost.average_weight_bits,
            "megabytes": cost.total_bytes / 1e6,
            "file_megabytes": file_bytes(self.network) / 1e6,
            "gbitops": cost.bit_operations / 1e9,
        }

    def _input_bits(self, cost: ModelCost) -> float:
        read = {name: self.inputs.get(name, 0) for name in self.forms}
        return sum(read[n] * cost.layers[n].activation_bits for n in read) / max(1, sum(read.values()))

    def _noise(self, draw: str, count: int) -> tuple[Tensor, Tensor | None]:
        noise, conditions = noise_of(self.datamodule, draw, count)
        return noise, conditions.get("label")

    def _placed(self, noise: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
        device = self.module.device
        return noise.to(device), None if label is None else label.to(device)

    def _fitting(self, work: Callable[[int], Any]) -> Any:
        """`work` with as many samples at a time as fit into memory, called `inside`."""
        return self.inside(lambda: self._samples.attempt(work, int(self.datamodule.eval_batch_size)))

    def _images(self, noise: Tensor, label: Tensor | None, rows: int) -> Tensor:
        noise, label = self._placed(noise, label)
        parts = [
            self.module.sample_whole(noise[i : i + rows], None if label is None else label[i : i + rows]).cpu()
            for i in range(0, len(noise), rows)
        ]
        return torch.cat(parts)


def checked_work(method: QuantizationCalibration, trainer: Any, module: Any, datamodule: Any) -> QuantizationWork:
    """The work of a run.

    Raises:
        UserError: weights that are sharded, a GPU without float8 where that is asked for, patterns that do not fit the
            network, or layers that torchao cannot hold where it is asked for.
    """
    evaluations = CandidateTrainer(trainer)
    if evaluations.sharded:
        raise UserError(
            "strategy: layers are quantized whole, and here each process holds a part of them: use strategy=ddp, or "
            "strategy=auto with trainer.devices=1"
        )
    if method.numbers == "float8":
        with in_config("method"):
            require_float8(trainer.strategy.root_device)
    work = QuantizationWork(method, evaluations, module, datamodule)
    work.forms  # noqa: B018 - patterns are checked before anything is sampled
    if method.torchao:
        with in_config("method"):
            check_for_torchao(work.network, work.forms)
    return work


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
