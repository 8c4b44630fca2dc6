"""Zero-cost indicators from forward passes alone: binary codes of the activations, and sensitivity to noise."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from genlight.predictors.zero_cost_probe import Probe, layers

_aten = torch.ops.aten
# what bends at 0, as modules or as functions
_ACTIVATIONS = frozenset(
    getattr(_aten, name)
    for name in (
        *("relu", "relu_", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "elu", "elu_", "_prelu_kernel"),
        *("gelu", "silu", "silu_", "hardswish", "hardswish_"),
    )
)
_ZEN_STEP = 0.01


class _Agreement(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up over all activations how many signs of their inputs two samples share: `kernel` [B, B]."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernel = torch.zeros(batch_size, batch_size, dtype=torch.float64, device=device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _ACTIVATIONS and len(args[0]) == len(self.kernel):
            code = (args[0] > 0).flatten(1).float()
            ones = code.sum(1)
            # c cᵀ + (1 - c)(1 - c)ᵀ by one product; whole numbers, exact in single precision up to 2²⁴
            self.kernel += (2 * (code @ code.T) - ones[:, None] - ones[None] + code.shape[1]).double()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def nwot(probe: Probe) -> dict[str, float]:
    """nwot: log-determinant of the kernel of shared activation signs, summed over layers (Mellor et al. 2021).

    Counted are ReLU and its smooth relatives, by the sign of their input. NaN where the kernel is singular, as it is
    for two samples that no activation tells apart.
    """
    with _Agreement(probe.batch_size, probe.device) as agreement:
        probe.call(probe.network)
    sign, log_determinant = torch.linalg.slogdet(agreement.kernel)
    return {"nwot": float(log_determinant) if sign > 0 else math.nan}


@torch.no_grad()
def zen(probe: Probe) -> dict[str, float]:
    """zen: log of the mean over the batch of |f(x) - f(x + 0.01 e)|_1, plus for each batch normalisation the log of its
    standard deviation, the root of the mean variance of its channels (Lin et al. 2021, algorithm 1).

    x and e are Gaussian noise of the shape of the input, weights are Gaussian too, and f is what the last module gave
    that still has positions: the features before global pooling, or the output of a network without it.
    """
    source = probe.source
    if source is None:
        return {"zen": math.nan}
    network = copy.deepcopy(probe.network)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0  # running variance: that of the last batch
            module.reset_parameters()
    for layer in layers(network):
        nn.init.normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    x, e = torch.randn_like(source), torch.randn_like(source)
    features = _features(probe, network, x)
    deviations = [
        float(module.running_var.mean().sqrt().log())
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.running_var is not None
    ]
    moved = _features(probe, network, x + _ZEN_STEP * e)
    if features is None or moved is None:
        return {"zen": math.nan}
    difference = float((features - moved).abs().flatten(1).sum(1).mean())
    return {"zen": math.log(difference) + sum(deviations) if difference > 0 else math.nan}


def _features(probe: Probe, network: nn.Module, x: Tensor) -> Tensor | None:
    last: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim > 2 and output[0, 0].numel() > 1:
            last[:] = [output]

    source = probe.source
    handles = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        probe.call(network, lambda value: x if value is source else value)
    finally:
        for handle in handles:
            handle.remove()
    return last[0] if last else None
