"""The encoders are what torch's own layers give, one network at a time and stacked."""

import copy

import pytest
import torch
from torch import nn

from genlight.predictors.experts import ExpertSettings, scorer
from genlight.predictors.gates import GATES
from genlight.predictors.stacked import Stacked
from genlight.predictors.token_encoders import OneHotMLP, TokenLSTM

MIXED = (3, 5, 2, 4)
CELL = (5,) * 6


def tokens(vocabulary: tuple[int, ...], count: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in vocabulary], dim=1)


@pytest.mark.parametrize("vocabulary", [MIXED, CELL])
def test_the_lstm_is_torchs(vocabulary: tuple[int, ...]) -> None:
    encoder = TokenLSTM(vocabulary, 7, 9)
    oracle = nn.LSTM(7, 9, batch_first=True)
    oracle.load_state_dict(
        {
            "weight_ih_l0": encoder.inputs.weight,
            "bias_ih_l0": encoder.inputs.bias,
            "weight_hh_l0": encoder.recurrent.weight,
            "bias_hh_l0": encoder.recurrent.bias,
        }
    )
    given = tokens(vocabulary)
    rows = given if len(set(vocabulary)) == 1 else given + torch.tensor([0, 3, 8, 10])
    with torch.no_grad():
        expected = oracle(encoder.table.weight[rows])[1][0][0]
        assert torch.allclose(encoder(given), expected, atol=1e-6)


def test_the_mlp_reads_one_hot_tokens_side_by_side() -> None:
    encoder, given = OneHotMLP(MIXED, 6, 2), tokens(MIXED)
    one_hot = torch.zeros(len(given), sum(MIXED))
    for row, values in enumerate(given.tolist()):
        for start, value in zip((0, 3, 8, 10), values):
            one_hot[row, start + value] = 1
    expected = encoder.layers[1](encoder.layers[0](one_hot).relu()).relu()
    assert torch.allclose(encoder(given), expected, atol=1e-6)


def gates_by_hand(network: GATES, operations: list[int]) -> torch.Tensor:
    """One cell, one edge after the other."""
    states = [network.start] + [torch.zeros_like(network.start)] * 3
    for layer, (weight, gate) in enumerate(zip(network.weights, network.gates)):
        if layer:
            states = [state.relu() for state in states]
        projected = [state @ weight for state in states]
        states = [projected[0]] + [torch.zeros_like(network.start) for _ in range(3)]
        for (source, target), operation in zip(network.edges, operations):
            if operation:
                states[target] = states[target] + gate(network.operations[operation]).sigmoid() * projected[source]
    return states[-1]


def test_gates_passes_information_along_edges_that_carry_an_operation() -> None:
    torch.manual_seed(0)
    network, given = GATES(CELL, 6, 8, 4), tokens(CELL)
    expected = torch.stack([gates_by_hand(network, row) for row in given.tolist()])
    assert torch.allclose(network(given), expected, atol=1e-5)
    # node 1 leads nowhere: what leads to it does not matter. No edge to the output: nothing arrives
    dead = torch.tensor([[operation, 3, 0, 2, 0, 1] for operation in range(5)])
    assert torch.allclose(network(dead), network(dead[:1]).expand(5, -1))
    assert not network(torch.tensor([[1, 2, 3, 0, 0, 0]])).any()
    with pytest.raises(ValueError, match="depth = 2 must be at least 3"):
        GATES(CELL, 6, 8, 2)
    with pytest.raises(ValueError, match="each of 6 edges"):
        GATES(MIXED, 6, 8, 4)


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "transformer", "gates"])
def test_stacked_networks_are_separate_ones(encoder: str) -> None:
    torch.manual_seed(0)
    settings = ExpertSettings(encoder, width=8, embedding=6, depth=3, head=(5,))
    given = tokens(CELL)
    networks = [scorer(settings, CELL, 2) for _ in range(3)]
    apart = copy.deepcopy(networks)
    stacked = Stacked(networks)
    assert sum(p.numel() for p in stacked.parameters()) == sum(p.numel() for n in apart for p in n.parameters())
    together = stacked(given)
    assert together.shape == (3, 11, 2)
    weights = torch.randn_like(together)
    (together * weights).sum().backward()
    for number, network in enumerate(apart):
        alone = network(given)
        assert torch.allclose(together[number], alone, atol=1e-6)
        (alone * weights[number]).sum().backward()
        for name, parameter in network.named_parameters():
            gradient = dict(stacked.network.named_parameters())[name].grad
            assert parameter.grad is not None and gradient is not None
            assert torch.allclose(gradient[number], parameter.grad, atol=1e-5), name


def test_dropout_is_drawn_for_each_network_and_not_in_evaluation() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Dropout(0.5), nn.Linear(20, 1))
    stacked = Stacked([copy.deepcopy(one) for _ in range(3)])
    inputs = torch.ones(4, 20)
    assert not torch.allclose(stacked(inputs)[0], stacked(inputs)[1])
    stacked.eval()
    assert torch.equal(stacked(inputs)[0], stacked(inputs)[1])
