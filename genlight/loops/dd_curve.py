"""Distilled Decoding in numbers: quality against calls of a network, of a student, its teacher, and both together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genlight.diffusion.teacher_passes import Marginals
from genlight.errors import UserError, in_config
from genlight.loops.cost import announced, first_validation
from genlight.loops.dd_quantized import (
    FORMATS,
    quantized_name,
    quantized_student,
    quantized_variants,
    save_with_quantized,
)
from genlight.loops.dd_variants import DRAWN, TEACHER, Choices, involved_name, student_name, variants_of
from genlight.loops.dd_work import LATENCIES, VARIANTS, CurveWork, Measured, by_name
from genlight.loops.evaluation import CandidateTrainer
from genlight.loops.few_samples import few_samples
from genlight.loops.result import MethodResult
from genlight.reports.cost import CostEstimate
from genlight.reports.search_figures import quality_against_nfe, sampler_comparison


class DecodingCurve:
    """The method `dd`: one table of the student, its teacher, and everything between and below.

    Rows (Liu et al. 2024, arXiv 2412.17153, tables 1 and 2): the teacher by the flow and by drawing; the student in
    every number of steps that it was trained for; the teacher for some groups, or all but the student's first ones
    ("pre-trained-n-m"); the student refined by parallel passes of the teacher; the teacher stopped early (skip-k);
    independent tokens (onestep*); the student in few bits. All have the same noise, labels and metrics.

    Args:
        involved: pairs (first, last), counted from 1: the teacher decides these groups but the last, from which the
            student goes on, as it has to have learned; null: one of each kind.
        refine: passes of the teacher after the student's one.
        skip: by how many groups the teacher stops early; null: a sixth, a third and a half of them.
        skip_zeros: further rows where zeros, not the likeliest codes, take the place of what is left out.
        latency_batches: batch sizes whose time is measured; none: no time is.
        quantized: of "w8", "w8a8" and "w4": the student in so many bits, each a row and a folder of the artifact.

    Raises:
        ValueError: a number below 1, or bits that are not known.
    """

    predicts_cost = True

    def __init__(
        self,
        involved: Sequence[Sequence[int]] | None = None,
        refine: Sequence[int] = (1, 2, 4, 8),
        skip: Sequence[int] | None = None,
        skip_zeros: bool = False,
        latency_batches: Sequence[int] = (1, 16, 256),
        quantized: Sequence[str] = (),
    ) -> None:
        for name, values in (("refine", refine), ("skip", skip or ()), ("latency_batches", latency_batches)):
            if any(value < 1 for value in values):
                raise ValueError(f"method.{name} = {list(values)} must be 1 or more")
        if involved is not None and any(len(pair) != 2 for pair in involved):
            raise ValueError(f"method.involved = {list(involved)} must be pairs of first and last group")
        if unknown := [name for name in quantized if name not in FORMATS]:
            raise ValueError(f"method.quantized = {list(quantized)}: {unknown[0]} must be one of {', '.join(FORMATS)}")
        self.involved = None if involved is None else [(int(first), int(last)) for first, last in involved]
        self.refine, self.skip, self.skip_zeros = tuple(refine), None if skip is None else tuple(skip), skip_zeros
        self.latency_batches, self.quantized = tuple(latency_batches), tuple(quantized)

    def run(self, trainer: Any, module: Any, datamodule: Any) -> MethodResult:
        """Measure every variant on the report draw, and draw what they make of the same noise.

        Raises:
            UserError: the module is no student, the data no pairs of its teacher, or groups out of range.
        """
        self._check(module, datamodule)
        first = first_validation(trainer, module, datamodule)
        work = self._work(trainer, module, datamodule)
        predicted = announced(trainer, lambda: work.cost(first))
        with work.evaluations.timing(VARIANTS):
            found = work.measure()
        teacher, drawn = by_name(work.variants, found)
        rows = [work.row(variant, each, teacher, drawn) for variant, each in zip(work.variants, found, strict=True)]
        notes = [_NOTE, *([_BITS] if self.quantized else []), *self._not_learned(module)]
        notes += few_samples(module.metrics, datamodule.num_samples, "data.images.num_samples")
        if self.latency_batches:
            with work.evaluations.timing(LATENCIES):
                *times, decoder = work.latencies()
            rows = [row | time for row, time in zip(rows, times, strict=True)]
            words = ", ".join(
                f"{value:.3g} ms at batch {name.removeprefix('ms_')}"
                for name, value in decoder.items()
                if value is not None
            )
            notes.append(
                "ms_n is the time for the tokens of a batch of n (none: memory ran out); the decoder takes besides "
                f"{words or 'more memory than there is'}"
            )
        if trainer.is_global_zero:
            _pictures(work, found, rows, Path(trainer.default_root_dir) / "figures")
        return MethodResult(
            {**first.logged, **_headline(rows, module, self.quantized)},
            method="Distilled Decoding",
            table=rows,
            notes=notes,
            predicted=predicted,
            spent=work.evaluations.spent,
            save=lambda folder, whole: save_with_quantized(whole, work.quantized, folder),
        )

    def _not_learned(self, module: Any) -> list[str]:
        """Remarks on rows in which the student goes on from where it did not learn to."""
        groups, learned = len(module.student.group_sizes), list(module.timesteps)
        return [
            f"'{involved_name(first, last)}': the student goes on after {last - 1} groups, which it has not learned: "
            f"module.timesteps = {learned}"
            for first, last in self.involved or ()
            if last <= groups and last - 1 not in learned
        ]

    def dry_run(self, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
        """Every variant on a few samples, multiplied."""
        self._check(module, datamodule)
        first = first_validation(trainer, module, datamodule, dry=True)
        return self._work(trainer, module, datamodule).cost(first)

    def _check(self, module: Any, datamodule: Any) -> None:
        if not hasattr(module, "decode_noise"):
            raise UserError("method=dd measures a student: use module=distilled_decoding")
        if not hasattr(datamodule, "pairs"):
            raise UserError("method=dd counts the tokens of pairs: use data=pairs")

    def _work(self, trainer: Any, module: Any, datamodule: Any) -> CurveWork:
        evaluations = CandidateTrainer(trainer)
        if evaluations.sharded:
            raise UserError("method=dd needs the whole student in each process: use strategy=auto or strategy=ddp")
        flow, pairs = datamodule.settings, datamodule.pairs
        choices = Choices(self.involved, self.refine, self.skip, flow.steps, flow.method, self.skip_zeros)
        num_codes, groups = len(module.teacher.model.codebook), len(module.teacher.model.group_sizes)
        with in_config("method"):
            for first, last in choices.involved_in(groups, module.timesteps):
                if not 1 <= first < last <= groups + 1:
                    raise ValueError(f"involved = [{first}, {last}] must be 1 ≤ first < last ≤ {groups + 1}")
            if any(count >= groups for count in choices.skip_of(groups)):
                raise ValueError(f"skip = {list(choices.skip_of(groups))} must be less than {groups}")
            labels = torch.arange(len(pairs)) % pairs.num_classes
            quantized = {name: quantized_student(module.student, FORMATS[name]) for name in self.quantized}
        by_class, together = Marginals(pairs.tokens, num_codes, labels), Marginals(pairs.tokens, num_codes)
        variants = variants_of(module, choices, by_class, together)
        variants += quantized_variants(module, quantized)
        return CurveWork(evaluations, module, datamodule, variants, self.latency_batches, quantized)


_NOTE = (
    "nll: nats per token by the teacher; agreement: share of tokens equal to the teacher's from the same noise; "
    f"bigram_distance: of neighbouring tokens to those of '{DRAWN}'. Calls are one after the other"
)
_BITS = (
    "w8, w4: weights in so many bits, which save memory, not time; a8: inputs too, multiplied as integers. Embeddings "
    "and heads stay as they are; megabytes are those of the whole network"
)


def _frechet(row: dict[str, Any]) -> str | None:
    return next((name for name in row if name == "fid" or name.startswith("fd_")), None)


def _headline(rows: Sequence[dict[str, Any]], module: Any, quantized: Sequence[str]) -> dict[str, float]:
    """The Fréchet distance of the rows that are asked for most, the student's as it is configured; their likelihood
    where no images are compared."""
    name = _frechet(rows[0]) or "nll"
    student = student_name(module.num_inference_steps, module.split_timestep)
    wanted = {"teacher": TEACHER, "student": student, "onestep": "onestep*, by class"}
    wanted |= {f"student_{each}": quantized_name(each) for each in quantized}
    values = {row["variant"]: row[name] for row in rows}
    return {f"{name}_{short}": float(values[long]) for short, long in wanted.items()}


def _pictures(work: CurveWork, found: Sequence[Measured], rows: Sequence[dict[str, Any]], figures: Path) -> None:
    """The same noise through the teacher and the student in all its steps, and a metric over calls."""
    shown = {
        variant.name: each.images
        for variant, each in zip(work.variants, found, strict=True)
        if variant.name == TEACHER or variant.kind in ("student", "vectors", "quantized")
    }
    sampler_comparison(shown, figures / "comparison.png")
    name = _frechet(rows[0])
    if name is not None:
        drawn = [{"sampler": row["kind"], "nfe": row["calls"], name: row[name]} for row in rows]
        quality_against_nfe(drawn, figures / "quality.png", name, value=name)
