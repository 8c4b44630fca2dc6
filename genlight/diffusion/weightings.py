"""Weights of the training loss over time.

A weighting gives the factor w of the squared error in the network's own prediction space, so that the training loss
is mean(w ‖m̂ - m‖²). Losses are compared in the space of the data: an error δm of the network is an error
g_x δm of x_0 and g_ε δm of ε (`prediction.gains`), so that a weight W of ‖x̂_0 - x_0‖² is W g_x² in the space of m,
and SNR g_x² = g_ε². Written with both gains the weights stay exact where the SNR is zero or infinite.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from genlight.diffusion.prediction import Prediction


class Weighting(ABC):
    """Per-sample weights of the squared error of a network."""

    @abstractmethod
    def weight(self, prediction: Prediction, t: Tensor) -> Tensor:
        """Weights in the shape of the times `t` (of `prediction.schedule`), float64."""


class Uniform(Weighting):
    """Weight 1 in the network's own space: the "simple" loss of Ho et al. 2020 for epsilon."""

    def weight(self, prediction: Prediction, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


class MinSNR(Weighting):
    """min(SNR, γ) on the squared error of x_0 (Hang et al. 2023, equation 8), whatever the network predicts.

    In the network's space: min(1, γ/SNR) for epsilon, min(SNR, γ)/(SNR + 1) for v_prediction, min(SNR, γ) for sample.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not 0 < gamma < math.inf:
            raise ValueError(f"loss_weighting.gamma = {gamma} must be positive")
        self.gamma = float(gamma)

    def weight(self, prediction: Prediction, t: Tensor) -> Tensor:
        data_gain, noise_gain = prediction.gains(t)
        return torch.minimum(noise_gain**2, self.gamma * data_gain**2)


class EDMWeighting(Weighting):
    """(σ² + sigma_data²)/(σ sigma_data)² on the squared error of x_0 (Karras et al. 2022, table 1), σ being σ/α.

    With the "edm" prediction of equal sigma_data the weight is 1. It grows without bound as α → 0 for epsilon and as
    σ → 0 for sample.

    Args:
        sigma_data: standard deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"loss_weighting.sigma_data = {sigma_data} must be positive")
        self.sigma_data = float(sigma_data)

    def weight(self, prediction: Prediction, t: Tensor) -> Tensor:
        data_gain, noise_gain = prediction.gains(t)
        return noise_gain**2 + (data_gain / self.sigma_data) ** 2
