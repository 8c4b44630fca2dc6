"""What each acquisition picks, against closed forms and sampling; and that it finds what random search does not."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from search.toy_search import WordSpace, rugged
from torch import Tensor

from genlight.errors import UserError
from genlight.search.acquisition import PREDICTED, AcquisitionSearch, expected_improvement
from genlight.search.records import History, Problem, Record, Trial


@dataclass(frozen=True)
class ListedWords(WordSpace):
    @property
    def candidates(self) -> list[Any]:
        return self.all()


@dataclass(frozen=True)
class Knowing:
    """Predicts the sum of the letters, and is unsure of words that begin with 0."""

    def fit(self, candidates: Any, targets: Any, seed: int) -> "Knowing":
        return self

    def predict(self, candidates: list[Tensor]) -> tuple[Tensor, Tensor]:
        letters = torch.stack(candidates).argmax(-1)
        return letters.sum(1).double(), (letters[:, 0] == 0).double()


def history(space: ListedWords, words: list[Any]) -> History[Any]:
    trials = [Trial(i, 0, space.key(w), w, 1, "random", {}, (0, 0)) for i, w in enumerate(words)]
    return History([Record(trial, rugged(trial.candidate), {}, None) for trial in trials])


def test_expected_improvement_is_the_mean_of_what_is_gained() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([0.0, 1.0, -2.0, 0.3]), torch.tensor([1.0, 0.5, 2.0, 0.1])
    draws = mean + deviation * torch.randn(400_000, 4, generator=generator, dtype=torch.float64)
    sampled = (0.2 - draws).clamp(min=0).mean(0)
    assert torch.allclose(expected_improvement(mean, deviation, 0.2), sampled, atol=0.01)
    # at its own mean a candidate of deviation 1 gains 1/√(2π)
    assert float(expected_improvement(torch.zeros(1), torch.ones(1), 0.0)) == pytest.approx(1 / math.sqrt(2 * math.pi))
    certain = expected_improvement(torch.tensor([1.0, -1.0]), torch.zeros(2), 0.0)
    assert certain.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("acquisition", "first"), [("mean", (0, 0, 0, 1)), ("ucb", (0, 0, 0, 1)), ("ei", (0, 0, 0, 1))]
)
def test_rounds_measure_the_best_of_all_that_is_left(acquisition: str, first: tuple[int, ...]) -> None:
    space = ListedWords()
    measured = [w for w in space.all() if w.letters[0] == 2 or sum(w.letters) == 0][:20]
    problem, past = Problem(space, 0), history(space, measured)
    strategy = AcquisitionSearch(Knowing(), acquisition, kappa=2.0, random=20, round_size=6)
    asked = strategy.ask(problem, past)
    assert [p.source for p in asked] == [PREDICTED] * 6
    assert asked[0].candidate.letters == first
    assert not {space.key(p.candidate) for p in asked} & past.keys()
    sums = [sum(p.candidate.letters) for p in asked]
    starts = {p.candidate.letters[0] for p in asked}
    if acquisition == "mean":
        assert max(sums) <= min(sum(w.letters) for w in space.all() if w not in measured and w not in {
            p.candidate for p in asked})  # fmt: skip
    else:
        assert starts == {0}, "only these are unsure"
    assert asked == strategy.ask(problem, past)


def test_it_begins_at_random_keeps_limits_and_ends_when_all_is_measured() -> None:
    space, strategy = ListedWords(), AcquisitionSearch(Knowing(), "mean", random=20, round_size=100)
    begin = strategy.ask(Problem(space, 3), History())
    assert len(begin) == 20 and {p.source for p in begin} == {"random"}
    limited = Problem(space, 3, cost_limits={"sum": 3.0})
    words = [p.candidate for p in strategy.ask(limited, History())]
    left = strategy.ask(limited, history(space, words))
    allowed = {w for w in space.all() if sum(w.letters) <= 3}
    assert {p.candidate for p in left} | set(words) == allowed
    assert strategy.ask(limited, history(space, sorted(allowed, key=str))) == []


def test_what_does_not_fit_is_named() -> None:
    for options, message in [
        ({"acquisition": "best"}, "strategy.acquisition = 'best'"),
        ({"random": 1}, "strategy.random = 1"),
        ({"round_size": 0}, "strategy.round_size = 0"),
        ({"kappa": -1.0}, "strategy.kappa = -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            AcquisitionSearch(**options)
    with pytest.raises(UserError, match="WordSpace cannot be listed"):
        AcquisitionSearch().ask(Problem(WordSpace(), 0), History())
