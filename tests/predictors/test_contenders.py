"""Each contender is the predictor that its name says, on the rows that it is given and on nothing else."""

import itertools

import pytest
import torch
from torch import Tensor

from genlight.predictors.contenders import FUSIONS, NAMES, SAVABLE, Contenders
from genlight.predictors.expert_heads import ExpertScorePredictor, FusionPredictor
from genlight.predictors.expert_training import ExpertTraining, pretrain
from genlight.predictors.experts import ExpertSettings
from genlight.predictors.feature_heads import LowFidelityPredictor
from genlight.predictors.pool import Pool, Standardiser

TOKENS = torch.tensor(list(itertools.product(range(3), repeat=4)))
TARGET = (TOKENS * torch.tensor([3.0, 2.0, 1.0, 0.3])).sum(1)
ROWS = torch.arange(0, 81, 4)


@pytest.fixture(scope="module")
def contenders() -> Contenders:
    generator = torch.Generator().manual_seed(0)
    scores = TARGET[:, None] + 2 * torch.randn(81, 3, generator=generator)
    scores[5, 1] = torch.nan
    pool = Pool(TOKENS[:60], (3,) * 4, scores[:60], ("a", "b", "c"))
    training = ExpertTraining(pretrain_steps=40, finetune_steps=15, batch_size=32)
    network = pretrain(ExpertSettings(width=12, depth=1), training, pool, 0)
    return Contenders(network, pool, TOKENS, scores, training)


def equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_rows_that_are_given_count(name: str, contenders: Contenders) -> None:
    wanted = torch.arange(60, 81)
    mean, deviation = contenders.fit(name, ROWS, TARGET[ROWS], 1)(wanted)
    assert mean.shape == deviation.shape == (21,) and bool((deviation >= 0).all())
    again = contenders.fit(name, ROWS, TARGET[ROWS], 1)(wanted.flip(0))
    assert torch.allclose(again[0].flip(0), mean, atol=1e-5)
    # the order of the targets is learned: predictions of the labelled rows follow it
    own = contenders.fit(name, ROWS, TARGET[ROWS], 1)(ROWS)[0].double()
    assert float(torch.corrcoef(torch.stack([own, TARGET[ROWS].double()]))[0, 1]) > 0.5


def test_names_mean_what_they_say(contenders: Contenders) -> None:
    wanted, known = torch.arange(60, 81), (TOKENS[ROWS], TARGET[ROWS])
    experts = ExpertScorePredictor(contenders.network, contenders.pool, "gp").fit(*known)
    found = contenders.fit("expert_gp", ROWS, TARGET[ROWS])(wanted)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, experts.predict(TOKENS[wanted])))
    scale = Standardiser.of(contenders.pool.low_fidelity)
    plain = LowFidelityPredictor(scale, "ridge").fit(contenders.low_fidelity[ROWS], TARGET[ROWS])
    found = contenders.fit("scores_ridge", ROWS, TARGET[ROWS])(wanted)
    assert equal(found, plain.predict(contenders.low_fidelity[wanted]))
    fused = FusionPredictor((contenders.network,), contenders.pool, contenders.training).fit(*known, 2)
    assert equal(contenders.fit("dele", ROWS, TARGET[ROWS], 2)(wanted), fused.predict(TOKENS[wanted]))


def test_fusions_begin_with_the_experts_or_with_one_that_nothing_trained(contenders: Contenders) -> None:
    expected = contenders.network.expert_scores(TOKENS)
    for name in ("dele", "static_gate"):
        assert torch.equal(contenders.fused(name).expert_scores(TOKENS), expected)
    weights = contenders.fused("static_gate")(TOKENS).weights
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3))
    assert contenders.fused("vanilla", 1).num_experts == 1
    one, two = (contenders.fused("vanilla", seed).expert_scores(TOKENS) for seed in (1, 2))
    assert not torch.equal(one, two)


def test_the_second_step_begins_with_the_experts_and_a_new_gate(contenders: Contenders) -> None:
    begun = contenders.begun(ROWS, TARGET[ROWS], 2)
    assert torch.equal(begun.expert_scores(TOKENS), contenders.network.expert_scores(TOKENS))
    assert not torch.equal(begun(TOKENS).weights, contenders.network(TOKENS).weights)
    again = Contenders(begun, contenders.pool, TOKENS, contenders.low_fidelity, contenders.training)
    assert equal(again.fit("dele", ROWS, TARGET[ROWS], 2)(ROWS), contenders.fit("dele", ROWS, TARGET[ROWS], 2)(ROWS))


@pytest.mark.parametrize("name", SAVABLE)
def test_what_is_saved_predicts_the_same(name: str, contenders: Contenders) -> None:
    wanted = torch.arange(60, 81)
    trained = contenders.trained(name, ROWS, TARGET[ROWS], 3)
    expected = contenders.fit(name, ROWS, TARGET[ROWS], 3)(wanted)
    found = trained.fitted().predict(TOKENS[wanted])
    if name != "expert_forest":  # its seed is not kept
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))
    assert trained.names == (() if name == "vanilla" else ("a", "b", "c"))
    assert (trained.head == "fusion") == (name in FUSIONS)


def test_an_unknown_name_and_equal_targets_are_refused(contenders: Contenders) -> None:
    with pytest.raises(ValueError, match="predictor = 'gp' must be one of dele"):
        contenders.fit("gp", ROWS, TARGET[ROWS])
    with pytest.raises(ValueError, match="different"):
        contenders.fit("dele", ROWS, torch.zeros(len(ROWS)))
