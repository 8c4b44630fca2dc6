"""What OMS-DPM found for each budget, beside every rule, on noise and images that no search and no choice has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from genlight.io import atomic_write_text
from genlight.loops.cost import REPORT
from genlight.loops.evaluation import as_logged, in_turn, score_label
from genlight.loops.model_work import COSTS, TIMES, Choice, ModelWork, file_of
from genlight.loops.result import MethodResult, metrics_of_artifact
from genlight.modules.model_schedule_file import write_model_schedule
from genlight.modules.pipeline import PipelineModule
from genlight.predictors.losses import kendall_tau
from genlight.predictors.ranking import RankingPredictor
from genlight.reports.cost import CostEstimate
from genlight.reports.member_costs import write_costs
from genlight.reports.model_schedule_figure import pareto_figure, strips_figure
from genlight.reports.search_figures import predictor_scatter, search_curve
from genlight.search.budgets import BUDGETED

_CHOSEN = "chosen"
# below this rank correlation, and this number of schedules to learn from, a predictor is little guide
_LEAST_TAU, _LEAST_SEEN = 0.5, 50
_USE = """\
A schedule and the members that it names, by turns in the pipeline:

```python
import torch
from diffusers import DiffusionPipeline
from genlight.modules.model_schedule_file import attach_model_schedule

pipe = DiffusionPipeline.from_pretrained({source}, {options})
scheduled = attach_model_schedule(pipe, "{file}")
result = pipe("a prompt", num_inference_steps=len(scheduled.schedule), {call})
```

Move the pipeline to its device before the schedule is attached. Files: {files}
"""


def model_result(work: ModelWork, own: Mapping[str, float], predicted: CostEstimate) -> MethodResult:
    """Table, metrics, pictures and artifact.

    Args:
        work: settings and search.
        own: what the primary member reaches by its own scheduler.
        predicted: what all of it was to cost.
    """
    choices = work.choices()
    best: dict[tuple[float, str], Choice] = {}
    for choice in sorted(choices, key=lambda choice: choice.select):
        best.setdefault((choice.budget, choice.rule), choice)
    distinct = {work.space.key(choice.schedule): choice.schedule for choice in best.values()}
    with work.evaluations.timing(REPORT):
        found = in_turn(work.evaluations, [partial(work.report, schedule) for schedule in distinct.values()])
        times = work.times(list(distinct.values()))
    values = {key: {**scores, **ms} for key, scores, ms in zip(distinct, found, times, strict=True)}
    winners = {budget: min(of(best, budget), key=lambda choice: choice.select) for budget in work.limits}
    rows = [
        _row(work, choice, values[work.space.key(choice.schedule)], winners[choice.budget] is choice)
        for choice in sorted(best.values(), key=lambda choice: (choice.budget, choice.select))
    ]
    order = _order_of_unseen(work)
    if work.runner.main:
        _pictures(work, winners, rows, order)
    work.restore()
    name = work.method.objective.removeprefix("val/")
    headline, doubts = {}, list[str]()
    for budget, winner in winners.items():
        reached = headline[f"{name}_at_{budget:g}"] = _value(work, values, winner)
        single = best.get((budget, "single"))
        if single is not None:
            rival = headline[f"{name}_best_single_at_{budget:g}"] = _value(work, values, single)
            if as_logged(work.method.mode, reached) > as_logged(work.method.mode, rival):
                doubts.append(
                    f"budget {budget:g}: on the report draw the best single model, {single.name}, is better than what "
                    f"was chosen, {rival:.4g} to {reached:.4g}"
                )
    if order is not None:
        headline["predictor_kendall_tau"] = order.tau
    unit = work.costs.unit
    notes = [
        f"budgets are in calls of the dearest member; cost in {unit} for a batch. Search and select scores are against "
        f"halves of the other split of real images; {name} and what follows is on the report draw",
        *_singles_note(work),
        *doubts,
        *_predictor_doubts(work, order),
        *work.notes(),
        *work.runner.notes,
    ]
    return MethodResult(
        {**metrics_of_artifact(own, _kept(work, winners, values)), **headline},
        method="OMS-DPM (model schedules)",
        table=rows,
        notes=notes,
        predicted=predicted,
        spent=work.evaluations.spent,
        save=lambda folder, module: _save(work, winners, values, folder, module),
    )


def of(best: Mapping[tuple[float, str], Choice], budget: float) -> list[Choice]:
    """The choices of a budget."""
    return [choice for (own, _), choice in best.items() if own == budget]


def _kept(
    work: ModelWork, winners: Mapping[float, Choice], values: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """What is measured of each schedule in the artifact, by the end of names."""
    found = {budget: values[work.space.key(winner.schedule)] for budget, winner in winners.items()}
    return {f"_at_{b:g}": {name.removeprefix("val/"): v for name, v in each.items()} for b, each in found.items()}


def _value(work: ModelWork, values: Mapping[str, Mapping[str, float]], choice: Choice) -> float:
    return values[work.space.key(choice.schedule)][work.method.objective]


def _row(work: ModelWork, choice: Choice, values: Mapping[str, float], chosen: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"budget": choice.budget, "rule": choice.rule, "schedule": choice.name}
    row |= {_CHOSEN: "yes" if chosen else "", "nfe": choice.schedule.nfe, "cost": choice.cost}
    row |= {name.replace("_", " "): values[name] for name in TIMES if name in values}
    row |= _scores(work, choice)
    return row | {name.removeprefix("val/"): value for name, value in values.items() if name not in TIMES}


def _scores(work: ModelWork, choice: Choice) -> dict[str, float]:
    """On the draws of search and choice, as the objective is logged."""
    mode = work.method.mode
    return {"search": as_logged(mode, choice.search), "select": as_logged(mode, choice.select)}


def _singles_note(work: ModelWork) -> list[str]:
    count = sum(rule == "single" for rule, _ in work.initial.values())
    return [f"single models were measured in {count} of {work.all_singles} settings"] if count else []


@dataclass(frozen=True)
class _Order:
    """How a predictor of half of the measured schedules orders the other half: its scores, the true ones, their τ."""

    predicted: list[float]
    true: list[float]
    tau: float


def _order_of_unseen(work: ModelWork) -> _Order | None:
    """None where too few were measured."""
    records = [record for record in work.result.records if record.score is not None]
    if len(records) < 20:
        return None
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    # as the search encodes them
    encoded = [work.informed.encode(records[number].candidate) for number in order]
    scores = [float(records[number].score or 0.0) for number in order]
    half = len(order) // 2
    if len(set(scores[:half])) < 2:
        return None
    fitted = RankingPredictor().fit(encoded[:half], scores[:half], 0)
    mean = torch.as_tensor(fitted.predict(encoded[half:])[0])
    return _Order(mean.tolist(), scores[half:], float(kendall_tau(mean, torch.tensor(scores[half:]))))


def _predictor_doubts(work: ModelWork, order: _Order | None) -> list[str]:
    """Of a search that a predictor guided."""
    guided = [record.source.startswith(BUDGETED) for record in work.result.records]
    if not any(guided):
        return []
    found, more = [], "a larger search.budget, or search=oms_direct, which needs none"
    if (count := guided.index(True)) < _LEAST_SEEN:
        found.append(f"the predictor began with {count} schedules, below {_LEAST_SEEN}: {more}")
    if order is not None and order.tau < _LEAST_TAU:
        found.append(
            f"a predictor orders schedules that it has not seen by Kendall's τ = {order.tau:.2f}, below {_LEAST_TAU:g}"
            f": {more}"
        )
    return found


def _pictures(
    work: ModelWork, winners: Mapping[float, Choice], rows: Sequence[Mapping[str, Any]], order: _Order | None
) -> None:
    figures = Path(work.evaluations.trainer.default_root_dir) / "figures"
    name = work.method.objective.removeprefix("val/")
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        curves.setdefault(str(row["rule"]), []).append((float(row["cost"]), float(row[name])))
    chosen = [(float(row["cost"]), float(row[name])) for row in rows if row[_CHOSEN]]
    if all(math.isfinite(float(row[name])) for row in rows):
        pareto_figure(
            {"chosen": chosen},
            figures / "pareto.png",
            baselines=curves,
            budgets=[limit + work.costs.batch for limit in work.limits.values()],
            mode=work.method.mode,
            xlabel="cost",
            ylabel=name,
        )
    strips = [(f"{budget:g}: {choice.rule}", choice.schedule, choice.cost) for budget, choice in winners.items()]
    strips_figure(
        strips,
        work.space.noise_schedule,
        figures / "schedules.png",
        members=work.space.names,
        slots=work.space.slots,
    )
    points = [(r.index, r.score, r.source, r.fidelity) for r in work.result.records]
    search_curve(points, figures / "search.png", ylabel=score_label(work.method.mode, work.method.objective))
    if order is not None:
        predictor_scatter(order.predicted, order.true, figures / "predictor.png", order.tau)


def _save(
    work: ModelWork,
    winners: Mapping[float, Choice],
    values: Mapping[str, Mapping[str, float]],
    folder: Path,
    module: Any,
) -> None:
    """The zoo, its costs, and a file with the schedule of each budget.

    A pipeline and its members stay where they are: the files say where that is.
    """
    work.restore()
    if isinstance(module, PipelineModule):
        _write_use(folder, module, [file_of(folder, budget).name for budget in winners])
    else:
        module.save_pretrained(folder)
    write_costs(folder / COSTS, work.costs)
    for budget, choice in winners.items():
        scores = _scores(work, choice)
        scores |= {key.removeprefix("val/"): value for key, value in values[work.space.key(choice.schedule)].items()}
        write_model_schedule(
            file_of(folder, budget),
            choice.schedule,
            module.zoo.members,
            module.zoo.predictions,
            primary=module.scheduled.primary,
            slots=work.space.slots if choice.schedule.kind == "ddim" else None,
            budget=work.limits[budget] + work.costs.batch,
            predicted_cost=choice.cost,
            scores=scores,
        )


def _write_use(folder: Path, module: PipelineModule, files: Sequence[str]) -> None:
    """The lines that attach a schedule to its pipeline; the last file is the example."""
    assert module.scheduled is not None
    settings = {key: getattr(module, key) for key in ("guidance_scale", "height", "width", "num_frames")}
    given = {key: value for key, value in {**settings, **module.call}.items() if value is not None}
    source = Path(module.pretrained)
    text = _USE.format(
        source=repr(str(source.absolute()) if source.exists() else module.pretrained),
        options=f"dtype={module.scheduled.dtype}" + (f", variant={module.variant!r}" if module.variant else ""),
        file=files[-1],
        call=", ".join(f"{key}={value!r}" for key, value in given.items()),
        files=", ".join(files),
    )
    atomic_write_text(folder / "README.md", text)
