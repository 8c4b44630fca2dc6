"""Zero-cost indicators: numbers that one batch gives about a network before it is trained, for ranking architectures.

indicators(network, images, labels, functional.cross_entropy, ("snip", "synflow", "parameters"))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genlight.predictors.zero_cost_activations import nwot, zen
from genlight.predictors.zero_cost_gradients import grasp, jacobian, loss_gradients, synflow
from genlight.predictors.zero_cost_probe import Probe, layers, seeded
from genlight.reports.cost import count_macs
from genlight.reports.latency import measure_latency


def indicators(
    network: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    targets: Any,
    loss: Callable[[Tensor, Any], Tensor],
    names: Sequence[str],
    seed: int = 0,
) -> dict[str, float]:
    """Indicators of a network on one batch, which stays as it is: weights, buffers, gradients, flags, random state.

    Args:
        network: has 2D convolutions or linear layers; with a tuple or a `ModelOutput`, its first entry counts.
        inputs: its argument [B, ...], or all of its arguments.
        targets: second argument of the loss. A vector of integers [B] is taken for classes, which epe_nas needs.
        loss: (output, targets) to a scalar.
        names: see `measure`.
        seed: of dropout and noise.

    Raises:
        ValueError: as `measure`.
    """
    duplicate = copy.deepcopy(network)
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    classes = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()

    def value() -> Tensor:
        output = duplicate(*args)
        return loss(output if isinstance(output, Tensor) else output[0], targets)

    return measure(Probe(duplicate, args, value, labels=targets if classes else None), names, seed)


def measure(probe: Probe, names: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Indicators by name. Batch normalisation and dropout work as in training, where it is not said otherwise.

    Each is a function of network, batch and seed, whatever else is asked for; only latency is not.

    Args:
        probe: network and batch; the network is used up, see `Probe`.
        names: of `NAMES`.
        seed: torch's generators start from it for every indicator, and are put back afterwards.

    Returns:
        values in the order of `names`. One that does not exist (a singular kernel, a number that is not finite, no
        input to differentiate by, no classes) is NaN.

    Raises:
        ValueError: an unknown name, or a network without 2D convolutions and linear layers.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"names: {', '.join(map(repr, unknown))} must be among {', '.join(NAMES)}")
    found = layers(probe.network)
    if not found:
        raise ValueError(f"network: a {type(probe.network).__name__} has no 2D convolution and no linear layer")
    for layer in found:
        layer.weight.requires_grad_(True)
    values: dict[str, float] = {}
    for group, function in _GROUPS:
        if set(group) & set(names):
            probe.network.train()
            with seeded(seed, probe.device), torch.enable_grad():
                values |= function(probe)
    return {name: values[name] if math.isfinite(values[name]) else math.nan for name in names}


def _sizes(probe: Probe) -> dict[str, float]:
    """l2_norm: sum over layers of |W|_2. parameters: how many numbers, trainable or not."""
    return {
        "l2_norm": sum(float(layer.weight.detach().norm()) for layer in layers(probe.network)),
        "parameters": float(sum(parameter.numel() for parameter in probe.network.parameters())),
    }


def _flops(probe: Probe) -> dict[str, float]:
    """flops: multiply-accumulates for one sample, see `count_macs`."""
    return {"flops": count_macs(probe.network, *probe.args, **probe.kwargs) / probe.batch_size}


def _latency(probe: Probe) -> dict[str, float]:
    """latency: median milliseconds of one call for the batch, in evaluation mode."""
    network = probe.network.eval()
    return {"latency": measure_latency(lambda: network(*probe.args, **probe.kwargs), probe.device).median_ms}


_GROUPS: tuple[tuple[tuple[str, ...], Callable[[Probe], dict[str, float]]], ...] = (
    (("grad_norm", "snip", "plain", "fisher"), loss_gradients),
    (("grasp",), grasp),
    (("jacov", "epe_nas"), jacobian),
    (("synflow",), synflow),
    (("nwot",), nwot),
    (("zen",), zen),
    (("l2_norm", "parameters"), _sizes),
    (("flops",), _flops),
    (("latency",), _latency),
)
NAMES = tuple(name for group, _ in _GROUPS for name in group)
