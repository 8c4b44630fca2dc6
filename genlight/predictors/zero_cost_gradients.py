"""Zero-cost indicators from derivatives: of the loss by weights and activations, and of the outputs by the inputs.

The first ones follow Abdelfattah et al. 2021, with batch normalisation on the statistics of the batch.
Sums go over the weights of convolutions and linear layers, not over biases and normalisations.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from genlight.predictors.zero_cost_probe import Layer, Probe, layers

_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
_EPSILON = 1e-5
# with more classes the score of EPE-NAS compares classes instead of adding them up
_EPE_MANY_CLASSES = 100


def loss_gradients(probe: Probe) -> dict[str, float]:
    """Indicators of one backward pass with g = dL/dW.

    grad_norm: sum over layers of |g|_2. snip: sum of |W g| (Lee et al. 2019). plain: sum of W g. fisher (Theis et al.
    2018): with activations a, for each output channel half the mean over the batch of (sum over positions
    of a dL/da)², once for each weight of the channel. Counting a channel once is the other convention; the published
    table of NAS-Bench-201 was made with this one (rank correlation 0.974 on 100 cells, 0.903 with the other).
    """
    activations: list[tuple[Layer, Tensor]] = []

    def keep(layer: Layer, _: Any, output: Tensor) -> Tensor:
        activations.append((layer, output))
        return output.clone()  # what follows may work in place

    found = layers(probe.network)
    handles = [layer.register_forward_hook(keep) for layer in found]
    try:
        loss = probe.loss()
    finally:
        for handle in handles:
            handle.remove()
    outputs = [output for _, output in activations]
    gradients = _gradients(loss, [*(layer.weight for layer in found), *outputs])
    by_weight = list(zip((layer.weight.detach() for layer in found), gradients[: len(found)], strict=True))
    return {
        "grad_norm": sum(float(g.norm()) for _, g in by_weight),
        "snip": sum(float((w * g).abs().sum()) for w, g in by_weight),
        "plain": sum(float((w * g).sum()) for w, g in by_weight),
        "fisher": sum(
            _fisher(layer, a.detach(), g) for (layer, a), g in zip(activations, gradients[len(found) :], strict=True)
        ),
    }


def _fisher(layer: Layer, activation: Tensor, gradient: Tensor) -> float:
    product = activation * gradient
    if isinstance(layer, nn.Linear):
        product = product.movedim(-1, 1)
    channels = product.flatten(2).sum(2) if product.ndim > 2 else product
    return float(channels.square().mean(0).sum() / 2) * layer.weight[0].numel()


def _gradients(value: Tensor, wanted: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Derivatives of a scalar; 0 for what it does not depend on."""
    if not value.requires_grad:
        return [torch.zeros_like(each) for each in wanted]
    found = torch.autograd.grad(value, wanted, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(each) if g is None else g for each, g in zip(wanted, found, strict=True)]


def grasp(probe: Probe) -> dict[str, float]:
    """grasp: -sum of W (H g), with the Hessian H of the loss and its gradient g (Wang et al. 2020)."""
    weights: list[Tensor] = [layer.weight for layer in layers(probe.network)]
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        gradients = _gradients(probe.loss(), weights, create_graph=True)
        product = torch.stack([(g.detach() * g).sum() for g in gradients]).sum()
        curvature = _gradients(product, weights)
    return {"grasp": -sum(float((w.detach() * c).sum()) for w, c in zip(weights, curvature, strict=True))}


def synflow(probe: Probe) -> dict[str, float]:
    """synflow: log of the sum of |W dR/dW|, R the sum of the outputs for an input of ones (Tanaka et al. 2020).

    All parameters are replaced by their absolute values, normalisations are left out, dropout is off. In double
    precision, since the sum may exceed what single precision holds.
    """
    source = probe.source
    if source is None:
        return {"synflow": math.nan}
    network = copy.deepcopy(probe.network).double().eval()
    for parameter in network.parameters():
        parameter.data.abs_()
    for module in network.modules():
        if isinstance(module, _NORMALISATIONS):
            module.__dict__["forward"] = lambda x, *_, **__: x

    def change(value: Tensor) -> Tensor:
        if value is source:
            return torch.ones_like(value[:1], dtype=torch.float64)
        value = value[:1] if value.ndim and len(value) == probe.batch_size else value
        return value.double() if value.is_floating_point() else value

    weights: list[Tensor] = [layer.weight for layer in layers(network)]
    with sdpa_kernel(SDPBackend.MATH):  # the backward pass of fused attention fails on numbers of this size
        gradients = _gradients(probe.call(network, change).sum(), weights)
    total = sum(float((w.detach() * g).abs().sum()) for w, g in zip(weights, gradients, strict=True))
    return {"synflow": math.log(total) if total > 0 else math.nan}


def jacobian(probe: Probe) -> dict[str, float]:
    """Indicators of J [B, D], the derivative of the sum of the outputs by each input, and correlations of its rows.

    jacov: -sum of log(v + k) + 1 / (v + k) over the eigenvalues v of the correlations of all rows, k = 1e-5 (Mellor et
    al. 2020). epe_nas: with s_c the sum of log(|r| + k) over the correlations r of the rows of class c, sum of |s_c|;
    for more than 100 classes the s_c are divided by the rows of the class, and the score is the sum of |s_c - s_d| over
    ordered pairs, divided by the number of classes in the batch (Lopes et al. 2021). It needs labels, and outputs
    [B, classes].
    """
    source = probe.source
    if source is None:
        return {"jacov": math.nan, "epe_nas": math.nan}
    x = source.detach().clone().requires_grad_()
    output = probe.call(probe.network, lambda value: x if value is source else value)
    (gradient,) = _gradients(output.sum(), [x])
    rows = gradient.flatten(1).double().cpu()
    labels = probe.labels
    return {
        "jacov": _jacov(rows),
        "epe_nas": _epe_nas(rows, labels.cpu(), output.shape[1])
        if labels is not None and output.ndim == 2
        else math.nan,
    }


def _correlations(rows: Tensor) -> Tensor:
    """[B, D] to [B, B]; NaN for a row of equal numbers."""
    centred = rows - rows.mean(1, keepdim=True)
    scaled = centred / centred.norm(dim=1, keepdim=True)
    product: Tensor = scaled @ scaled.T
    return product


def _jacov(rows: Tensor) -> float:
    correlations = _correlations(rows)
    if not bool(correlations.isfinite().all()):
        return math.nan
    shifted = torch.linalg.eigvalsh(correlations) + _EPSILON
    return -float((shifted.log() + 1 / shifted).sum())


def _epe_nas(rows: Tensor, labels: Tensor, num_classes: int) -> float:
    many = num_classes > _EPE_MANY_CLASSES
    matrices = [_correlations(rows[labels == label]) for label in torch.unique(labels)]
    scores = torch.stack([(m.abs() + _EPSILON).log().sum() / (len(m) if many else 1) for m in matrices])
    if many:
        return float((scores[:, None] - scores[None]).abs().sum() / len(scores))
    return float(scores.abs().sum())
