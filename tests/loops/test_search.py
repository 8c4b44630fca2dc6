"""What a search under the trainer refuses before it begins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genlight.errors import UserError
from genlight.loops.search import SearchRunner, SearchSettings


@pytest.mark.parametrize(("sharded", "processes", "limit"), [(True, 2, None), (True, 1, 5.0), (False, 2, 5.0)])
def test_processes_that_share_a_candidate_have_no_limit_of_time(
    tmp_path: Path, sharded: bool, processes: int, limit: float | None
) -> None:
    def runner(sharded: bool, processes: int, limit: float | None) -> SearchRunner:
        trainer = SimpleNamespace(
            default_root_dir=str(tmp_path), callbacks=[], is_global_zero=True, world_size=processes
        )
        evaluations: Any = SimpleNamespace(trainer=trainer, sharded=sharded)
        strategy: Any = None
        return SearchRunner(evaluations, SearchSettings(strategy, time_limit_s=limit))

    runner(sharded, processes, limit)
    with pytest.raises(UserError, match=r"search.time_limit_s = 5: .* 2 processes measure each candidate together"):
        runner(True, 2, 5.0)
