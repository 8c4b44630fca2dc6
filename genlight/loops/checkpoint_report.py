"""What LCSC found, beside every usual average, on noise and real images that neither search nor choice has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight import io
from genlight.loops.checkpoint_remarks import remarks_after
from genlight.loops.checkpoint_work import GRADIENT, LCSC, TRACKED, CheckpointWork, Variant
from genlight.loops.cost import REPORT
from genlight.loops.evaluation import as_logged, in_turn, measured, score_label
from genlight.loops.result import MethodResult, metrics_of_artifact
from genlight.modules.combined import COEFFICIENTS, sampler_of
from genlight.modules.generation import GRID_IMAGES
from genlight.reports.coefficients_figure import weights_over_steps
from genlight.reports.cost import CostEstimate
from genlight.reports.search_figures import sampler_comparison, search_curve
from genlight.search.spaces.checkpoint_coefficients import Combination

if TYPE_CHECKING:
    from torch import Tensor

_KIND, _VERSION = "checkpoint_coefficients", 1


def combination_result(work: CheckpointWork, own: Mapping[str, float], predicted: CostEstimate) -> MethodResult:
    """Table, metrics, pictures and artifact.

    Args:
        work: settings and searches.
        own: what the weights that ckpt_path names reach.
        predicted: what all of it was to cost.
    """
    variants = work.search()
    best: dict[str, Variant] = {}
    for variant in variants:
        best.setdefault(variant.kind, variant)
    winner = min((best[kind] for kind in (LCSC, GRADIENT) if kind in best), key=lambda variant: variant.select)
    chosen = min(variants, key=lambda variant: (variant.select, variant is not winner))
    order = sorted(best.values(), key=lambda variant: (variant is not winner, variant.select))
    with work.evaluations.timing(REPORT):
        found = in_turn(work.evaluations, [partial(work.report, variant.weights) for variant in order])
    rows = [_row(work, variant, values) for variant, values in zip(order, found, strict=True)]
    if work.runner.main:
        _pictures(work, best)
    remarks = remarks_after(work, winner)
    work.space.restore()
    name = work.method.objective.removeprefix("val/")
    usual = rows[1] if len(rows) > 1 else rows[0]  # in the order of the select draw
    last = next((row for row in rows if row["kind"] == "last"), usual)
    headline = {f"{name}_lcsc": rows[0][name], f"{name}_best_other": usual[name], f"{name}_last": last[name]}
    kept = next(row for row in rows if row["weights"] == chosen.name)
    headline[f"{name}_artifact"] = kept[name]
    notes = [
        f"search and select scores are against halves of the other split of real images; {name} and what follows is on "
        f"the report draw. Chosen on the select draw: {winner.name}, and of the others {usual['weights']}",
        *([] if chosen is winner else [_not_found(chosen, winner)]),
        *_screened_note(work, order),
        *remarks,
        *work.runner.notes,
    ]
    return MethodResult(
        {**metrics_of_artifact(own, {"": kept}), **headline},
        method="LCSC (linear combination of checkpoints)",
        table=rows,
        notes=notes,
        predicted=predicted,
        spent=work.evaluations.spent,
        save=lambda folder, _: save_artifact(work, chosen, rows, folder),
    )


def _not_found(chosen: Variant, winner: Variant) -> str:
    return (
        f"the search found nothing better: on the select draw {chosen.name} is better than {winner.name}, and the "
        f"artifact holds {chosen.name}"
    )


def _screened_note(work: CheckpointWork, variants: Sequence[Variant]) -> list[str]:
    names = [variant.name for variant in variants if math.isnan(variant.search)]
    return [f"no search score on {work.method.settings.fidelity} samples: {', '.join(names)}"] if names else []


def _row(work: CheckpointWork, variant: Variant, values: Mapping[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"weights": variant.name, "kind": variant.kind}
    mode = work.method.mode
    scores = {"search": variant.search, "select": variant.select}
    row |= {draw: as_logged(mode, score) for draw, score in scores.items() if not math.isnan(score)}
    row |= {name.removeprefix("val/"): value for name, value in values.items()}
    if isinstance(variant.weights, Combination):
        row["l1"] = work.space.cost(variant.weights)["l1"]
    return row


def _pictures(work: CheckpointWork, best: Mapping[str, Variant]) -> None:
    figures = Path(work.evaluations.trainer.default_root_dir) / "figures"
    steps = [member.last_step for member in work.space.trajectory.members]
    weights_over_steps(steps, _curves(work, best), figures / "coefficients.png")
    for kind, result in work.results.items():
        points = [(r.index, r.score, r.source, r.fidelity) for r in result.records]
        name = kind.lower().replace(" ", "-")
        label = score_label(work.method.mode, work.method.objective)
        search_curve(points, figures / f"search-{name}.png", ylabel=label)
    samples: dict[str, Tensor] = {}
    for kind in ("last", TRACKED if TRACKED in best else "ema", LCSC):
        if kind in best:
            work.apply(best[kind].weights)
            measured(work.evaluations, work.module, work.datamodule, "report", GRID_IMAGES)
            if getattr(work.module, "grid_images", None) is not None:
                samples[best[kind].name] = work.module.grid_images
    if samples:
        sampler_comparison(samples, figures / "comparison.png")


def _curves(work: CheckpointWork, best: Mapping[str, Variant]) -> dict[str, list[float]]:
    """Weights over checkpoints to be shown, by name: one line, or one for each group where groups have their own."""
    curves: dict[str, list[float]] = {}
    for variant in (best[kind] for kind in (LCSC, GRADIENT, "ema", "line") if kind in best):
        assert isinstance(variant.weights, Combination)
        rows = work.space.weights(variant.weights).tolist()
        names = [f"{variant.name}: {group}" for group in work.space.groups]
        alike = all(row == rows[0] for row in rows)
        curves |= {variant.name: rows[0]} if alike else dict(zip(names, rows, strict=True))
    return curves


def save_artifact(work: CheckpointWork, chosen: Variant, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The module with the chosen weights, and what they are made of as JSON beside it.

    "weights" are over checkpoints, a row for each group; null where the training itself tracked the average.
    """
    work.apply(chosen.weights)
    work.module.save_pretrained(folder)
    space, trajectory = work.space, work.space.trajectory
    combination = chosen.weights if isinstance(chosen.weights, Combination) else None
    content = {
        "kind": _KIND,
        "version": _VERSION,
        "name": chosen.name,
        "steps": [member.last_step for member in trajectory.members],
        "groups": list(space.groups),
        "weights": None if combination is None else space.weights(combination).tolist(),
        "basis": repr(space.basis),
        "over": None if combination is None else combination.over,
        "coefficients": None if combination is None else [list(row) for row in combination.coefficients],
        "trajectory": trajectory.fingerprint,
        "objective": work.method.objective,
        "num_inference_steps": getattr(work.module, "num_inference_steps", None),
        "sampler": sampler_of(work.module),
        "seeds": {"search": work.method.settings.seed, "noise": getattr(work.datamodule, "seed", None)},
        "scores": [dict(row) for row in rows],
    }
    io.atomic_write_json(folder / COEFFICIENTS, content)
    work.space.restore()
