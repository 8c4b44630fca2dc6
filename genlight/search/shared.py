"""Scores that runs share: what one run measured, another with the same model, data and metric need not measure again.

All runs whose candidates score alike have one folder, in which each writes a file of its own: no run waits for another.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from genlight import io
from genlight.search.archive import seal, unseal
from genlight.search.evaluation import Evaluator
from genlight.search.protocols import Candidate
from genlight.search.records import Outcome, Record, Trial

Known = dict[tuple[str, int], Outcome]


@dataclass(frozen=True)
class _ScoreLine:
    kind: Literal["shared_score"]
    version: Literal[1]
    key: str
    fidelity: int
    score: float
    facts: dict[str, float | int | str]


_LINE = TypeAdapter(_ScoreLine)


def read_scores(own: Path) -> Known:
    """What other runs measured, by canonical key and fidelity.

    A line that is damaged, torn or of another version is passed over: its candidate is measured again.

    Args:
        own: this run's file, which is left out; those of the others lie beside it.
    """
    known: Known = {}
    for file in sorted(own.parent.glob("*.jsonl")):
        if file == own:
            continue
        with suppress(OSError, io.CorruptFileError):
            for number, line in enumerate(io.read_lines(file), start=1):
                with suppress(io.CorruptFileError, ValidationError):
                    content = json.dumps(unseal(line, f"line {number} of {file}"))
                    found = _LINE.validate_json(content, strict=True, extra="forbid")
                    known.setdefault((found.key, found.fidelity), Outcome(found.score, found.facts))
    return known


def keep_score(own: Path, record: Record[Any]) -> None:
    """Let other runs have a score; failures may be the machine's, and are kept from them.

    A search goes on where this cannot be written: it needs its own archive only.
    """
    if record.score is not None:
        line = _ScoreLine("shared_score", 1, record.key, record.fidelity, record.score, dict(record.facts))
        with suppress(OSError, io.DiskFullError):
            io.append_line(own, seal(asdict(line)))


def known_first(
    evaluator: Evaluator[Candidate], known: Known, note: Callable[[list[int]], None]
) -> Evaluator[Candidate]:
    """The evaluator for the trials that are not known; the others have the outcomes that are.

    Args:
        evaluator: measures.
        known: from `read_scores`; the same on all processes.
        note: is told the indices of the trials that were not measured.
    """

    def evaluate(trials: Sequence[Trial[Candidate]]) -> list[Outcome]:
        missing = [trial for trial in trials if (trial.key, trial.fidelity) not in known]
        measured = dict(zip((trial.index for trial in missing), evaluator(missing) if missing else [], strict=True))
        taken = [trial.index for trial in trials if trial.index not in measured]
        if taken:
            note(taken)
        return [measured.get(trial.index) or known[trial.key, trial.fidelity] for trial in trials]

    return evaluate
