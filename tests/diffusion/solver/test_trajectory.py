"""Errors predicted from trajectories of a teacher against those of samples: equal on Gaussian data, else alike."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import network
from oracles.gaussian import GaussianMixture
from scipy.stats import kendalltau

from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.teacher import NetworkSampling
from genlight.diffusion.solver.trajectory import TeacherTrajectories
from genlight.errors import UserError
from genlight.search.spaces.solver_objective import TeacherObjective, make_teacher_bank, teacher_schedule

VP = VPSchedule()
PREDICTION = Prediction("epsilon", VP)
TEACHER = compile_schedule(teacher_schedule(VP), VP)
NAMES = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc_2_bh2", "unipc_3_bh2", "ipndm_3", "deis_3")
TABLES = [
    compile_schedule(named_schedule(name, VP, 6, spacing=spacing), VP)
    for name in NAMES
    for spacing in ("log_snr", "uniform", "edm")
]


def teacher(mixture: GaussianMixture, dimensions: int) -> tuple[NetworkSampling, TeacherObjective]:
    sampling = NetworkSampling(network(PREDICTION, mixture), PREDICTION)
    noise = torch.randn(48, dimensions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sampling, TeacherObjective(sampling, make_teacher_bank(sampling, noise))


def test_errors_on_gaussian_data_are_those_of_samples() -> None:
    """The network is linear with the Jacobian that is assumed; what is left is the interpolation in λ."""
    spread = torch.tensor([0.4], dtype=torch.float64)
    sampling, objective = teacher(GaussianMixture(torch.ones(1).double(), torch.full((1, 3), 0.2).double(), spread), 3)
    found = TeacherTrajectories.of(sampling, objective.bank, TEACHER, rows=48, groups=2)
    found = replace(found, spreads=torch.full((2,), 0.4, dtype=torch.float64))
    expected = objective.errors(TABLES).mean(1).sqrt().numpy()
    np.testing.assert_allclose([np.exp(found.log_errors(table)[0]) for table in TABLES], expected, rtol=0.02, atol=1e-5)
    assert np.exp(found.log_errors(TEACHER)).max() < 1e-6
    for table in TABLES[:3]:
        total, *groups = np.exp(2 * found.log_errors(table))
        assert total == pytest.approx(sum(groups))


def test_errors_on_a_mixture_go_with_those_of_samples() -> None:
    """Kendall's τ above 0.7 over hand-made schedules, from 16 of the 48 noises, whatever the number of dimensions."""
    means = torch.randn(6, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 0.5
    mixture = GaussianMixture(torch.full((6,), 1 / 6).double(), means, torch.linspace(0.42, 0.78, 6).double())
    sampling, objective = teacher(mixture, 16)
    found = TeacherTrajectories.of(sampling, objective.bank, TEACHER)
    assert (found.spreads.diff() < 0).all() and len(found.names) == 5
    predicted = [found.log_errors(table)[0] for table in TABLES]
    assert kendalltau(predicted, objective.errors(TABLES).mean(1)).statistic > 0.7


def test_they_come_back_from_their_file(tmp_path: Path) -> None:
    sampling, objective = teacher(
        GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.ones(1).double()), 2
    )
    found = replace(TeacherTrajectories.of(sampling, objective.bank, TEACHER), fingerprint="one")
    found.save(tmp_path / "t.safetensors")
    again = TeacherTrajectories.load(tmp_path / "t.safetensors", VP, TEACHER, "one")
    assert (again.log_errors(TABLES[0]) == found.log_errors(TABLES[0])).all()
    with pytest.raises(UserError, match="no trajectories of this teacher"):
        TeacherTrajectories.load(tmp_path / "t.safetensors", VP, TEACHER, "two")
