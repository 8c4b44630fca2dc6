"""What DELE's comparison and searches came to: one table, pictures, and the predictor as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight import io
from genlight.loops.predictor_cost import COMPARISONS, PREDICTOR
from genlight.loops.predictor_work import EXPERT_TAU, PredictorWork, Scores
from genlight.loops.result import MethodResult
from genlight.predictors.contenders import DELE
from genlight.predictors.expert_heads import all_scores
from genlight.predictors.predictor_file import save_predictor
from genlight.reports.cost import CostEstimate
from genlight.reports.intervals import mean_interval
from genlight.reports.predictor_figures import gate_weights, regret_curves, tau_over_labels

if TYPE_CHECKING:
    from genlight.predictors.predictor_file import TrainedExperts

TAU = "kendall_tau"
_QUANTITIES = (TAU, "spearman", "p_at_1", "p_at_5")
COMPARISON = "comparison.json"
_KIND, _VERSION = "predictor_comparison", 1
# an expert below has learned next to nothing of its score
_LEARNED = 0.1


def predictor_result(work: PredictorWork, own: Mapping[str, float], predicted: CostEstimate) -> MethodResult:
    """Table, metrics, pictures and artifact.

    Args:
        work: settings, comparisons, searches.
        own: what the checkpoint reaches as it is.
        predicted: what all of it was to cost.
    """
    method, labels = work.method, work.datamodule.labels
    with work.evaluations.timing(COMPARISONS):
        indicators = work.indicators()
        work.runner.remark([*work.doubts(), *work.cost_doubts(), *_unlearned(indicators)])
        compared = work.compared()
    regrets = work.regrets()
    rows = _rows(work, compared, indicators)
    with work.evaluations.timing(PREDICTOR):
        trained, proposals = work.trained(method.predictor), work.proposals()
    if work.runner.main:
        _pictures(work, compared, regrets, trained)
    taus = {f"{TAU}_{row['predictor']}": row[TAU] for row in rows if row["labels"] == labels}
    ends = {name: mean_interval([seed[-1] for seed in seeds]) for name, seeds in regrets.items()}
    found = {f"regret_{name}": mean for name, (mean, _, _) in ends.items()}
    best = max(indicators, key=lambda name: abs(indicators[name][TAU]))
    notes = [
        f"{len(work.held_out)} candidates held out; means over {method.label_seeds} choices of labelled candidates, "
        f"low and high are the ends of a 95 % interval of {TAU} over these",
        f"best single indicator, which was chosen on the candidates held out: {best}",
        *(_search_note(work, name, *each) for name, each in ends.items()),
        *([f"next to measure, best first: rows {_numbers(proposals)}"] if proposals else []),
        *work.runner.notes,
    ]
    return MethodResult(
        {**own, **taus, **found},
        method="DELE (dynamic ensemble of low-fidelity experts)",
        num_samples=len(work.held_out),
        table=rows,
        notes=notes,
        predicted=predicted,
        spent=work.evaluations.spent,
        save=lambda folder, module: save_artifact(work, trained, rows, regrets, proposals, folder),
    )


def _rows(work: PredictorWork, compared: Mapping[tuple[int, int], Scores], indicators: Scores) -> list[dict[str, Any]]:
    """One for each number of labels and predictor, best first for each number; indicators need no label."""
    found = []
    for labels in work.numbers:
        rows = []
        for name in work.method.predictors:
            seeds = [compared[labels, seed][name] for seed in work.label_seeds]
            rows.append(_row(labels, name, seeds))
        found += sorted(rows, key=lambda row: -row[TAU])
    alone = [_row(0, name, [scores]) for name, scores in indicators.items()]
    return found + sorted(alone, key=lambda row: -abs(row[TAU]))


def _row(labels: int, name: str, seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Means over choices of labels, with the interval of the first quantity."""
    _, low, high = mean_interval([scores[TAU] for scores in seeds])
    row: dict[str, Any] = {"labels": labels, "predictor": name}
    for quantity in _QUANTITIES:
        known = [scores[quantity] for scores in seeds if quantity in scores]
        row[quantity] = mean_interval(known)[0] if known else None
        if quantity == TAU:
            row |= {"low": _or_none(low), "high": _or_none(high)}
    expert = [scores[EXPERT_TAU] for scores in seeds if EXPERT_TAU in scores]
    return {**row, EXPERT_TAU: _or_none(expert[0]) if expert else None}


def _unlearned(indicators: Scores) -> list[str]:
    """A note on experts that do not rank by their own score."""
    poor = {name: scores[EXPERT_TAU] for name, scores in indicators.items() if scores[EXPERT_TAU] < _LEARNED}
    if not poor:
        return []
    named = ", ".join(f"{name} {tau:.2f}" for name, tau in sorted(poor.items(), key=lambda each: each[1]))
    return [f"experts that hardly learned their own score ({TAU} below {_LEARNED} on the candidates held out): {named}"]


def _numbers(proposals: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(str(each["row"]) for each in proposals)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _search_note(work: PredictorWork, name: str, mean: float, low: float, high: float) -> str:
    between = f" ({low:.4g} to {high:.4g}, 95 %)" if math.isfinite(low) else ""
    return (
        f"search by {name}: regret {mean:.4g}{between} after {work.method.settings.budget} of {len(work.searched)} "
        f"candidates, over {work.method.search_seeds} seeds"
    )


def _pictures(
    work: PredictorWork,
    compared: Mapping[tuple[int, int], Scores],
    regrets: Mapping[str, Sequence[Sequence[float]]],
    trained: TrainedExperts,
) -> None:
    figures = Path(work.evaluations.trainer.default_root_dir) / "figures"
    taus = {
        name: {labels: [compared[labels, seed][name][TAU] for seed in work.label_seeds] for labels in work.numbers}
        for name in work.method.predictors
    }
    tau_over_labels(taus, figures / "tau.png")
    if regrets:
        strategy: Any = getattr(work.method.settings.strategy, "strategy", None)
        regret_curves(regrets, figures / "regret.png", getattr(strategy, "random", 1))
    dele = trained if work.method.predictor == DELE else work.trained(DELE)
    weights = all_scores(dele.network, work.table.tokens[work.held_out])[2]
    gate_weights(dele.names, weights.numpy(), figures / "gate.png")


def save_artifact(
    work: PredictorWork,
    trained: TrainedExperts,
    rows: Sequence[Mapping[str, Any]],
    regrets: Mapping[str, Sequence[Sequence[float]]],
    proposals: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    """The predictor, which `genlight.predictors.predictor_file` reads, and all that was compared as JSON beside it."""
    save_predictor(folder, trained, {**work.datamodule.facts, "predictor": work.method.predictor})
    content = {
        "kind": _KIND,
        "version": _VERSION,
        "target": work.datamodule.target,
        "held_out": len(work.held_out),
        "scores": [dict(row) for row in rows],
        "regrets": {name: [list(seed) for seed in seeds] for name, seeds in regrets.items()},
        "proposals": [dict(each) for each in proposals],
    }
    io.atomic_write_json(folder / COMPARISON, content)
