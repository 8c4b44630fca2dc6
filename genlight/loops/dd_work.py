"""Measuring the variants of Distilled Decoding: images, tokens and time, all from the same noise and labels."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from genlight.loops.cost import FirstValidation, artifact_of, method_cost, timed
from genlight.loops.dd_variants import DRAWN, TEACHER, Variant
from genlight.loops.evaluation import CandidateTrainer, in_turn, noise_of
from genlight.memory import Halves, free_memory
from genlight.metrics.tokens import agreement, bigram_distance, grid_size_of, negative_log_likelihood
from genlight.modules.generation import GRID_IMAGES
from genlight.nets.dd_student import Student
from genlight.nets.few_step import Decoded
from genlight.quantization.accounting import tensor_bytes
from genlight.reports.cost import CostEstimate, Phase, PlannedFile

# samples of the batches that are measured for the estimate
_PROBES = (16, 64)
VARIANTS, LATENCIES = "variants", "latencies"  # in the account of time
# seconds over which one latency is measured, at least
_TIMED = 0.3
# milliseconds by ``ms_<batch size>``
Latencies = dict[str, float | None]


@dataclass(frozen=True)
class Measured:
    """What one variant made.

    Attributes:
        metrics: of its images, by name.
        tokens: [M, N], on the CPU; fewer than N where the teacher stopped.
        nll: nats per token by the teacher; None without all tokens.
        images: the first, on the CPU.
    """

    metrics: dict[str, float]
    tokens: Tensor
    nll: float | None
    images: Tensor


@dataclass(frozen=True)
class CurveWork:
    """Everything that the steps of the method share.

    Attributes:
        evaluations, module, datamodule: of the run.
        variants: the teacher first.
        latency_batches: batch sizes whose time is measured.
        quantized: students that are written besides, by name.
    """

    evaluations: CandidateTrainer
    module: Any
    datamodule: Any
    variants: Sequence[Variant]
    latency_batches: Sequence[int]
    quantized: Mapping[str, Student]

    def noise(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Noise [M, N, C] and labels [M] of the draw that is reported."""
        draw, every = str(self.datamodule.draw), self.datamodule.num_samples
        noise, conditions = noise_of(self.datamodule, draw, every if count is None else count)
        # a network that knows no classes is asked for its only one
        return noise, conditions.get("label", torch.zeros(len(noise), dtype=torch.long))

    def measure(self) -> list[Measured]:
        """Every variant, spread over the processes."""
        noise, label = self.noise()
        return in_turn(
            self.evaluations, [partial(self._inside, self._one, each, noise, label) for each in self.variants]
        )

    def latencies(self) -> list[Latencies]:
        """Milliseconds that tokens take, by ``ms_<batch size>``; then those of the decoder, which all need besides.

        A batch that memory does not suffice for has none, and a warning.
        """
        noise, label = self.noise(min(max(self.latency_batches, default=1), self.datamodule.num_samples))
        pieces = [partial(self._inside, self._times, each, noise, label) for each in self.variants]
        pieces.append(partial(self._inside, self._decoder_times, noise, label))
        steps = self.evaluations.display.counted(pieces)
        # by the first process alone: several at a time would slow each other down
        found: list[list[Latencies]] = in_turn(self.evaluations, [lambda: [piece() for piece in steps]])
        return found[0]

    def row(self, variant: Variant, found: Measured, teacher: Measured, drawn: Measured) -> dict[str, Any]:
        """One row of the table; `teacher` and `drawn` are its own samples, by the flow and by drawing."""
        row: dict[str, Any] = {"variant": variant.name, "kind": variant.kind, "calls": variant.calls}
        row["megabytes"] = variant.megabytes
        row |= {name: value for name, value in found.metrics.items() if not name.endswith("_std")}
        whole = found.tokens.shape == teacher.tokens.shape
        grid = grid_size_of(self.module.teacher.model.group_sizes)
        row["nll"] = found.nll
        row["agreement"] = agreement(found.tokens, teacher.tokens) if whole else None
        row["agreement_first_quarter"] = agreement(found.tokens, teacher.tokens, 0.25) if whole else None
        compared = whole and found is not drawn
        row["bigram_distance"] = bigram_distance(found.tokens, drawn.tokens, grid) if compared else None
        return row

    def cost(self, first: FirstValidation) -> CostEstimate:
        """Time, memory and disk of the whole method, from every variant on two small batches of samples.

        Args:
            first: validation of the student.
        """
        few, more = (self.noise(min(size, self.datamodule.num_samples)) for size in _PROBES)
        self._inside(self._seconds, self.variants[0], *more)  # warms up
        pairs = [[self._inside(self._seconds, each, *probe) for probe in (few, more)] for each in self.variants]
        count, size = self.datamodule.num_samples, self.datamodule.eval_batch_size
        sizes = [size] * (count // size) + [count % size] * bool(count % size)
        measured = [sum(_at(batch, pair) for batch in sizes) for pair in pairs]
        shares = self.evaluations.shares
        phases = [Phase(VARIANTS, tuple(value / shares for value in measured), len(self.variants))]
        if self.latency_batches:
            calls = [[self._inside(self._decoding, each, *probe) for probe in (few, more)] for each in self.variants]
            latencies = [sum(_timed_seconds(_at(batch, pair)) for batch in self.latency_batches) for pair in calls]
            phases.append(Phase(LATENCIES, tuple(latencies), len(self.variants)))
        files = [PlannedFile(f"artifact/{name}", tensor_bytes(student)) for name, student in self.quantized.items()]
        return method_cost(self.evaluations, first, phases, [artifact_of(self.module), *files], pictures=3)

    def _inside(self, function: Any, *arguments: Any) -> Any:
        return self.evaluations.inside(self.module, partial(function, *arguments))

    def _one(self, variant: Variant, noise: Tensor, label: Tensor) -> Measured:
        module, metrics = self.module, self.module.metrics
        synced = getattr(metrics, "sync", None)
        if metrics is not None:
            metrics.to(module.device)
            metrics.reset()
        if synced is not None:
            # other processes have variants of their own
            metrics.sync = False
        tokens: list[Tensor] = []
        nll: list[Tensor] = []
        kept: list[Tensor] = []
        sample = partial(self._sampled, variant, noise, label)
        for part, (made, images, scores) in Halves().parts(len(noise), sample, self.datamodule.eval_batch_size):
            if metrics is not None:
                metrics.update(images, torch.arange(part.start, part.start + len(images), device=module.device))
            if scores is not None:
                nll.append(scores.cpu())
            tokens.append(made)
            kept.append(images[: GRID_IMAGES - sum(len(each) for each in kept)].cpu())
        values = {} if metrics is None else {name: float(value) for name, value in metrics.compute().items()}
        if synced is not None:
            metrics.sync = synced
        return Measured(values, torch.cat(tokens), float(torch.cat(nll).mean()) if nll else None, torch.cat(kept))

    def _sampled(
        self, variant: Variant, noise: Tensor, label: Tensor, part: slice
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens on the CPU, images, and the teacher's nats per token where there are all tokens, of a part."""
        module = self.module
        classes = label[part].to(module.device)
        decoded: Decoded = variant.decode(noise[part].to(module.device), classes)
        images, scores = module.images_of(decoded), None
        if decoded.tokens.shape[1] == noise.shape[1]:
            scores = negative_log_likelihood(module.active_teacher.model, decoded.tokens, classes, module.settings)
        return decoded.tokens.cpu(), images, scores

    def _seconds(self, variant: Variant, noise: Tensor, label: Tensor) -> float:
        begun = time.monotonic()
        self._one(variant, noise, label)
        return time.monotonic() - begun

    def _decoding(self, variant: Variant, noise: Tensor, label: Tensor) -> float:
        """Seconds of one call without anything else, the second of two."""
        part, classes = noise.to(self.module.device), label.to(self.module.device)
        return timed([partial(variant.decode, part, classes)] * 2)[0]

    def _times(self, variant: Variant, noise: Tensor, label: Tensor) -> Latencies:
        return self._timed(variant.name, variant.decode, noise, label)

    def _decoder_times(self, noise: Tensor, label: Tensor) -> Latencies:
        return self._timed("decoder", lambda part, classes: self.module.images_of(Decoded(classes, part)), noise, label)

    def _timed(self, name: str, work: Callable[[Tensor, Tensor], Any], noise: Tensor, label: Tensor) -> Latencies:
        """Medians of calls; a batch larger than the samples repeats them."""
        found: Latencies = {}
        for size in self.latency_batches:
            found[f"ms_{size}"] = None
            index = torch.arange(size) % len(noise)
            try:
                part, classes = noise[index].to(self.module.device), label[index].to(self.module.device)
                timer = Timer(
                    "work(part, classes)",
                    globals={"work": work, "part": part, "classes": classes},
                    num_threads=torch.get_num_threads(),
                )
                found[f"ms_{size}"] = 1000 * timer.blocked_autorange(min_run_time=_TIMED).median
            except torch.OutOfMemoryError:
                warnings.warn(
                    f"memory ran out: no time of {name} at batch {size} (method.latency_batches)", stacklevel=2
                )
            if found[f"ms_{size}"] is None:
                free_memory()  # not before: the error holds on to what the work had made
        return found


def _at(size: int, pair: Sequence[float]) -> float:
    """Seconds of a batch of any size, on the line through those of both probes."""
    small, large = _PROBES
    slope = max(0.0, (pair[1] - pair[0]) / (large - small))
    return max(min(pair), pair[0] + slope * (size - small))


def _timed_seconds(call: float) -> float:
    """Of one measurement of latency: calls that choose a block, one to warm up, and at least `_TIMED` seconds."""
    return 2 * call + max(_TIMED, call)


def by_name(variants: Sequence[Variant], found: Sequence[Measured]) -> tuple[Measured, Measured]:
    """Of all that was measured the teacher's own samples, by the flow and by drawing."""
    named = {variant.name: each for variant, each in zip(variants, found, strict=True)}
    return named[TEACHER], named[DRAWN]
