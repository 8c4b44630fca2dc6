"""What EEP found, beside the whole model and every baseline, on questions that neither search nor choice has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from genlight import io
from genlight.errors import UserError
from genlight.experts.export import check_exportable, save_edited
from genlight.loops.cost import REPORT
from genlight.loops.evaluation import as_logged, in_turn, measured, score_label
from genlight.loops.expert_calibration import RANDOM
from genlight.loops.expert_remarks import remarks_after, remarks_of_merging
from genlight.loops.expert_work import FULL, MERGED, PRUNED, Choice, ExpertWork
from genlight.loops.result import MethodResult
from genlight.reports.cost import CostEstimate
from genlight.reports.expert_figures import expert_heatmaps
from genlight.reports.search_figures import pareto_picture, search_curve
from genlight.search.pareto import pareto_front
from genlight.search.spaces.expert_map_file import FILE, KIND, VERSION

if TYPE_CHECKING:
    from genlight.search.spaces.expert_maps import ExpertMaps

_QUANTITIES = ("accuracy", "choice_log_likelihood", "log_likelihood")
# questions for a choice below which their chance counts more than what differs among the best
_FEW = 200
_README = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


@dataclass(frozen=True)
class Reported:
    """A model with what it reached on the report draw, and what it costs."""

    choice: Choice
    values: Mapping[str, float]
    parameters: int
    tokens_per_second: float


@dataclass(frozen=True)
class Found:
    """What came of one number of experts.

    Attributes:
        work: settings and search.
        best: by kind, on the select draw.
        winner: of the search, on the select draw.
        shown: the whole model, what was searched, and the baselines from the best to the worst, by kind.
        random: the row of random choices; None: there were none.
        refusal: why the winner cannot be saved as a model; "" if it can.
        failed: names of what could not be measured.
    """

    work: ExpertWork
    best: Mapping[str, Choice]
    winner: Choice
    shown: Mapping[str, Reported]
    random: Mapping[str, Any] | None
    refusal: str
    failed: Sequence[str]

    def metrics(self) -> dict[str, float]:
        """Of the winner, as validate logs them, of the whole model beside it, and the headline of the method.

        Where the search is for some of the tasks, means over all of them are left out: those of the headline are means
        over the tasks of the search.
        """
        winner = self.shown[self.winner.kind].values
        return {**_logged(self.work, winner), **self.before(), **_headline(self)}

    def before(self) -> dict[str, float]:
        """Of the whole model, under names that say so."""
        own = _logged(self.work, self.shown[FULL].values)
        return {f"{name.removeprefix('val/')}_full": value for name, value in own.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Of the table, the whole model first."""
        rows = [_row(self.work, each, each.choice is self.winner) for each in self.shown.values()]
        return [*rows, dict(self.random)] if self.random else rows


def expert_result(works: Sequence[ExpertWork], own: Mapping[str, float], predicted: CostEstimate) -> MethodResult:
    """Table, metrics, pictures and artifact.

    Args:
        works: settings and search, for each number of experts.
        own: what the whole model reaches.
        predicted: what all of it was to cost.

    Raises:
        UserError: nothing could be measured.
    """
    every = [_found(work, own) for work in works]
    first = works[0]
    # a model card is about its artifact: of several models each has a card, and names of all say which they are of
    rows, metrics = every[0].rows()[:1], every[0].before() if len(every) > 1 else every[0].metrics()
    for each in every:
        rows += each.rows()[1:]
        end = _ending(each, every)
        if end:
            metrics |= {f"{name}{end}": value for name, value in _headline(each).items()}
        if first.runner.main:
            _pictures(each, end)
    if first.runner.main:
        _pareto([reported for each in every for reported in each.shown.values()], first)
    first.apply(None)
    notes = [
        f"search and select are {first.metric} on these draws, all else is on the report draw: accuracy and "
        f"log-likelihood of {', '.join(first.task_data.evaluate)}, and of each task. A saved model of the same shapes "
        "needs no more time than tokens_per_second says, which is measured before it is saved",
        *_few(first),
        *[f"failed, and left out: {', '.join(each.failed)}" for each in every if each.failed],
        *([f"{RANDOM}: mean of {first.method.random_draws} draws"] if every[0].random else []),
        *[f"the artifact holds {FILE} alone: {each.refusal}" for each in every if each.refusal],
        *[note for each in every for note in each.work.runner.notes],
    ]
    if first.cache is not None and first.cache.layers_seen:
        share = first.cache.passed_over / first.cache.layers_seen
        notes.append(f"hidden states that were kept saved {share:.0%} of the layers of candidates")

    def save(folder: Path, module: Any) -> None:
        for each in every:
            place = folder / _folder(each) if len(every) > 1 else folder
            place.mkdir(exist_ok=True)
            save_artifact(each, place, module)

    return MethodResult(
        metrics,
        method="EEP (efficient expert pruning)",
        table=rows,
        notes=notes,
        predicted=predicted,
        spent=first.evaluations.spent,
        save=save,
        parts={_folder(each): each.metrics() for each in every} if len(every) > 1 else {},
    )


def _few(work: ExpertWork) -> list[str]:
    """What is to be said of few questions for the choice."""
    held, asked = len(work.task_data.examples("select")), work.method.select
    if held >= asked >= _FEW:
        return []
    why = f"method.select = {asked}" if held >= asked else f"data.shares.select holds no more (method.select = {asked})"
    return [f"the choice among the best is by {min(held, asked)} questions: {why}"]


def _folder(each: Found) -> str:
    """Of one number of experts, where there are several."""
    return f"{each.work.num_experts}_experts"


def _logged(work: ExpertWork, values: Mapping[str, float]) -> dict[str, float]:
    """What validate logs, without means over all tasks where the search is for some."""
    some = set(work.task_data.evaluate) < set(work.datamodule.evaluate)
    return {name: value for name, value in values.items() if not some or "/" in name.removeprefix("val/")}


def _ending(each: Found, every: Sequence[Found]) -> str:
    """What tells names apart where several numbers of experts were searched."""
    return f"_{each.work.num_experts}" if len(every) > 1 else ""


def _found(work: ExpertWork, own: Mapping[str, float]) -> Found:
    every = work.choices()
    settings = work.method.settings
    remarks = remarks_after(work.metric, work.method.mode, work.measured_scores())
    remarks += remarks_of_merging(work.merges, settings.budget, settings.strategy)
    work.runner.remark([f"{work.num_experts} experts: {remark}" for remark in remarks])
    choices = [choice for choice in every if math.isfinite(choice.search) and math.isfinite(choice.select)]
    failed = [choice.name for choice in every if choice not in choices]
    best: dict[str, Choice] = {}
    for choice in sorted(choices, key=lambda choice: choice.select):
        if choice.kind != RANDOM:
            best.setdefault(choice.kind, choice)
    if not {PRUNED, MERGED} & best.keys() or FULL not in best:
        raise UserError(f"no candidate could be measured: see {work.runner.folder}")
    winner = min((best[kind] for kind in (PRUNED, MERGED) if kind in best), key=lambda choice: choice.select)
    with work.evaluations.timing(f"{REPORT}, {work.num_experts} experts"):
        shown = _reported(work, best, winner, own)
        draws = [choice for choice in choices if choice.kind == RANDOM]
        random = _random_row(work, draws) if draws else None
    return Found(work, best, winner, shown, random, _refusal(work, winner), failed)


def _reported(
    work: ExpertWork, best: Mapping[str, Choice], winner: Choice, own: Mapping[str, float]
) -> dict[str, Reported]:
    """By kind: the whole model, what was searched, the baselines from the best to the worst."""
    searched = [kind for kind in (PRUNED, MERGED) if kind in best]
    others = sorted((k for k in best if k not in (FULL, *searched)), key=lambda kind: best[kind].select)
    order = [FULL, *searched, *others]
    pieces = [partial(work.report, best[kind].candidate) for kind in order[1:]]
    values = dict(zip(order, [own, *in_turn(work.evaluations, pieces)], strict=True))
    # all models with fewer experts have the same shapes
    speeds = {FULL: work.tokens_per_second(None)}
    fewer = work.tokens_per_second(best.get(PRUNED, winner).candidate)
    return {
        kind: Reported(best[kind], values[kind], work.parameters(best[kind].candidate), speeds.get(kind, fewer))
        for kind in order
    }


def _mean(work: ExpertWork, values: Mapping[str, float], quantity: str) -> float | None:
    """Over the tasks of the search; None where it is not measured."""
    found = [values.get(f"val/{task}/{quantity}") for task in work.task_data.evaluate]
    known = [value for value in found if value is not None]
    return fmean(known) if known else None


def _row(work: ExpertWork, each: Reported, chosen: bool) -> dict[str, Any]:
    choice = each.choice
    whole = choice.candidate is None
    row: dict[str, Any] = {"model": choice.name, "kind": choice.kind, "chosen": "yes" if chosen else ""}
    row["experts"] = work.editor.num_experts if whole else work.num_experts
    means = {quantity: _mean(work, each.values, quantity) for quantity in _QUANTITIES}
    row |= {quantity: value for quantity, value in means.items() if value is not None}
    mode = work.method.mode
    row |= {"search": as_logged(mode, choice.search), "select": as_logged(mode, choice.select)}
    row["per token"] = work.editor.own_routing.num_experts_per_tok if whole else work.per_token
    for task in work.datamodule.evaluate:
        known = {f"{task}/{quantity}": f"val/{task}/{quantity}" for quantity in _QUANTITIES}
        row |= {name: each.values[logged] for name, logged in known.items() if logged in each.values}
    row["expert parameters"] = row["experts"] * sum(work.space.expert_parameters)
    row |= {"parameters": each.parameters, "bytes": each.parameters * work.space.bytes_per_parameter}
    row["tokens per second"] = round(each.tokens_per_second)
    return row


def _random_row(work: ExpertWork, draws: Sequence[Choice]) -> dict[str, Any]:
    """Means over random choices of experts, which are measured on the tasks of the search alone."""

    def one(choice: Choice) -> dict[str, float]:
        work.apply(choice.candidate)
        data = work.task_data
        return measured(work.evaluations, work.module, data, "report", data.num_samples)

    found = in_turn(work.evaluations, [partial(one, choice) for choice in draws])
    row: dict[str, Any] = {"model": RANDOM, "kind": RANDOM, "chosen": "", "experts": work.num_experts}
    row |= {"per token": work.per_token}
    row |= {"search": as_logged(work.method.mode, fmean(choice.search for choice in draws))}
    row |= {"select": as_logged(work.method.mode, fmean(choice.select for choice in draws))}
    for quantity in _QUANTITIES:
        values = [value for each in found if (value := _mean(work, each, quantity)) is not None]
        row[quantity] = fmean(values) if values else None
        row[f"{quantity} deviation"] = pstdev(values) if values else None
    return row


def _headline(found: Found) -> dict[str, float]:
    """Accuracy and log-likelihood before and after, and the best of each phase on the search draw."""
    work, shown = found.work, found.shown
    others = [kind for kind in shown if kind not in (FULL, PRUNED, MERGED)]
    names = {"full": FULL, "eep_prune": PRUNED, "eep_merge": MERGED}
    if others:
        names["best_other"] = others[0]
    values: dict[str, float | None] = {}
    for quantity in _QUANTITIES:
        for word, kind in names.items():
            if kind in shown:
                values[f"{quantity}_{word}"] = _mean(work, shown[kind].values, quantity)
        if found.random is not None:
            values[f"{quantity}_random"] = found.random.get(quantity)
    for word, kind in (("prune", PRUNED), ("merge", MERGED)):
        if ranked := work.ranked(kind):
            values[f"search_best_{word}"] = as_logged(work.method.mode, float(ranked[0].score or 0.0))
    values["share_of_expert_parameters"] = work.num_experts / work.editor.num_experts
    return {name: float(value) for name, value in values.items() if value is not None}


def _refusal(work: ExpertWork, winner: Choice) -> str:
    """Why the winner cannot be saved as a model; "" if it can."""
    work.apply(winner.candidate)
    try:
        check_exportable(work.editor)
    except ValueError as error:
        return str(error)
    return ""


def _figures(work: ExpertWork) -> Path:
    return Path(work.evaluations.trainer.default_root_dir) / "figures"


def _pictures(found: Found, end: str) -> None:
    work, best, shown, figures = found.work, found.best, found.shown, _figures(found.work)
    kinds = [kind for kind in (PRUNED, MERGED, *shown) if kind in shown and kind != FULL][:3]
    kept = {}
    for kind in dict.fromkeys(kinds):
        maps = work.space.layer_maps(_candidate(best[kind]))
        kept[best[kind].name] = [maps[layer].expert_map.abs().sum(dim=0).tolist() for layer in work.space.layers]
    expert_heatmaps(kept, figures / f"kept_experts{end}.png", label="weight of each expert")
    searched = best.get(PRUNED) or best[MERGED]
    loads = {"all experts": work.whole.load, searched.name: work.routing(_candidate(searched))}
    shares = {
        name: [(load[layer] / max(1, int(load[layer].sum()))).tolist() for layer in work.space.layers]
        for name, load in loads.items()
    }
    expert_heatmaps(shares, figures / f"routing_load{end}.png", label="share of the routed tokens")
    points = [(r.index, r.score, r.source, r.fidelity) for r in work.result.records]
    label = score_label(work.method.mode, work.metric)
    search_curve(points, figures / f"search{end}.png", ylabel=label)


def _pareto(every: Sequence[Reported], work: ExpertWork) -> None:
    """Accuracy against parameters, of all models of the table."""
    errors = [(float(each.parameters), _mean(work, each.values, "accuracy")) for each in every]
    known = [(cost, 1 - accuracy) for cost, accuracy in errors if accuracy is not None]
    if known:
        front = list(dict.fromkeys(known[place] for place in pareto_front(known)))
        pareto_picture(known, front, _figures(work) / "pareto.png", "parameters", "1 - accuracy")


def _candidate(choice: Choice) -> ExpertMaps:
    assert choice.candidate is not None
    return choice.candidate


def save_artifact(found: Found, folder: Path, module: Any) -> None:
    """The model with fewer experts as a folder of transformers, and beside it which they are.

    There are the maps alone where the winner cannot be saved.
    """
    work, winner, best = found.work, found.winner, found.best
    work.apply(winner.candidate)
    if not found.refusal:
        save_edited(work.editor, folder)
        if module.tokenizer is not None:
            module.tokenizer.save_pretrained(str(folder))
        io.atomic_write_text(folder / "README.md", _README)
    work.apply(None)
    searched = {kind: best[kind] for kind in (PRUNED, MERGED) if kind in best}
    content = {
        "kind": KIND,
        "version": VERSION,
        "num_experts": [work.editor.num_experts, work.num_experts],
        "num_experts_per_tok": work.per_token,
        "router_mapping": work.method.router_mapping,
        "objective": work.metric,
        "tasks": list(work.task_data.evaluate),
        "chosen": winner.kind,
        "candidates": {kind: asdict(_candidate(choice)) for kind, choice in searched.items()},
        "kept_experts": {
            kind: dict(zip(work.space.layers, _kept(work, _candidate(choice)), strict=True))
            for kind, choice in searched.items()
            if _candidate(choice).prunes
        },
        "scores": found.rows(),
    }
    io.atomic_write_json(folder / FILE, content)


def _kept(work: ExpertWork, candidate: ExpertMaps) -> list[list[int]]:
    """The old numbers of the kept experts of each layer."""
    maps = work.space.layer_maps(candidate)
    return [maps[layer].expert_map.argmax(dim=1).tolist() for layer in work.space.layers]
