"""Heads on experts: they order what they have not seen, and know nothing but what they were given."""

from dataclasses import replace

import pytest
import torch
from predictors.toy_pool import VOCABULARY, toy

from genlight.predictors.expert_heads import ExpertScorePredictor, FusionPredictor, all_scores
from genlight.predictors.expert_training import ExpertTraining, pretrain
from genlight.predictors.experts import ExpertEnsemble, ExpertSettings
from genlight.predictors.losses import kendall_tau
from genlight.predictors.pool import Pool

TRAINING = ExpertTraining(pretrain_steps=100, finetune_steps=100, batch_size=128)
SETTINGS = ExpertSettings(width=16, depth=1)
N = 20


@pytest.fixture(scope="module")
def trained() -> tuple[Pool, torch.Tensor, ExpertEnsemble]:
    pool, truth = toy()
    return pool, truth, pretrain(SETTINGS, TRAINING, pool, seed=0)


def test_pretrained_experts_order_better_than_labels_alone(trained: tuple[Pool, torch.Tensor, ExpertEnsemble]) -> None:
    pool, truth, network = trained
    nothing = Pool(pool.tokens, pool.vocabulary, pool.low_fidelity[:, :0], ())
    vanilla = FusionPredictor((pretrain(SETTINGS, TRAINING, nothing, seed=0),), nothing, TRAINING)
    tau = {}
    predictors = {"vanilla": vanilla, "dele": FusionPredictor((network,), pool, TRAINING)}
    predictors |= {head: ExpertScorePredictor(network, pool, head) for head in ("gp", "ridge", "forest")}
    for name, predictor in predictors.items():
        mean, deviation = predictor.fit(pool.tokens[:10], truth[:10], seed=0).predict(pool.tokens[10:])
        assert mean.shape == deviation.shape == (290,) and bool((deviation >= 0).all())
        tau[name] = kendall_tau(mean, truth[10:])
    assert all(tau[name] > tau["vanilla"] + 0.05 for name in tau if name != "vanilla"), tau


@pytest.mark.parametrize("kind", ["fusion", "gp", "ridge"])
def test_predictions_do_not_depend_on_company_or_repetition(
    kind: str, trained: tuple[Pool, torch.Tensor, ExpertEnsemble]
) -> None:
    pool, truth, network = trained
    dropping = pretrain(ExpertSettings(width=16, head=(16,), dropout=0.3), TRAINING, pool, seed=0)
    predictor = (
        FusionPredictor((dropping,), pool, TRAINING) if kind == "fusion" else ExpertScorePredictor(network, pool, kind)
    )
    fitted = predictor.fit(pool.tokens[:N], truth[:N], seed=0)
    whole = fitted.predict(pool.tokens)
    again, parts = fitted.predict(pool.tokens), [fitted.predict(rows) for rows in torch.split(pool.tokens, 37)]
    for part in range(2):
        assert torch.equal(whole[part], again[part])
        assert torch.allclose(whole[part], torch.cat([rows[part] for rows in parts]), atol=1e-5)


def test_the_order_of_the_targets_is_all_that_counts(trained: tuple[Pool, torch.Tensor, ExpertEnsemble]) -> None:
    pool, truth, network = trained
    for predictor in (FusionPredictor((network,), pool, TRAINING), ExpertScorePredictor(network, pool)):
        plain, bent = (predictor.fit(pool.tokens[:N], y[:N], seed=0).predict(pool.tokens) for y in (truth, truth.exp()))
        assert torch.equal(plain[0], bent[0]) and torch.equal(plain[1], bent[1])


def test_the_order_of_the_scores_changes_no_regression(trained: tuple[Pool, torch.Tensor, ExpertEnsemble]) -> None:
    pool, truth, network = trained
    turned = ExpertEnsemble(SETTINGS, VOCABULARY, 3)
    state = network.state_dict()
    turned.load_state_dict({k: v.flip(0) if k.startswith("experts.") else v for k, v in state.items()})
    assert torch.equal(all_scores(turned, pool.tokens)[1], all_scores(network, pool.tokens)[1].flip(0))
    a, b = (
        ExpertScorePredictor(n, pool).fit(pool.tokens[:N], truth[:N]).predict(pool.tokens)[0] for n in (network, turned)
    )
    assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("gate", ["dynamic", "static"])
def test_the_order_of_the_scores_changes_no_fusion(gate: str) -> None:
    """Of a given gate; a static one begins with equal weights, so that training keeps what it is."""
    pool, truth = toy()
    settings = replace(SETTINGS, gate=gate)
    network = pretrain(settings, ExpertTraining(20, 0), pool, seed=0)
    turned = ExpertEnsemble(settings, VOCABULARY, 3)
    last = ("gate.logits", "gate.1.weight", "gate.1.bias")  # one entry for each expert
    state = network.state_dict()
    turned.load_state_dict({k: v.flip(0) if k.startswith("experts.") or k in last else v for k, v in state.items()})
    with torch.no_grad():
        one, other = network(pool.tokens), turned.eval()(pool.tokens)
    assert torch.allclose(one.score, other.score, atol=1e-6)
    assert torch.allclose(one.weights, other.weights.flip(0), atol=1e-6)
    if gate == "static":
        a, b = (
            FusionPredictor((n,), pool, ExpertTraining(0, 10)).fit(pool.tokens[:N], truth[:N], 0).predict(pool.tokens)
            for n in (network, turned)
        )
        assert torch.allclose(a[0], b[0], atol=1e-3) and torch.allclose(a[1], b[1], atol=1e-3)


def test_the_fused_scale_is_that_of_the_pool_and_networks_that_differ_are_unsure() -> None:
    pool, truth = toy(1)
    networks = tuple(pretrain(SETTINGS, ExpertTraining(20, 0), pool, seed) for seed in range(3))
    one = FusionPredictor(networks[:1], pool, TRAINING).fit(pool.tokens[:N], truth[:N], 0).predict(pool.tokens)
    assert float(one[0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(one[0].std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert float(one[1].max()) == pytest.approx(0, abs=1e-6), "one network with one expert is always sure"
    three = FusionPredictor(networks, pool, TRAINING).fit(pool.tokens[:N], truth[:N], 0).predict(pool.tokens)
    assert float(three[1].min()) > 0


def test_autocast_does_not_round_predictions(trained: tuple[Pool, torch.Tensor, ExpertEnsemble]) -> None:
    pool, truth, network = trained
    for predictor in (FusionPredictor((network,), pool, TRAINING), ExpertScorePredictor(network, pool)):
        fitted = predictor.fit(pool.tokens[:N], truth[:N], seed=0)
        plain = fitted.predict(pool.tokens)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = fitted.predict(pool.tokens)
        assert torch.equal(plain[0], rounded[0]) and torch.equal(plain[1], rounded[1])


def test_bad_candidates_are_refused(trained: tuple[Pool, torch.Tensor, ExpertEnsemble]) -> None:
    pool, truth, network = trained
    fusion, regression = FusionPredictor((network,), pool, TRAINING), ExpertScorePredictor(network, pool, "svm")
    with pytest.raises(ValueError, match="token 0 of row 0 is 9"):
        fusion.fit(torch.full((2, 5), 9), truth[:2], 0)
    with pytest.raises(ValueError, match="two different targets"):
        fusion.fit(pool.tokens[:3], torch.ones(3), 0)
    with pytest.raises(ValueError, match="head = 'svm'"):
        regression.fit(pool.tokens[:3], truth[:3])
