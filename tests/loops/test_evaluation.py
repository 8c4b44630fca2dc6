"""Candidates measured by the trainer: what runs in a validation, what is put back afterwards, what a fault leaves."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from loops.pair import Pair
from torch import Tensor, nn
from torch.utils.data import DataLoader

from genlight.errors import UserError
from genlight.loops.evaluation import (
    CandidateTrainer,
    MetricObjective,
    checked_mode,
    direction,
    in_rounds,
    in_turn,
    measured,
)
from genlight.metrics.text_tasks import TaskScores
from genlight.search.evaluation import one_by_one
from genlight.search.records import Trial
from genlight.trainer.resident import ResidentStrategy, is_sharded, local_trainer, silenced

pytestmark = pytest.mark.filterwarnings("ignore")


class Target(LightningModule):
    """Logs the mean of weight · rows; its weight is what a candidate sets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.modes: list[tuple[bool, bool]] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.modes.append((torch.is_inference_mode_enabled(), self.training))
        if self.weight < 0:
            raise RuntimeError("a negative weight")
        self.log("val/mean", (self.weight * batch).mean(), batch_size=len(batch))
        self.log("val/mean_std", torch.tensor(1.0), batch_size=len(batch))


class Rows:
    """A data module as far as `measured` knows it: rows of a draw, as many as it is told."""

    def __init__(self) -> None:
        self.draw, self.num_samples, self.seen = "report", 6, list[tuple[str, int]]()

    def loader(self) -> DataLoader[Tensor]:
        self.seen.append((self.draw, self.num_samples))
        first = {"search": 1.0, "report": 10.0}[self.draw]
        return DataLoader((first + torch.arange(self.num_samples)).split(4), batch_size=None)


class Evaluations(CandidateTrainer):
    """Hands the loader of `Rows` to the trainer, which would take a data module of Lightning only."""

    def validate(self, module: LightningModule, **data: Any) -> dict[str, float]:
        rows = data.pop("datamodule", None)
        return super().validate(module, **({"dataloaders": rows.loader()} if rows else data))


class Space:
    def apply(self, target: Target, candidate: float) -> None:
        target.weight.data.fill_(candidate)


def evaluations() -> CandidateTrainer:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Evaluations(Trainer(accelerator="cpu", devices=1, **options))


def test_a_candidate_is_scored_on_its_draw_and_the_data_module_is_put_back() -> None:
    rows, target = Rows(), Target()
    objective = MetricObjective(evaluations(), Space(), target, rows, "val/mean")
    found = objective.evaluate(3.0, 5)
    assert found.score == pytest.approx(3.0 * torch.arange(1.0, 6.0).mean().item()) and rows.seen == [("search", 5)]
    assert dict(found.facts) == {"val/mean": found.score} and (rows.draw, rows.num_samples) == ("report", 6)
    assert target.modes == [(True, False)] * 2
    more = MetricObjective(evaluations(), Space(), target, rows, "val/mean", "max", "report")
    assert more.evaluate(3.0, 5).score == pytest.approx(-36.0)


def test_a_metric_that_is_not_logged_is_named_with_those_that_are() -> None:
    objective = MetricObjective(evaluations(), Space(), Target(), Rows(), "val/fid")
    with pytest.raises(UserError, match=r"method.objective=val/fid: validate logs val/mean, val/mean_std"):
        objective.evaluate(1.0, 2)
    with pytest.raises(ValueError, match=r"method.mode"):
        MetricObjective(evaluations(), Space(), Target(), Rows(), "val/mean", "least")


def test_a_metric_says_which_way_it_is_better() -> None:
    known = SimpleNamespace(higher_is_better={"is": True, "fid": False, "hue": None})
    assert [direction("auto", f"val/{name}", known) for name in ("is", "fid")] == ["max", "min"]
    assert direction("max", "val/is", known) == "max" and direction("min", "val/fid", known) == "min"
    assert direction("max", "val/hue", known) == "max" and direction("min", "val/loss", None) == "min"
    assert direction("auto", "val/sort/f1", TaskScores(["sort"])) == "max"
    for mode, name, expected in [
        ("min", "is", "more of it is better; set method.mode=max"),
        ("max", "fid", "less of it is better; set method.mode=min"),
        ("auto", "hue", "does not say whether more or less"),
    ]:
        with pytest.raises(UserError, match=rf"method.objective=val/{name}: .*{expected}"):
            direction(mode, f"val/{name}", known)
    with pytest.raises(ValueError, match=r"method.mode = 'least' must be auto, min or max"):
        checked_mode("least")


def test_a_candidate_that_raises_fails_alone() -> None:
    rows, shared = Rows(), evaluations()
    objective = MetricObjective(shared, Space(), Target(), rows, "val/mean")
    trials = [Trial(i, 0, str(i), weight, 3, "random", {}, (0, i)) for i, weight in enumerate([1.0, -1.0, 2.0])]
    outcomes = one_by_one(objective)(trials)
    assert [o.score for o in outcomes] == [2.0, None, 4.0]
    assert outcomes[1].failure is not None and outcomes[1].failure.reason == "RuntimeError: a negative weight"
    assert (rows.draw, rows.num_samples) == ("report", 6)


def test_metrics_of_a_process_do_not_wait_for_the_others() -> None:
    target = Target()
    target.metrics = SimpleNamespace(sync=True)  # type: ignore[assignment]
    seen: list[bool] = []
    target.on_validation_start = lambda: seen.append(target.metrics.sync)  # type: ignore[method-assign]
    measured(evaluations(), target, Rows(), "search", 2)
    assert seen == [False] and target.metrics.sync is True


def test_work_inside_a_validation_sees_the_module_ready() -> None:
    target = Target().train()
    shared = evaluations()
    assert shared.inside(target, lambda: (torch.is_inference_mode_enabled(), target.weight.item())) == (True, 2.0)
    with pytest.raises(ZeroDivisionError):
        shared.inside(target, lambda: 1 / 0)
    assert shared.inside(target, lambda: "again") == "again"


def test_independent_work_comes_back_in_its_order() -> None:
    assert in_turn(evaluations(), [lambda i=i: i * i for i in range(5)]) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("rank", [0, 1])
def test_rounds_of_two_processes_are_in_order(rank: int) -> None:
    """Each does every second piece; the last round may be of one."""
    done = []

    def piece(index: int) -> int:
        done.append(index)
        return index

    def broadcast(shared: tuple[int | None, None], src: int) -> tuple[str, None]:
        return f"{shared[0]} of {src}", shared[1]

    trainer = SimpleNamespace(global_rank=rank, strategy=SimpleNamespace(broadcast=broadcast))
    two: Any = SimpleNamespace(shares=2, trainer=trainer)
    found = list(in_rounds(two, [partial(piece, index) for index in range(3)]))
    assert done == ([0, 2] if rank == 0 else [1])
    assert found[0] == [f"{rank} of 0", f"{rank} of 1"] and found[1] == [f"{2 if rank == 0 else None} of 0"]
    assert list(in_rounds(evaluations(), [partial(piece, index) for index in range(3)])) == [[0], [1], [2]]


@pytest.mark.parametrize("method", [in_turn, lambda *given: list(in_rounds(*given))], ids=["in_turn", "in_rounds"])
def test_where_a_piece_raises_on_one_process_both_raise(method: Any) -> None:
    """The third piece is of the first process; the other must not wait for its result."""
    pair, pieces = Pair(), [lambda: 0, lambda: 1, lambda: 1 // 0, lambda: 3]
    own, other = pair.run(lambda two: method(two, pieces))
    assert isinstance(own, ZeroDivisionError) and isinstance(other, UserError)
    assert str(other).startswith("another process failed: ZeroDivisionError: integer division")
    assert pair.calls[0] == pair.calls[1] > 0
    assert Pair().run(lambda two: method(two, [lambda: 0, lambda: 1, lambda: 2])) in (
        [[0, 1, 2]] * 2,
        [[[0, 1], [2]]] * 2,
    )


def test_a_lost_process_is_not_waited_for() -> None:
    def lost() -> None:
        raise RuntimeError("Connection closed by peer")

    pair = Pair()
    assert [str(each) for each in pair.run(lambda two: in_turn(two, [lost, lost]))] == ["Connection closed by peer"] * 2
    assert pair.calls == [0, 0]


def test_the_local_trainer_is_silent_and_leaves_the_module_where_it_is() -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, precision="bf16-mixed")
    local = local_trainer(trainer)
    assert isinstance(local.strategy, ResidentStrategy) and local.precision == "bf16-mixed" and not local.loggers
    moved: list[str] = []
    target = Target()
    target.cpu = lambda: moved.append("cpu")  # type: ignore[method-assign]
    local.validate(target, DataLoader([torch.ones(2)], batch_size=None), verbose=False)
    assert moved == [] and not is_sharded(trainer) and isinstance(trainer.strategy, SingleDeviceStrategy)
    callbacks = list(trainer.callbacks)
    with silenced(trainer):
        assert trainer.callbacks == [] and trainer.loggers == []
    assert trainer.callbacks == callbacks
