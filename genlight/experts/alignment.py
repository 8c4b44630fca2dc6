"""Matching the neurons of one expert to those of another, so that their mean is not a mean of strangers."""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from genlight.experts.layer import ExpertLayer
from genlight.experts.mixing import neuron_features


@torch.no_grad()
def neuron_orders(layer: ExpertLayer, targets: Sequence[int]) -> Tensor:
    """Orders of neurons in which each expert is most like its target: weight matching, as M-SMoE does before merging.

    The order maximises Σ_n ⟨weights of neuron order[n], weights of the target's neuron n⟩ over gate, up and down
    (Li et al. 2023, arXiv:2310.01334, section 3.2; Ainsworth et al. 2022). Solved exactly: time grows with the cube of
    the number of neurons.

    Args:
        layer: without edits.
        targets: for each expert the one to match; itself for the order it has.

    Returns:
        int64 [E, I] on the CPU, for `LayerMaps.neuron_orders`.
    """
    orders = []
    for expert, target in enumerate(targets):
        own = _neurons(layer, expert)
        if expert == target:
            orders.append(torch.arange(len(own)))
            continue
        alike = _neurons(layer, target) @ own.T
        orders.append(torch.from_numpy(linear_sum_assignment(alike.cpu().numpy(), maximize=True)[1]))
    return torch.stack(orders)


def _neurons(layer: ExpertLayer, expert: int) -> Tensor:
    one = {name: tensor[expert : expert + 1] for name, tensor in layer.weights().items()}
    return neuron_features(layer.family.tensors, one)[0]
