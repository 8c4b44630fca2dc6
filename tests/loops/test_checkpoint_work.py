"""Parts of LCSC without a command: which of the measured combinations are looked at again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from checkpoints.stand_in import random_trajectory

from genlight.loops.checkpoint_report import _curves, _row, _screened_note
from genlight.loops.checkpoint_search import CheckpointSearch
from genlight.loops.checkpoint_work import GRADIENT, LCSC, RANDOM, CheckpointWork, Variant
from genlight.loops.search import SearchSettings
from genlight.search.engine import SearchResult
from genlight.search.records import Record, Trial, best_record
from genlight.search.spaces.checkpoint_coefficients import CheckpointCoefficients, Combination

FULL, FEW = 200, 64


def result(
    space: CheckpointCoefficients, *measured: tuple[Combination, int, float | None]
) -> SearchResult[Combination]:
    """Of (candidate, fidelity, score) in the order of an archive."""
    records = tuple(
        Record(Trial(i, 0, space.key(each), each, fidelity, "made", {}, (0, i)), score, {}, None)
        for i, (each, fidelity, score) in enumerate(measured)
    )
    return SearchResult(best_record(records), records, "budget")


def test_scores_on_few_samples_are_not_ranked_among_the_others(tmp_path: Path) -> None:
    """Averages are screened, some are measured in full, and combinations follow; those of few samples look better."""
    space = CheckpointCoefficients(random_trajectory(6))
    settings: Any = SearchSettings(strategy=None, fidelity=FULL, finalists=2)  # type: ignore[arg-type]
    work = CheckpointWork(CheckpointSearch(settings, "val/fd", str(tmp_path)), None, None, None, space, "")
    usual = work.baselines
    made = [space.made(space.free(usual["last"]) + 0.1 * number) for number in (1, 2, 3)]
    neon = [name for name in usual if name.startswith("neon")]
    screened = [
        (usual[name], FEW, score) for name, score in (("last", 0.1), ("swa", 0.3), (neon[0], 0.5), (neon[1], 0.4))
    ]
    work.results[LCSC] = result(
        space,
        *screened,
        (usual["last"], FULL, 5.0),
        (usual["swa"], FULL, None),
        (made[0], FULL, 3.0),
        (made[1], FULL, 2.0),
        (made[2], FULL, 4.0),
    )
    work.results[RANDOM] = result(space, (usual["last"], FULL, 5.0))
    found = work._of_records()
    assert [(variant.name, variant.search) for variant in found if not math.isnan(variant.search)] == [
        ("last", 5.0),
        (f"{LCSC} 7", 2.0),
        (f"{LCSC} 6", 3.0),
        (f"{RANDOM} 0", 5.0),
    ]
    # kinds of which none was measured in full: their best by the screening, whose score says nothing beside the others
    assert [variant.name for variant in found if math.isnan(variant.search)] == ["swa", neon[1], neon[0]]
    keys = [space.key(variant.weights) for variant in found if variant.kind != RANDOM]  # type: ignore[arg-type]
    assert len(set(keys)) == len(keys)
    assert all(Variant(each.name, each.kind, each.weights, each.search, 1.0).is_measured for each in found)
    rows = [_row(work, variant, {}) for variant in found]
    assert [row["weights"] for row in rows if "search" not in row] == ["swa", neon[1], neon[0]]
    assert _screened_note(work, found) == [f"no search score on {FULL} samples: swa, {neon[1]}, {neon[0]}"]
    assert _screened_note(work, found[:1]) == []


def test_the_picture_shows_every_group_and_what_gradient_descent_found(tmp_path: Path) -> None:
    space = CheckpointCoefficients(random_trajectory(6), groups=("down", ".*"))
    settings: Any = SearchSettings(strategy=None)  # type: ignore[arg-type]
    work = CheckpointWork(CheckpointSearch(settings, "val/fd", str(tmp_path)), None, None, None, space, "")
    usual = work.baselines["swa"]
    free = space.free(usual)
    free[1] += 0.5
    own = space.made(free)
    found = {
        kind: Variant(f"{kind} 1", kind, weights, 0.0)
        for kind, weights in ((LCSC, own), (GRADIENT, usual), ("ema", usual), ("swa", usual))
    }
    curves = _curves(work, found)
    assert list(curves) == [f"{LCSC} 1: down", f"{LCSC} 1: .*", f"{GRADIENT} 1", "ema 1"]
    assert [curves[f"{LCSC} 1: down"], curves[f"{LCSC} 1: .*"]] == space.weights(own).tolist()


def test_a_failed_measurement_is_none() -> None:
    weights = Combination(())
    assert not Variant("a", "a", weights, math.inf, 1.0).is_measured
    assert not Variant("a", "a", weights, math.nan, math.inf).is_measured
    assert not Variant("a", "a", weights, math.nan).is_measured
