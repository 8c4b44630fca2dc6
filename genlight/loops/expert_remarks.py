"""What the questions of EEP cannot tell apart: said at the terminal, and in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genlight.loops.evaluation import as_logged

# objectives that are shares of the questions, and how few of these are too few to tell candidates apart
_SHARES, _FEW = ("accuracy", "accuracy_normalised", "exact_match"), 200
# how many times the nats of one task are those of another where a mean over them is of the first alone
_UNEQUAL = 10
# share of the candidates that reach the best score, above which their order is that of the archive
_TIED = 0.1


def remarks_before(metric: str, names: Sequence[str], asked: int, logged: Mapping[str, float]) -> list[str]:
    """What is known before the search, from what the whole model reaches.

    Args:
        metric: that candidates are compared by.
        names: of the tasks of the search.
        asked: questions of the search.
        logged: metrics of the whole model on the report draw.
    """
    found = []
    if asked < _FEW and _is_share(metric):
        found.append(
            f"{metric} of {asked} questions comes in steps of {100 / asked:.2g} points, so that candidates tie: ask "
            "more (search.fidelity), or search by a log-likelihood (method.objective=null)"
        )
    values = [logged[name] for name in _of_tasks(metric, names) if name in logged]
    if values and min(values) == 1 and _is_share(metric):
        found.append(
            f"{metric} of the whole model is 1, where it ends: candidates can only tie with it or lose. Ask harder "
            "questions, or search by a log-likelihood (method.objective=null)"
        )
    nats = {name: -value for name in names if (value := logged.get(f"val/{name}/log_likelihood")) is not None}
    most, least = max(nats, key=nats.__getitem__, default=""), min(nats, key=nats.__getitem__, default="")
    if metric == "val/log_likelihood" and nats and nats[most] > _UNEQUAL * nats[least]:
        found.append(
            f"{metric} is the mean of {nats[most]:.3g} nats of {most} and {nats[least]:.3g} of {least}, and so of the "
            "first alone: search by val/accuracy, or for one task (method.tasks)"
        )
    return found


def remarks_after(metric: str, mode: str, scores: Sequence[float], which: str = "of the search") -> list[str]:
    """What the search could not tell apart.

    Args:
        metric, mode: that candidates were compared by.
        scores: of all candidates that were measured on all questions, lower is better.
        which: of the candidates these are.
    """
    if len(scores) < 2:
        return []
    best = min(scores)
    tied, reached = scores.count(best), f"{metric} = {as_logged(mode, best):.4g}"
    advice = "ask more questions (search.fidelity)"
    if _is_share(metric):
        advice += ", or search by a log-likelihood (method.objective=null)"
    if tied == len(scores):
        return [f"all {tied} candidates {which} have {reached}, which leaves it nothing to learn from: {advice}"]
    if tied > max(1, _TIED * len(scores)):
        return [
            f"{tied} of {len(scores)} candidates {which} have its best score, {reached}, so that it had little "
            f"to learn from: {advice}"
        ]
    return []


def remarks_of_merging(merges: bool, budget: int, strategy: Any) -> list[str]:
    """That nothing was merged, where the search was to merge.

    Args:
        merges: whether anything was.
        budget: `search.budget`.
        strategy: one without a number of evaluations that prune (`ExpertPlan`) merges nothing by intent.
    """
    prune = getattr(strategy, "prune_evaluations", None)
    if merges or prune is None:
        return []
    return [
        f"no evaluation was left for merging (search.budget = {budget}, search.strategy.prune_evaluations = {prune}): "
        "raise search.budget, and go on with resume=true"
    ]


def _is_share(metric: str) -> bool:
    return metric.rsplit("/", 1)[-1] in _SHARES


def _of_tasks(metric: str, names: Sequence[str]) -> list[str]:
    """A metric of one task as it is; one over all tasks of the data by the name of each task of the search."""
    quantity = metric.removeprefix("val/")
    return [metric] if "/" in quantity else [f"val/{name}/{quantity}" for name in names]
