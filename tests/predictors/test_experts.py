"""The gate weighs, the losses order, and nothing leaks from where it should not."""

import copy
import math
from typing import Any

import pytest
import torch
from predictors.toy_pool import VOCABULARY, toy

from genlight.predictors.expert_training import ExpertTraining, finetune, pretrain
from genlight.predictors.experts import ExpertEnsemble, ExpertSettings, scorer
from genlight.predictors.losses import kendall_tau, sample_pairs

SMALL = ExpertSettings(width=8, depth=1)
SHORT = ExpertTraining(pretrain_steps=6, finetune_steps=6)


def network(experts: int = 3, settings: ExpertSettings = SMALL) -> ExpertEnsemble:
    torch.manual_seed(0)
    return ExpertEnsemble(settings, VOCABULARY, experts)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_the_score_is_the_weighted_sum_of_the_experts(gate: str) -> None:
    ensemble = network(settings=ExpertSettings(width=8, depth=1, gate=gate))
    tokens = toy()[0].tokens[:20]
    score, experts, weights = ensemble(tokens)
    assert experts.shape == weights.shape == (3, 20)
    assert torch.allclose(weights.sum(0), torch.ones(20)) and bool((weights > 0).all())
    assert torch.allclose(score, (weights * experts).sum(0))
    if gate == "static":
        assert torch.allclose(score, experts.mean(0), atol=1e-6)
    # all experts alike: the gate does not matter
    with torch.no_grad():
        for parameter in ensemble.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert torch.allclose(ensemble(tokens).score, ensemble.expert_scores(tokens)[0], atol=1e-6)


def test_equal_scores_cost_the_margin_and_training_puts_the_better_one_first() -> None:
    ensemble = network(1)
    tokens, better = torch.tensor([[0] * 5, [3] * 5]), torch.tensor([1.0, 2.0])
    with torch.no_grad():
        ensemble.experts.network[-1].weight.zero_()
        ensemble.experts.network[-1].bias.zero_()
    assert float(ensemble.fusion_loss(tokens, better).detach()) == pytest.approx(0.1)
    tuned = finetune(ensemble, ExpertTraining(0, 50), tokens, better, seed=0)
    low, high = tuned(tokens).score.tolist()
    assert high > low


def test_ties_and_missing_scores_leave_every_parameter_as_it_is() -> None:
    pool, _ = toy(2, 12)
    ensemble = network(2)
    scores = torch.stack([torch.ones(12), torch.full((12,), math.nan)], dim=1)
    losses = ensemble.expert_losses(pool.tokens, scores)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert all(not p.grad.any() for p in ensemble.experts.parameters() if p.grad is not None)


def test_the_first_step_leaves_the_gate_as_it_was_bit_for_bit() -> None:
    pool, _ = toy()
    before = pretrain(SMALL, ExpertTraining(0, 0), pool, seed=3)
    after = pretrain(SMALL, SHORT, pool, seed=3)
    assert equal(state(before.gate), state(after.gate))
    assert not equal(state(before.experts), state(after.experts))


def test_each_expert_learns_its_own_score() -> None:
    pool, _ = toy()
    ensemble = pretrain(ExpertSettings(width=32), ExpertTraining(150, 0, batch_size=128), pool, seed=0)
    with torch.no_grad():
        scores = ensemble.expert_scores(pool.tokens)
    for number, column in enumerate(pool.low_fidelity.T):
        own = kendall_tau(scores[number], column)
        assert own > 0.7
        assert all(own > kendall_tau(scores[other], column) for other in range(3) if other != number)


def test_both_steps_are_functions_of_their_arguments() -> None:
    pool, truth = toy()
    random = torch.get_rng_state()
    first, second = (pretrain(SMALL, SHORT, pool, seed=1) for _ in range(2))
    assert equal(state(first), state(second))
    tuned = [finetune(first, SHORT, pool.tokens[:20], truth[:20], seed) for seed in (5, 5, 6)]
    assert equal(state(tuned[0]), state(tuned[1])) and not equal(state(tuned[0]), state(tuned[2]))
    assert equal(state(first), state(second)), "fine-tuning works on a copy"
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_one_expert_is_a_network_trained_by_hand_first_on_one_score_then_on_labels(gate: str) -> None:
    pool, truth = toy(1)
    settings, training = ExpertSettings(width=8, depth=1, gate=gate), ExpertTraining(8, 8, batch_size=64)
    tuned = finetune(pretrain(settings, training, pool, seed=4), training, pool.tokens[:30], truth[:30], seed=7)
    torch.manual_seed(8)
    alone = scorer(settings, VOCABULARY, 1)
    for tokens, target, seed in ((pool.tokens, pool.low_fidelity[:, 0], 9), (pool.tokens[:30], truth[:30], 15)):
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam(alone.parameters(), lr=1e-3)
        size, order = min(64, len(tokens)), []
        for _ in range(8):
            order = order or list(torch.randperm(len(tokens))[: len(tokens) // size * size].split(size))
            rows = order.pop()
            first, second, signs = (side[0] for side in sample_pairs(target[rows][None], 4 * size))
            scores = alone(tokens[rows])[:, 0]
            loss = (0.1 - signs * (scores[first] - scores[second])).clamp(min=0)[signs != 0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        result = tuned(pool.tokens)
        assert bool((result.weights == 1).all())
        assert torch.allclose(result.score, alone(pool.tokens)[:, 0], atol=1e-6)


def test_a_static_gate_goes_where_the_loss_sends_it() -> None:
    pool, truth = toy()
    ensemble = network(settings=ExpertSettings(width=8, depth=1, gate="static"))
    tuned = finetune(ensemble, ExpertTraining(0, 30), pool.tokens[:40], truth[:40], 0)
    weights = tuned(pool.tokens).weights
    assert bool((weights == weights[:, :1]).all()) and weights[:, 0].std() > 0


@pytest.mark.parametrize(
    "settings", [{"encoder": "gru"}, {"gate": "hard"}, {"width": 0}, {"dropout": 1.0}, {"head": [0]}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ExpertSettings(**settings)
    with pytest.raises(ValueError, match="experts = 0"):
        ExpertEnsemble(SMALL, VOCABULARY, 0)
