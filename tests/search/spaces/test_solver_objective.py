"""The paired teacher distance against its own definition, in any batch, with little memory, from a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import MIXTURE, network
from torch import Tensor

from genlight.diffusion.noise_schedules import FlowSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.levels import in_half_log_snr
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.sample import sample
from genlight.diffusion.solver.spacings import are_integers
from genlight.diffusion.solver.teacher import NetworkSampling, TeacherBank
from genlight.errors import UserError
from genlight.io import CorruptFileError, save_tensors
from genlight.search.evaluation import in_one_batch
from genlight.search.records import Trial
from genlight.search.spaces.solver_objective import (
    TeacherObjective,
    bank_fingerprint,
    make_teacher_bank,
    teacher_schedule,
)
from genlight.search.spaces.solver_schedule import SolverScheduleSpace

VP = VPSchedule()
PREDICTION = Prediction("epsilon", VP)
NOISE = torch.randn(24, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NAMES = ("ddim", "dpmpp_2m", "unipc_3_bh2", "heun", "ipndm_3")
SCHEDULES = [named_schedule(name, VP, 5) for name in NAMES]


class Counted:
    """The ideal network, with what it was asked, and memory for so many rows."""

    def __init__(self, memory: int = 10**9) -> None:
        self.inner, self.memory = network(PREDICTION), memory
        self.calls, self.rows, self.refused = 0, 0, 0

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        if len(x) > self.memory:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.inner(x, timestep)


@pytest.fixture(scope="module")
def bank() -> TeacherBank:
    return make_teacher_bank(NetworkSampling(Counted(), PREDICTION), NOISE)


def test_scores_are_rms_distances_to_the_teacher(bank: TeacherBank) -> None:
    teacher = sample(Counted(), NOISE, compile_schedule(teacher_schedule(VP), VP), PREDICTION)
    torch.testing.assert_close(bank.target, teacher, rtol=0, atol=1e-12)
    objective = TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank)
    for schedule in SCHEDULES:
        mine = sample(Counted(), NOISE[:16], compile_schedule(schedule, VP), PREDICTION)
        expected = (mine - teacher[:16]).square().mean().sqrt().item()
        assert objective.evaluate(schedule, 16).score == pytest.approx(expected, rel=1e-5)
        table = compile_schedule(schedule, VP)
        assert objective.evaluate(table, 16) == objective.evaluate(schedule, 16)
    torch.testing.assert_close(
        objective.errors(SCHEDULES[:1])[0],
        (sample(Counted(), NOISE, compile_schedule(SCHEDULES[0], VP), PREDICTION) - teacher).square()[:, 0],
    )


def test_the_teacher_is_near_the_exact_solution(bank: TeacherBank) -> None:
    level = VP.noise_level
    start = NOISE / VP.alpha(VP.t_max)
    exact = MIXTURE.solve_ode(start, level(VP.t_max), level(VP.t_min)) * VP.alpha(VP.t_min)
    teacher_error = (bank.target - exact).square().mean().sqrt().item()
    best = min(TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank).evaluate(s, 24).score for s in SCHEDULES)
    assert teacher_error < 0.02 * best


@pytest.mark.parametrize("end", ["t_min", "clean"])
def test_a_teacher_of_whole_times_has_each_once(bank: TeacherBank, end: Any) -> None:
    """At the clean end, whole times are wider apart than its even λ: a few evaluations fewer, and as near."""
    schedule = teacher_schedule(VP, end=end, integer_times=True)
    assert are_integers(schedule.times) and 90 < schedule.nfe < 100
    assert (schedule.times[0], schedule.times[-1]) == (VP.t_max, None if end == "clean" else VP.t_min)
    if end == "t_min":
        objective = TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank)
        assert objective.evaluate(schedule, 24).score < 0.02 * min(objective.evaluate(s, 24).score for s in SCHEDULES)


@pytest.mark.parametrize("max_rows", [1024, 50, 24, 7, 1])
def test_batches_equal_one_by_one(bank: TeacherBank, max_rows: int) -> None:
    together = TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank, max_rows=max_rows).evaluate_many(
        SCHEDULES, 24
    )
    alone = [
        TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank).evaluate(schedule, 24) for schedule in SCHEDULES
    ]
    assert together == alone


def test_first_evaluations_are_made_once(bank: TeacherBank) -> None:
    model = Counted()
    objective = TeacherObjective(NetworkSampling(model, PREDICTION), bank)
    objective.evaluate(SCHEDULES[1], 24)
    assert model.rows == 5 * 24
    objective.evaluate_many([SCHEDULES[1], named_schedule("dpmpp_2m", VP, 5, spacing="quadratic")], 24)
    assert model.rows == 5 * 24 + 24 + 2 * 4 * 24
    objective.evaluate(SCHEDULES[0], 8)
    assert model.rows == 5 * 24 + 24 + 2 * 4 * 24 + 4 * 8


def test_starts_of_one_candidate_are_not_kept(bank: TeacherBank) -> None:
    """Searched start times: each candidate costs its evaluations and no more, and nothing piles up."""
    model = Counted()
    objective = TeacherObjective(NetworkSampling(model, PREDICTION), bank)
    slack = SolverScheduleSpace(VP, 5, start_slack=2.0)
    rng = np.random.default_rng(0)
    moved = [slack.mutate(SCHEDULES[1], rng, size=0.5) for _ in range(40)]
    starts = {in_half_log_snr(schedule, VP).times[0] for schedule in moved}
    objective.evaluate_many(moved, 24)
    assert len(starts) > 2
    assert model.rows <= 5 * 24 * len(moved) + 4 * 24
    assert len(objective._first_outputs) <= 4


@pytest.mark.parametrize("memory", [60, 24, 10, 1])
def test_out_of_memory_halves_the_chunks(bank: TeacherBank, memory: int) -> None:
    model = Counted(memory)
    objective = TeacherObjective(NetworkSampling(model, PREDICTION), bank)
    expected = TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank).evaluate_many(SCHEDULES, 24)
    assert objective.evaluate_many(SCHEDULES, 24) == expected
    assert model.refused > 0 and 1 <= objective.max_rows <= memory
    refused = model.refused
    objective.evaluate_many(SCHEDULES, 24)
    assert model.refused == refused
    with pytest.raises(torch.OutOfMemoryError):
        TeacherObjective(NetworkSampling(Counted(0), PREDICTION), bank).evaluate(SCHEDULES[0], 24)


def test_conditions_follow_their_noises() -> None:
    """With labels of two networks, each noise is scored by its own."""
    inner = network(PREDICTION)

    def model(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        return inner(x, timestep) * torch.where(label == 1, 0.5, 1.0)[:, None]

    def halved(x: Tensor, timestep: Tensor) -> Tensor:
        return inner(x, timestep) * 0.5

    labels = torch.arange(24) % 2
    both = make_teacher_bank(NetworkSampling(model, PREDICTION), NOISE, conditions={"label": labels}, max_rows=7)
    found = TeacherObjective(NetworkSampling(model, PREDICTION), both, max_rows=31).errors(SCHEDULES)
    for plain, which in ((inner, 0), (halved, 1)):
        single = make_teacher_bank(NetworkSampling(plain, PREDICTION), NOISE)
        expected = TeacherObjective(NetworkSampling(plain, PREDICTION), single).errors(SCHEDULES)
        torch.testing.assert_close(found[:, labels == which], expected[:, labels == which])


def test_a_candidate_that_is_not_finite_fails_alone(bank: TeacherBank) -> None:
    table = compile_schedule(SCHEDULES[1], VP)
    huge = SolverTable(table.weights * 1e200, table.mean_weights, table.times, table.basis, table.initial_scale)
    found = TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank).evaluate_many([SCHEDULES[1], huge], 24)
    assert np.isfinite(found[0].score) and not np.isfinite(found[1].score)
    objective = TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank)
    evaluate: Any = in_one_batch(objective)  # type: ignore[arg-type]
    trials = [Trial(i, 0, str(i), c, 24, "", {}, (0, i)) for i, c in enumerate((SCHEDULES[1], huge))]
    outcomes = evaluate(trials)
    assert outcomes[0].score == found[0].score
    assert outcomes[1].failure.kind == "not_finite"


def test_banks_come_back_from_their_file(bank: TeacherBank, tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    bank.save(path)
    expected = bank_fingerprint(PREDICTION, NOISE, teacher_schedule(VP))
    again = TeacherBank.load(path, expected)
    assert torch.equal(again.target, bank.target) and torch.equal(again.noise, bank.noise) and not again.conditions
    assert again.fingerprint == expected
    label = torch.zeros(24, dtype=torch.int64)
    for other in (
        bank_fingerprint(PREDICTION, NOISE, teacher_schedule(VP), model_fingerprint="other weights"),
        bank_fingerprint(PREDICTION, NOISE + 1, teacher_schedule(VP)),
        bank_fingerprint(PREDICTION, NOISE, teacher_schedule(VP, 50)),
        bank_fingerprint(Prediction("sample", VP), NOISE, teacher_schedule(VP)),
        bank_fingerprint(PREDICTION, NOISE, teacher_schedule(VP), {"label": label}),
    ):
        assert other != expected
        with pytest.raises(UserError, match="other weights, noise, schedule or conditions"):
            TeacherBank.load(path, other)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptFileError):
        TeacherBank.load(path, expected)
    save_tensors(path, {"noise": NOISE, "target": NOISE}, {"kind": "another", "fingerprint": expected})
    with pytest.raises(UserError, match="is no teacher bank"):
        TeacherBank.load(path, expected)


def test_conditions_come_back_from_their_file(tmp_path: Path) -> None:
    conditions = {"label": torch.arange(24) % 2, "noise": torch.linspace(0.5, 1, 24)[:, None]}

    def model(x: Tensor, timestep: Tensor, *, label: Tensor, noise: Tensor) -> Tensor:
        return x * noise * (1 + label[:, None])

    bank, path = (
        make_teacher_bank(NetworkSampling(model, PREDICTION), NOISE, conditions=conditions),
        tmp_path / "teacher.safetensors",
    )
    assert bank.fingerprint == bank_fingerprint(PREDICTION, NOISE, teacher_schedule(VP), conditions)
    for other in ({"label": conditions["label"]}, {"labels": conditions["label"], "noise": conditions["noise"]}):
        assert bank.fingerprint != bank_fingerprint(PREDICTION, NOISE, teacher_schedule(VP), other)
    bank.save(path)
    again = TeacherBank.load(path, bank.fingerprint)
    assert again.conditions.keys() == conditions.keys()
    assert all(torch.equal(again.conditions[name], value) for name, value in conditions.items())
    assert all(again.conditions[name].dtype == value.dtype for name, value in conditions.items())
    assert torch.equal(again.noise, NOISE) and torch.equal(again.target, bank.target)
    # some rows are another bank: the fingerprint does not speak for them
    with pytest.raises(ValueError, match="fingerprint"):
        again.rows(slice(0, 3)).save(path)
    assert again.usable().fingerprint == bank.fingerprint


def test_images_of_any_rank_and_flow() -> None:
    flow = Prediction("flow", FlowSchedule())
    noise = torch.randn(4, 2, 3, 3)

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x) + timestep[:, None, None, None] / 1000

    bank = make_teacher_bank(NetworkSampling(model, flow), noise)
    space = SolverScheduleSpace(flow.schedule, 4)
    rng = np.random.default_rng(0)
    candidates = [space.sample(rng) for _ in range(6)]
    objective = TeacherObjective(NetworkSampling(model, flow), bank)
    assert objective.evaluate_many(candidates, 4) == [objective.evaluate(candidate, 4) for candidate in candidates]


def test_wrong_banks_are_named(bank: TeacherBank) -> None:
    with pytest.raises(ValueError, match="fidelity = 25: the bank has 1 to 24"):
        TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank).evaluate(SCHEDULES[0], 25)
    with pytest.raises(ValueError, match=r"noise \(24, 1\) and target \(3, 1\) need one shape"):
        TeacherBank(NOISE, NOISE[:3])
    for label, rows in ((torch.zeros(3), 3), (torch.zeros(()), 0)):
        with pytest.raises(ValueError, match=f"condition 'label' has {rows} rows for 24 noises"):
            TeacherBank(NOISE, NOISE, {"label": label})
    with pytest.raises(ValueError, match="not finite"):
        TeacherBank(NOISE, NOISE * float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        make_teacher_bank(NetworkSampling(lambda x, timestep: x * torch.nan, PREDICTION), NOISE)
    with pytest.raises(ValueError, match="max_rows"):
        TeacherObjective(NetworkSampling(Counted(), PREDICTION), bank, max_rows=0)
