"""Two processes of a run as far as `in_turn` knows them: two threads, of which a broadcast waits for the other."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any


class Pair:
    """Attributes: calls: how often each has broadcast."""

    def __init__(self) -> None:
        self.calls = [0, 0]
        self._barrier, self._sent = threading.Barrier(2, timeout=10.0), list[Any]()

    def evaluations(self, rank: int) -> Any:
        """Instead of a `CandidateTrainer`."""

        def broadcast(value: Any, src: int = 0) -> Any:
            self.calls[rank] += 1
            if rank == src:
                self._sent = [value]
            self._barrier.wait()
            (found,) = self._sent
            self._barrier.wait()
            return found

        trainer = SimpleNamespace(global_rank=rank, strategy=SimpleNamespace(broadcast=broadcast))
        return SimpleNamespace(shares=2, trainer=trainer, display=SimpleNamespace(counted=iter))

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """What `work` gives or raises when it is called with the evaluations of each."""
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(work, self.evaluations(rank)) for rank in (0, 1)]
        return [future.exception() or future.result() for future in futures]
