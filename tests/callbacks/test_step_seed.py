"""The randomness of a step depends on (seed, batch, rank) and on nothing else."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.toy_training import ToyModule, quiet, train

from genlight.callbacks.step_seed import StepSeed, step_seed

quiet()
indices = st.integers(0, 10**9)


@given(seed=indices, batch=indices, rank=st.integers(0, 10**4))
def test_seeds_are_pure_and_fit_torch(seed: int, batch: int, rank: int) -> None:
    value = step_seed(seed, batch, rank)
    assert value == step_seed(seed, batch, rank) and 0 <= value < 2**64
    torch.Generator().manual_seed(value)


def test_neighbours_never_share_a_seed() -> None:
    grid = [(seed, batch, rank) for seed in range(10) for batch in range(60) for rank in range(10)]
    assert len({step_seed(*point) for point in grid}) == len(grid)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        StepSeed(-1)


class Noisy(ToyModule):
    """Draws numbers outside the steps too, and notes what each step draws."""

    def on_train_batch_end(self, *arguments) -> None:
        torch.rand(self.extra)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.trace.append(("drawn", float(torch.rand(()))))
        return super().training_step(batch, index)


def test_what_happens_between_steps_does_not_matter(tmp_path: Path) -> None:
    traces = []
    for extra in (0, 5):
        module = Noisy()
        module.extra = extra
        trace, _ = train(tmp_path / str(extra), module=module, max_steps=9, checkpoint={"every_n_train_steps": 100})
        traces.append([event[1] for event in trace if event[0] == "drawn"])
    assert traces[0] == traces[1] and len(set(traces[0])) == 9
