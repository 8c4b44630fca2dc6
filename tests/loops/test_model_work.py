"""Parts of OMS-DPM without a command: a costs file checked, overhead, curves on disk, what a report doubts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loops.pair import Pair

from genlight.diffusion.error_curves import ErrorCurve
from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.errors import UserError
from genlight.io import CorruptFileError
from genlight.loops import model_curves, model_report
from genlight.loops.model_cost import costs_kept
from genlight.loops.model_costs import _overhead, wanted_key
from genlight.loops.model_curves import read_curves, write_curves
from genlight.loops.model_work import ModelWork
from genlight.modules.scheduled_denoiser import ScheduledDenoiser
from genlight.reports.member_costs import Latency, MemberCost, MemberCosts, read_begun_costs, write_costs
from genlight.search.protocols import Evaluation
from genlight.search.spaces.model_rules import large_first, sandwich, small_first
from genlight.search.spaces.model_schedule import ModelScheduleSpace

MODULE = SimpleNamespace(
    members={"a": None, "b": None}, sample_shape=(1, 8, 8), scheduled=SimpleNamespace(dtype=torch.float32)
)


def costs(rows: int, *names: str, unit: Any = "ms") -> MemberCosts:
    members = {name: MemberCost(10, 10, 40, Latency(5.0, 0.0, 20, 1)) for name in names}
    return MemberCosts(unit, members, 0.0, wanted_key(MODULE, rows, "cpu"))


def work(**settings: Any) -> ModelWork:
    method: Any = SimpleNamespace(**{"unit": "ms", "batch_size": None, "mode": "min", **settings})
    evaluations: Any = SimpleNamespace(trainer=SimpleNamespace(strategy=SimpleNamespace(root_device="cpu")))
    return ModelWork(method, evaluations, MODULE, SimpleNamespace(eval_batch_size=20))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (costs(10, "a", "b"), "batch_size = 10, but this run has 20"),
        (costs(20, "a", "b", unit="macs"), "is in macs, but method.unit = ms"),
        (costs(20, "a"), "has costs of a, but the members are a, b"),
        (costs(20, "a", "b", "c"), "has costs of a, b, c, but"),
    ],
)
def test_costs_of_something_else_are_refused(tmp_path: Path, given: MemberCosts, expected: str) -> None:
    write_costs(tmp_path / "latency.json", given)
    with pytest.raises(UserError, match=expected) as error:
        work()._given(str(tmp_path / "latency.json"))
    assert "\n" not in str(error.value)


def test_a_search_does_not_go_on_with_latencies_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    write_costs(file, costs(250, "a", "b"))
    with pytest.raises(UserError, match=r"the search began with .* batch_size = 250, but this run has 20.* run\.name"):
        read_begun_costs(file, wanted_key(MODULE, 20, "cpu"))
    for given in (
        costs(250, "a", "b", unit="macs"),
        replace(costs(20, "a"), key=replace(costs(20, "a").key, torch="1")),
    ):
        write_costs(file, given)
        assert read_begun_costs(file, wanted_key(MODULE, 20, "cpu")) == given


def test_costs_of_these_members_on_this_machine_are_taken(tmp_path: Path) -> None:
    given = costs(20, "b", "a")
    write_costs(tmp_path / "latency.json", given)
    assert work()._given(str(tmp_path / "latency.json")) == given


def test_the_time_of_a_batch_is_a_line_over_its_evaluations() -> None:
    """Three milliseconds for a batch, two for an evaluation of which the network takes one and a half."""
    found = _overhead(costs(20, "a"), {"a": 1.5, ("around", 1): 5.0, ("around", 4): 11.0}, "a")
    assert found.evaluation_ms == pytest.approx(0.5) and found.batch_ms == pytest.approx(3.0)
    # a network that took longer by itself takes nothing off
    found = _overhead(costs(20, "a"), {"a": 2.5, ("around", 1): 5.0, ("around", 4): 11.0}, "a")
    assert found.evaluation_ms == 0.0 and found.batch_ms == pytest.approx(2.5)


def test_what_is_judged_is_counted_once_and_at_its_own_cost() -> None:
    """Schedules named by their costs, of two rules that share the cheapest; what is searched uses its budget up."""
    space = SimpleNamespace(cost=lambda schedule: {"cost": float(schedule)}, key=str)
    initial = {name: (rule, cost) for name, rule, cost in [("1", "a", 1), ("2", "a", 2), ("3", "a", 3), ("4", "b", 1)]}
    given: Any = SimpleNamespace(space=space, initial=initial, limits={0.25: 1.0, 1.0: 4.0})
    assert sorted(costs_kept(given, 1, 0)) == [1.0, 1.0, 3.0, 4.0]
    assert sorted(costs_kept(given, 2, 1)) == [1.0] * 4 + [2.0, 3.0] + [4.0] * 3


def test_every_schedule_that_a_rule_made_begins_the_search() -> None:
    """Of one layout and pair a rule may make several, which differ in where the segments end."""
    space = ModelScheduleSpace(VPSchedule(), {"w16": 0.015, "w64": 0.135, "w192": 1.0}, max_evaluations=16)
    of: Any = work(rules=("small_first", "large_first", "sandwich"), per_rule=40)
    of.space, of.limits = space, {1.0: 1.0, 2.0: 2.0}
    made = {"small_first": small_first, "large_first": large_first, "sandwich": partial(sandwich, count=80)}
    for budget, (rule, make) in product(of.limits, made.items()):
        kept = [each for name, (_, each) in of.initial.items() if name.startswith(f"{rule} @{budget:g} ")]
        assert kept == [each.schedule for each in make(space.with_budget(budget))] and len(kept) >= 40


def test_a_budget_is_one_that_a_schedule_keeps_and_another_exceeds() -> None:
    def limits(budget: float, switch_ms: float = 0.0) -> Any:
        of: Any = work(budgets=(1.0, budget), space={"max_evaluations": 4})
        of.costs = replace(costs(20, "a", "b"), switch_ms=switch_ms)
        return of.limits

    # five milliseconds a call; three changes of member cost one and a half calls
    assert limits(4.0) == {1.0: 5.0, 4.0: 20.0} and limits(5.5, 2.5) == {1.0: 5.0, 5.5: 27.5}
    with pytest.raises(UserError, match=r"4.1 calls of .* more than any .*, 4 with method.max_evaluations = 4"):
        limits(4.1)
    with pytest.raises(UserError, match=r"0.9 calls of .* below one of the cheapest, 1"):
        limits(0.9)


def test_curves_read_back_to_the_last_digit(tmp_path: Path) -> None:
    path, curve = tmp_path / "curves.json", ErrorCurve((-1 / 3, 0.1), (0.7, 1e-17))
    write_curves(path, {"a": curve}, {"b": "RuntimeError: broken"})
    assert read_curves(path) == ({"a": curve}, {"b": "RuntimeError: broken"})
    path.write_text(path.read_text().replace("0.7", "0.8"))
    with pytest.raises(CorruptFileError):
        read_curves(path)


def test_images_are_encoded_batch_by_batch_to_their_mean() -> None:
    sizes = []

    def encode(images: torch.Tensor, *, mean: bool) -> torch.Tensor:
        assert mean
        sizes.append(len(images))
        return images[:, :, :2, :2]

    batches = [{"image": torch.rand(4, 1, 8, 8), "label": torch.arange(4)} for _ in range(9)]
    module: Any = SimpleNamespace(device="cpu", vae=SimpleNamespace(encode=encode))
    data: Any = SimpleNamespace(reference_loader=lambda split: iter(batches))
    x, labels = model_curves._images(module, data, 10)
    assert sizes == [4, 4, 4] and x.shape == (10, 1, 2, 2) and labels.tolist() == [0, 1, 2, 3] * 2 + [0, 1]


class Travelling(torch.nn.Module):
    """Says where it was sent, which is the CPU or elsewhere."""

    place = "elsewhere"

    def to(self, device: Any) -> Travelling:  # type: ignore[override]
        self.place = str(device)
        return self


def test_members_that_wait_on_the_cpu_are_brought_before_their_errors_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = {name: Travelling() for name in "abc"}
    scheduled = ScheduledDenoiser(members, "a", resident=1)
    scheduled._device = "elsewhere"  # type: ignore[assignment]
    schedule = VPSchedule()
    zoo = SimpleNamespace(predictions=dict.fromkeys(members, Prediction("epsilon", schedule)))
    module: Any = SimpleNamespace(
        zoo=zoo, scheduled=scheduled, members=members, prediction=zoo.predictions["a"], class_conditional=False
    )
    monkeypatch.setattr(model_curves, "_images", lambda *_: (None, None))
    monkeypatch.setattr(model_curves, "network_style", lambda network: "unet2d")
    monkeypatch.setattr(model_curves, "error_curve", lambda model, *_, **__: (model.network, model.network.place))
    for name in "bc":
        members[name].to("cpu")
    found, failed = model_curves.member_curves(module, None, tuple(members), 4)
    assert found == {name: (member, "elsewhere") for name, member in members.items()} and not failed
    assert [member.place for member in members.values()] == ["cpu", "cpu", "elsewhere"]


def test_a_member_that_fails_where_another_process_judges_is_noted_by_all() -> None:
    """Of four schedules the second process judges the two that use b, which is broken."""

    def judged(evaluations: Any) -> tuple[list[float], list[str]]:
        scheduled = SimpleNamespace(failed=None)

        def evaluate(schedule: str, samples: int) -> Evaluation:
            if "b" in schedule:
                scheduled.failed = "b"
                raise RuntimeError("no such kernel")
            return Evaluation(float(samples), {})

        method: Any = SimpleNamespace(drop_failing=True, select=8)
        of: Any = ModelWork(method, evaluations, SimpleNamespace(scheduled=scheduled), None)
        of.draws = SimpleNamespace(objective=lambda space, draw: SimpleNamespace(evaluate=evaluate))
        of.space, of.costs, of.runner = None, SimpleNamespace(notes=()), SimpleNamespace(main=False)
        return of.judge(["a", "ab", "aa", "b"]), of.notes()

    inf, note = float("inf"), "the member b fails and is left out: RuntimeError: no such kernel"
    assert Pair().run(judged) == [([8.0, inf, 8.0, inf], [note])] * 2


def test_a_predictor_that_is_little_guide_is_doubted() -> None:
    def doubts(before: int, tau: float | None, source: str = "budgeted 1") -> list[str]:
        records = [SimpleNamespace(source=name) for name in ["random"] * before + [source]]
        order = None if tau is None else model_report._Order([], [], tau)
        of: Any = SimpleNamespace(result=SimpleNamespace(records=records))
        return model_report._predictor_doubts(of, order)

    assert doubts(50, 0.5) == doubts(50, None) == doubts(3, 0.1, "child") == []
    assert "began with 49 schedules" in doubts(49, 0.9)[0] and "τ = 0.40" in doubts(60, 0.4)[0]
