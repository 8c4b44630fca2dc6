"""Combinations in place: the formula in float64, the two ends that are exact to the bit, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.stand_in import SHAPES, MemoryTrajectory, live_weights, random_trajectory
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from genlight.checkpoints import mixing
from genlight.checkpoints.bases import EMAProfiles, GeometricBins, Raw
from genlight.checkpoints.mixing import WeightMixer
from genlight.checkpoints.trajectory import StoredType, Trajectory
from genlight.checkpoints.writer import TrajectoryWriter
from genlight.io import CorruptFileError

BASES = {"raw": Raw(), "bins": GeometricBins(4), "ema": EMAProfiles(4)}
MEMORY = {"resident": None, "streamed": 0}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def oracle(trajectory: Any, weights: np.ndarray) -> dict[str, Tensor]:
    """Σ w_i θ_i in float64."""
    return {
        name: sum(float(w) * trajectory.read(i, name).double() for i, w in enumerate(weights))
        for name in trajectory.names
    }


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    members=st.integers(2, 12),
    basis=st.sampled_from(list(BASES)),
    memory=st.sampled_from(list(MEMORY)),
    size=st.floats(0.01, 4),
)
def test_mixing_equals_the_sum_in_float64(seed: int, members: int, basis: str, memory: str, size: float) -> None:
    trajectory = random_trajectory(members, seed, noise=0.1)
    live = live_weights(trajectory)
    mixer = WeightMixer(trajectory, live, basis=BASES[basis], device_bytes=MEMORY[memory])
    assert mixer.resident == (memory == "resident")
    alpha = size * np.random.default_rng(seed).normal(size=mixer.coordinates.size)
    mixer.mix(alpha)
    weights = mixer.coordinates.to_members(alpha)
    assert weights.sum() == pytest.approx(1, abs=1e-12 * max(1.0, np.abs(weights).sum()))
    for name, expected in oracle(trajectory, weights).items():
        torch.testing.assert_close(live[name].double(), expected, rtol=1e-6, atol=1e-6 * (1 + np.abs(weights).sum()))


@pytest.mark.parametrize("memory", MEMORY)
def test_zeros_are_the_newest_and_restore_is_exact(memory: str) -> None:
    trajectory = random_trajectory(6)
    trajectory.tensors[-1]["down.bias"][:2] = torch.tensor([-0.0, 0.0])
    live = {name: tensor.uniform_(-1, 1) for name, tensor in live_weights(trajectory).items()}
    before = {name: tensor.clone() for name, tensor in live.items()}
    mixer = WeightMixer(trajectory, live, device_bytes=MEMORY[memory])
    mixer.mix(np.full(5, 3.3))
    mixer.mix(np.zeros(5))
    for name in live:
        assert live[name].numpy().tobytes() == trajectory.read(5, name).numpy().tobytes()
    mixer.restore()
    for name in live:
        assert live[name].numpy().tobytes() == before[name].numpy().tobytes()


@settings(max_examples=20, deadline=None)
@given(alpha=st.lists(st.floats(-50, 50), min_size=3, max_size=3), memory=st.sampled_from(list(MEMORY)))
def test_equal_members_give_that_member_for_any_coefficients(alpha: list[float], memory: str) -> None:
    one = random_trajectory(1).tensors[0]
    trajectory = MemoryTrajectory([one] * 4)
    live = live_weights(trajectory)
    WeightMixer(trajectory, live, device_bytes=MEMORY[memory]).mix(np.array(alpha))
    assert all(torch.equal(live[name], one[name]) for name in one)


@pytest.mark.parametrize("memory", MEMORY)
def test_each_group_has_its_own_coefficients(memory: str) -> None:
    trajectory = random_trajectory(3)
    live = live_weights(trajectory)
    mixer = WeightMixer(trajectory, live, groups=("^up", ".*"), device_bytes=MEMORY[memory])
    mixer.mix(np.array([[1.0, 0.0], [0.0, 1.0]]))
    for name in live:
        torch.testing.assert_close(live[name], trajectory.read(0 if name.startswith("up") else 1, name))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("basis", BASES)
def test_the_gradient_is_that_of_the_loss(basis: str, memory: str) -> None:
    """For F = Σ c · θ, dF/dα is the difference of F between a step and none, as F is linear."""
    trajectory = random_trajectory(7)
    live = live_weights(trajectory)
    mixer = WeightMixer(trajectory, live, basis=BASES[basis], groups=("down", "up"), device_bytes=MEMORY[memory])
    slopes = {name: torch.randn(SHAPES[name]) for name in live}

    def loss(alpha: np.ndarray) -> float:
        mixer.mix(alpha)
        return float(sum((slopes[name].double() * live[name].double()).sum() for name in live))

    gradient = mixer.gradient(slopes)
    start = loss(np.zeros_like(gradient))
    for place in np.ndindex(gradient.shape):
        step = np.zeros_like(gradient)
        step[place] = 1.0
        assert gradient[place] == pytest.approx(loss(step) - start, abs=2e-5)
    with pytest.raises(ValueError, match=r"down\.bias"):
        mixer.gradient({name: slopes[name] for name in slopes if name != "down.bias"})


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("groups", [(".*",), ("down", "up")])
def test_weights_over_members_reach_beyond_the_basis(
    held: bool, groups: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightMixer, "_most_members_on", lambda self, device: 1 << 28 if held else 0)
    trajectory = random_trajectory(9)
    live = live_weights(trajectory)
    mixer = WeightMixer(trajectory, live, basis=GeometricBins(3), groups=groups)
    mixer.mix_members(np.eye(9)[2])
    for name in live:
        torch.testing.assert_close(live[name], trajectory.read(2, name), rtol=0, atol=1e-6)
    weights = np.random.default_rng(0).dirichlet(np.ones(9))
    mixer.mix_members(weights)
    for name, expected in oracle(trajectory, weights).items():
        torch.testing.assert_close(live[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert (mixer._member_differences is not None) == held
    numbers = sum(tensor.numel() for tensor in live.values())
    tight = WeightMixer(trajectory, live, basis=GeometricBins(3), device_bytes=4 * numbers * 9)
    assert tight.resident and tight._member_differences is None
    with pytest.raises(ValueError, match="sum to one"):
        mixer.mix_members(np.full(9, 0.2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_held_in_16_bits_only_the_differences_are_rounded(dtype: torch.dtype) -> None:
    trajectory = random_trajectory(5, noise=1e-3)
    live = live_weights(trajectory)
    exact = live_weights(trajectory)
    alpha = np.array([4.0, -3.0, 2.0, -2.5])
    WeightMixer(trajectory, live, dtype=dtype).mix(alpha)
    WeightMixer(trajectory, exact).mix(alpha)
    for name in live:
        assert (live[name] - exact[name]).abs().max() <= np.abs(alpha).sum() * 2**-8 * 6e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_parameters_are_mixed_to_their_last_column(dtype: torch.dtype) -> None:
    """More columns than are widened at once, in two groups that end within a block; 16 bits hold these differences."""
    size = 2 * mixing._CPU_BLOCK + 17
    newest = {name: torch.randint(-8, 8, (size,)).float() for name in ("a", "b")}
    tensors = [{name: t + torch.randint(-8, 8, (size,)) for name, t in newest.items()} for _ in range(3)]
    trajectory = MemoryTrajectory([*tensors, newest])
    live = live_weights(trajectory)
    mixer = WeightMixer(trajectory, live, groups=("a", "b"), dtype=dtype)
    alpha = np.array([[1.0, -2.0, 0.5], [0.0, 4.0, 0.25]])
    mixer.mix(alpha)
    weights = mixer.coordinates.to_members(alpha)
    for row, name in zip(weights, ("a", "b"), strict=True):
        assert torch.equal(live[name].double(), oracle(trajectory, row)[name])
    gradient = mixer.gradient({name: torch.ones(size) for name in live})
    sums = [[float(trajectory.read_difference(i, name).sum()) for i in range(3)] for name in ("a", "b")]
    assert gradient.tolist() == sums


def test_half_precision_weights_get_the_sum_rounded_once() -> None:
    trajectory = random_trajectory(5)
    live = {name: tensor.bfloat16() for name, tensor in live_weights(trajectory).items()}
    exact = live_weights(trajectory)
    alpha = np.array([4.0, -3.0, 2.0, -2.5])
    WeightMixer(trajectory, live).mix(alpha)
    WeightMixer(trajectory, exact).mix(alpha)
    assert all(torch.equal(live[name], exact[name].bfloat16()) for name in live)


def test_frozen_parameters_and_buffers_are_left_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    trajectory = MemoryTrajectory([{name: torch.randn(p.shape) for name, p in trained.items()} for _ in range(3)])
    others = {name: tensor.clone() for name, tensor in module.state_dict().items() if name not in trained}
    mixer = WeightMixer(trajectory, module)
    with torch.inference_mode():
        mixer.mix(np.array([1.0, 1.0]))
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in others.items())
    assert all(not torch.equal(p, trajectory.read(2, name)) for name, p in trained.items())
    # optimizers and graphs hold the tensors: they must be the same ones after mixing
    assert all(p is trained[name] for name, p in module.named_parameters() if name in trained)
    module(torch.randn(5, 3)).sum().backward()


def test_running_statistics_in_a_trajectory_are_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = {name: tensor for name, tensor in module.state_dict().items() if "num_batches" not in name}
    trajectory = MemoryTrajectory([state] * 2)
    with pytest.raises(ValueError, match=r"1\.running_mean"):
        WeightMixer(trajectory, module)


def test_a_foreign_network_is_refused_by_name() -> None:
    trajectory = random_trajectory(3)
    live = live_weights(trajectory)
    with pytest.raises(ValueError, match=r"down\.weight.*\[5, 3\].*\[3, 5\]"):
        WeightMixer(trajectory, live | {"down.weight": torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=r"up\.scale.*no parameter"):
        WeightMixer(trajectory, {name: live[name] for name in live if name != "up.scale"})
    mixer = WeightMixer(trajectory, live)
    for wrong in (np.zeros(3), np.zeros((2, 2)), np.array([np.nan, 0.0])):
        with pytest.raises(ValueError, match="coefficients"):
            mixer.mix(wrong)


def on_disk(folder: Path, members: int, dtype: StoredType = "float32") -> tuple[Trajectory, MemoryTrajectory]:
    source = random_trajectory(members, noise=0.1)
    writer = TrajectoryWriter(folder, source.shapes, {"run": "test"}, every_n_steps=10, dtype=dtype)
    for step, tensors in zip(source.steps, source.tensors, strict=True):
        writer.append(step, tensors)
    writer.close()
    return Trajectory.open(folder), source


@pytest.mark.parametrize("memory", MEMORY)
def test_files_are_mixed_as_memory_is(memory: str, tmp_path: Path) -> None:
    trajectory, source = on_disk(tmp_path, 6)
    alpha = np.random.default_rng(0).normal(size=5)
    mixed = []
    for each in (trajectory, source):
        mixed.append(live_weights(each))
        WeightMixer(each, mixed[-1], device_bytes=MEMORY[memory]).mix(alpha)
    assert all(torch.equal(mixed[0][name], mixed[1][name]) for name in mixed[0])


def test_stored_differences_are_mixed_as_they_are(tmp_path: Path) -> None:
    """The only error is that of the 16 bits of each difference: a relative 2⁻⁹, times Σ |α|."""
    trajectory, source = on_disk(tmp_path, 6, "bfloat16_difference")
    alpha = np.random.default_rng(0).normal(size=5)
    live, exact = live_weights(trajectory), live_weights(source)
    WeightMixer(trajectory, live).mix(alpha)
    WeightMixer(source, exact).mix(alpha)
    for name in live:
        largest = max(float(source.read_difference(i, name).abs().max()) for i in range(5))
        assert (live[name] - exact[name]).abs().max() <= 2**-9 * largest * np.abs(alpha).sum() + 1e-6
    WeightMixer(trajectory, live).mix(np.zeros(5))
    assert all(torch.equal(live[name], source.read(5, name)) for name in live)


def test_a_truncated_or_foreign_member_is_refused_by_name(tmp_path: Path) -> None:
    trajectory, _ = on_disk(tmp_path / "a", 4)
    victim = tmp_path / "a" / trajectory.members[1].file
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-5])
    with pytest.raises(CorruptFileError, match=victim.name):
        Trajectory.open(tmp_path / "a", check="names")
    # another training's file of the same step and shapes
    torch.manual_seed(1)
    other = TrajectoryWriter(tmp_path / "b", trajectory.shapes, {"run": "other"}, every_n_steps=10)
    other.append(trajectory.members[1].last_step, {n: torch.randn(s) for n, s in trajectory.shapes.items()})
    victim.write_bytes((tmp_path / "b" / Trajectory.open(tmp_path / "b").members[0].file).read_bytes())
    with pytest.raises(CorruptFileError, match=victim.name):
        Trajectory.open(tmp_path / "a", check="names")


@pytest.mark.parametrize("memory", MEMORY)
def test_the_effective_rank_counts_directions(memory: str) -> None:
    """Orthogonal differences of one length: their number. Differences along one line: 1."""
    basis = torch.linalg.qr(torch.randn(20, 20)).Q
    newest = torch.randn(20)
    spread = MemoryTrajectory([{"w": newest + basis[i]} for i in range(5)] + [{"w": newest}])
    line = MemoryTrajectory([{"w": newest + basis[0] * 0.9**i} for i in range(5)] + [{"w": newest}])
    same = MemoryTrajectory([{"w": newest}] * 3)
    ranks = []
    for trajectory in (spread, line, same):
        mixer = WeightMixer(trajectory, live_weights(trajectory), device_bytes=MEMORY[memory])
        ranks.append(mixer.effective_rank())
    assert ranks == pytest.approx([5, 1, 0], abs=1e-4)
