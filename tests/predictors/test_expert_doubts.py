"""Experts that say nothing of the labels, and a gate that is decided before it has learned, are named."""

import torch

from genlight.predictors.expert_doubts import expert_doubts
from genlight.predictors.experts import ExpertEnsemble, ExpertSettings

NAMES = ("params", "noise", "worse")
TRUTH = torch.arange(12.0)


class Known(ExpertEnsemble):
    """Experts whose scores stand among the tokens, and a gate that is zero times so much."""

    def __init__(self, sharpness: float = 0.0) -> None:
        super().__init__(ExpertSettings(width=4, depth=1, gate="static"), (0,) * 3, 3)
        self.gate.logits.data = sharpness * torch.arange(3.0)

    def expert_scores(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.T


def test_an_expert_without_a_word_on_the_labels_is_named() -> None:
    """One that orders them the other way round says as much as one that orders them."""
    alternating = torch.tensor([6.0, 7, 5, 8, 4, 9, 3, 10, 2, 11, 1, 12])  # tau 6/66
    scores = torch.stack([TRUTH, alternating, -TRUTH], dim=1)
    (doubt,) = expert_doubts(Known(), NAMES, scores, TRUTH)
    # of 12 independent orders: sqrt(2 * 29 / (9 * 12 * 11))
    assert doubt.startswith("experts that say next to nothing of the 12 true scores") and "±0.22" in doubt
    assert doubt.endswith("): noise 0.09")
    assert not expert_doubts(Known(), NAMES, scores[:, [0, 0, 2]], TRUTH)


def test_a_gate_that_begins_decided_is_named() -> None:
    scores = TRUTH[:, None].expand(12, 3)
    assert not expert_doubts(Known(2.0), NAMES, scores, TRUTH)
    (doubt,) = expert_doubts(Known(6.0), NAMES, scores, TRUTH)
    assert doubt.startswith("the gate begins with 1.6% of the entropy")


def test_a_gate_of_large_numbers_begins_decided() -> None:
    """As the networks come; with categories, or numbers of a usual size, it begins near equal weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.rand(12, 3, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ExpertEnsemble(ExpertSettings(width=8, depth=1), (0,) * 3, 3).eval()
    said = [" ".join(expert_doubts(network, NAMES, scale * tokens, TRUTH)) for scale in (1.0, 1e4)]
    assert ["entropy" in each for each in said] == [False, True]


def test_nothing_is_said_of_what_nothing_pretrained() -> None:
    network = ExpertEnsemble(ExpertSettings(width=4, depth=1), (3,) * 3, 1)
    tokens = torch.zeros(12, 3, dtype=torch.long)
    assert not expert_doubts(network, (), tokens, TRUTH)
    # of a single expert the gate cannot be other than decided
    assert "entropy" not in " ".join(expert_doubts(network, ("params",), tokens, TRUTH))
