"""What S³ found, measured on noise that neither the search nor the choice has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight import io
from genlight.diffusion.export_scheduler import (
    StockForm,
    scheduler_of,
    stock_form,
    why_no_stock_form,
    write_scheduler,
    write_stock_form,
)
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.serialization import SolverBank
from genlight.diffusion.solver_schedule import SolverScheduleScheduler
from genlight.loops.cost import REPORT
from genlight.loops.evaluation import in_turn, measured, score_label
from genlight.loops.result import MethodResult, metrics_of_artifact
from genlight.loops.solver_outcome import SolverOutcome
from genlight.reports.bootstrap import rms_interval
from genlight.reports.cost import CostEstimate
from genlight.reports.search_figures import quality_against_nfe, schedule_drawing, search_curve
from genlight.search.spaces.solver_schedule import TableSampler

if TYPE_CHECKING:
    from genlight.loops.solver_work import SolverWork

Sampler = SolverSchedule | SolverTable
HAND_MADE, HINDSIGHT = "best hand-made", "best hand-made, in hindsight"
SCHEDULE, EVOLVED, TABLE = "searched schedule", "before refinement", "tuned table"
STOCK = "stock"  # in the artifact
# what people use without thinking about it, for comparison
_COMMON = {
    "DDIM": ("ddim", "uniform"),
    "DPM-Solver++ 2M": ("dpmpp_2m", "log_snr"),
    "UniPC-2": ("unipc_2_bh2", "uniform"),
}


def solver_result(
    work: SolverWork, outcomes: Sequence[SolverOutcome], own: Mapping[str, float], predicted: CostEstimate
) -> MethodResult:
    """Table, metrics, pictures and artifact of a finished search.

    Args:
        work: banks and module.
        outcomes: one for each number of evaluations.
        own: what the module's own sampler reaches.
        predicted: what all of it was to cost.
    """
    if work.by_teacher:
        work.scoring("report")  # the teacher is no part of the report
    with work.evaluations.timing(REPORT):
        rows = [row for outcome in outcomes for row in _rows(work, outcome)]
        _measure_metrics(work, outcomes, rows)
    searched = "rmse" if work.by_teacher else work.method.objective.removeprefix("val/")
    metrics = {**metrics_of_artifact(own, _kept(outcomes, rows)), **_headline(rows, searched)}
    if work.runner.main:
        _pictures(work, outcomes, rows)
    notes = [
        f"{o.nfe} evaluations: the best hand-made sampler on the select noise is {o.baseline_name}" for o in outcomes
    ]
    forms, found = _stock_forms(work, outcomes)
    return MethodResult(
        metrics,
        method="S³ (searched solver schedule)",
        table=rows,
        notes=[*notes, *work.runner.notes, *found],
        predicted=predicted,
        spent=work.evaluations.spent,
        save=lambda folder, module: save_artifact(work, outcomes, rows, forms, folder, module),
    )


def samplers_of(work: SolverWork, outcome: SolverOutcome) -> dict[str, Sampler]:
    """Everything that is measured for one number of evaluations, by name."""
    samplers: dict[str, Sampler] = {HAND_MADE: outcome.baseline, SCHEDULE: outcome.schedule}
    if outcome.schedule != outcome.evolved:
        samplers[EVOLVED] = outcome.evolved
    table = outcome.solver_table()
    if table is not None:
        samplers[TABLE] = table
    samplers |= outcome.rivals
    schedule = work.module.prediction.schedule
    for name, (solver, spacing) in _COMMON.items():
        try:
            made = named_schedule(
                solver,
                schedule,
                outcome.nfe,
                spacing=spacing,
                end=work.method.end,
                integer_times=work.integer_times,
            )
            compile_schedule(made, schedule)
            samplers[name] = made
        except ValueError:
            continue  # no form on this family
    return samplers


def _rows(work: SolverWork, outcome: SolverOutcome) -> list[dict[str, Any]]:
    """One row for each sampler: distance to the teacher with its interval, for the objective "teacher"."""
    samplers = samplers_of(work, outcome)
    if not work.by_teacher:
        chosen = [name for name in samplers if name in (HAND_MADE, SCHEDULE)]
        return [{"nfe": outcome.nfe, "sampler": name} for name in chosen]
    scoring, count = work.scoring("report"), work.method.noise.report
    made = outcome.best_baselines
    errors = scoring.errors([*samplers.values(), *made.values()], count)
    rows: list[dict[str, Any]] = []
    for name, values in zip(samplers, errors, strict=False):
        rms, low, high = rms_interval(values.numpy())
        rows.append({"nfe": outcome.nfe, "sampler": name, "rmse": rms, "low": low, "high": high})
    best = min(errors[len(samplers) :], key=lambda values: float(values.mean()))
    rms, low, high = rms_interval(best.numpy())
    rows.insert(1, {"nfe": outcome.nfe, "sampler": HINDSIGHT, "rmse": rms, "low": low, "high": high})
    for row in rows:
        row["gain"] = rms / row["rmse"]
    return rows


def _measure_metrics(work: SolverWork, outcomes: Sequence[SolverOutcome], rows: list[dict[str, Any]]) -> None:
    """Add what validate logs (such as a Fréchet distance) for the hand-made, the searched and the tuned sampler."""
    wanted: list[tuple[dict[str, Any], TableSampler]] = []
    for outcome in outcomes:
        samplers = samplers_of(work, outcome)
        for row in rows:
            sampler = samplers.get(row["sampler"])
            if row["nfe"] == outcome.nfe and row["sampler"] in (HAND_MADE, SCHEDULE, TABLE) and sampler is not None:
                wanted.append((row, _table_sampler(work, sampler, outcome.schedule)))
    if getattr(work.module, "metrics", None) is None:
        return

    def measure(sampler: TableSampler) -> dict[str, float]:
        work.module.set_sampler(sampler)
        try:
            return measured(work.evaluations, work.module, work.datamodule, "report", work.datamodule.num_samples)
        finally:
            work.module.set_sampler(None)

    found = in_turn(work.evaluations, [lambda s=sampler: measure(s) for _, sampler in wanted])  # type: ignore[misc]
    for (row, _), values in zip(wanted, found, strict=True):
        row |= {name.removeprefix("val/"): value for name, value in values.items() if not name.endswith("_std")}


def _table_sampler(work: SolverWork, sampler: Sampler, schedule: SolverSchedule) -> TableSampler:
    if isinstance(sampler, SolverTable):
        return TableSampler(schedule, sampler, work.integer_times)
    table = compile_schedule(sampler, work.module.prediction.schedule)
    return TableSampler(sampler, table, work.integer_times)


def _headline(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """What was searched for, of the best hand-made sampler and of the results, by number of evaluations."""
    short = {HAND_MADE: "hand_made", SCHEDULE: "searched", TABLE: "tuned"}
    chosen = [row for row in rows if row["sampler"] in short and name in row]
    return {f"{name}_{short[row['sampler']]}_{row['nfe']}": float(row[name]) for row in chosen}


def _kept(outcomes: Sequence[SolverOutcome], rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What is measured of each schedule in the artifact, by the end of names."""
    kinds = {outcome.nfe: SCHEDULE if outcome.table is None else TABLE for outcome in outcomes}
    return {f"_at_{row['nfe']}": row for row in rows if row["sampler"] == kinds.get(row["nfe"])}


def _pictures(work: SolverWork, outcomes: Sequence[SolverOutcome], rows: Sequence[Mapping[str, Any]]) -> None:
    figures = Path(work.evaluations.trainer.default_root_dir) / "figures"
    schedule = work.module.prediction.schedule
    method, distance = work.method, "distance to the teacher"
    label = distance if work.by_teacher else score_label(method.mode, method.objective)
    titled = [(f"{o.nfe} evaluations", o.schedule) for o in outcomes]
    schedule_drawing(titled, schedule, figures / "schedules.png")
    for nfe, result in work.results.items():
        points = [(r.index, r.score, r.source, r.fidelity) for r in result.records]
        search_curve(points, figures / f"search-nfe{nfe}.png", ylabel=label)
    if work.by_teacher and len(outcomes) > 1:
        quality_against_nfe(rows, figures / "quality.png", ylabel=f"{distance} (RMS)", thin=tuple(_COMMON))


def _stock_forms(work: SolverWork, outcomes: Sequence[SolverOutcome]) -> tuple[dict[int, StockForm], list[str]]:
    """Which searched schedules (not tuned tables) a scheduler of diffusers follows by itself, and a note on each."""
    scheduler = scheduler_of(SolverBank.of(work.module.prediction, {o.nfe: o.schedule for o in outcomes}))
    found = {nfe: stock_form(scheduler, nfe) for nfe in scheduler.available_steps}
    forms = {nfe: form for nfe, form in found.items() if form is not None}
    notes = [
        f"{nfe} evaluations: no scheduler of diffusers takes the steps of the {SCHEDULE}: "
        f"{why_no_stock_form(scheduler, nfe)}"
        if form is None
        else f"{nfe} evaluations: the {SCHEDULE} is {form.class_name} of diffusers with {form.call}: "
        f"artifact/{STOCK}/{nfe}"
        for nfe, form in found.items()
    ]
    return forms, notes


def save_artifact(
    work: SolverWork,
    outcomes: Sequence[SolverOutcome],
    rows: Sequence[Mapping[str, Any]],
    forms: Mapping[int, StockForm],
    folder: Path,
    module: Any,
) -> None:
    """The model as a diffusers folder that samples with the searched schedules; beside it these as JSON, and the stock
    schedulers that take their steps.
    """
    prediction = module.prediction
    bank = SolverBank.of(prediction, {o.nfe: o.schedule for o in outcomes})
    bank = SolverBank(**{**vars(bank), "tables": {o.nfe: o.table for o in outcomes if o.table is not None}})
    best = TABLE if bank.tables else SCHEDULE
    scores: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["sampler"] in (best, SCHEDULE):
            scores[row["nfe"]] = {k: float(v) for k, v in row.items() if k not in ("nfe", "sampler")}
    setting = {"guidance_scale": float(module.guidance_scale)}
    scheduler = scheduler_of(bank, scores=scores, setting=setting)
    if hasattr(module, "denoiser"):
        # saved with the module, so that the pipeline is one that takes any scheduler
        config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        module.scheduler = partial(SolverScheduleScheduler, **config)
        module.num_inference_steps = outcomes[-1].nfe
        module.save_pretrained(folder)
    else:
        module.save_pretrained(folder)
        write_scheduler(scheduler, folder)
    io.atomic_write_text(folder / "solver_bank.json", bank.to_json())
    for nfe, form in forms.items():
        write_stock_form(form, folder, folder / STOCK / str(nfe))
