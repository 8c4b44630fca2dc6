"""Both steps in one fit: what each trains, what a resumed run repeats, what the artifact predicts."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from data.toy_tables import ToyTable, toy_table

from genlight import io
from genlight.callbacks.exact_resume import ExactResume
from genlight.callbacks.step_seed import StepSeed
from genlight.errors import UserError
from genlight.metrics.ranking import precision_at_k
from genlight.modules import predictor
from genlight.modules.predictor import PredictorModule
from genlight.predictors.expert_heads import ExpertScorePredictor
from genlight.predictors.experts import ExpertSettings
from genlight.predictors.losses import kendall_tau
from genlight.trainer.checkpoint_io import AtomicCheckpointIO, load_checkpoint

STEPS = 10  # six on the pool


def module(data: ToyTable, **options: Any) -> PredictorModule:
    torch.manual_seed(0)
    made = PredictorModule(
        ExpertSettings(width=8, depth=1), optimizer=functools.partial(torch.optim.Adam, lr=1e-3), **options
    )
    made.check_data(data)
    return made


def trainer(folder: Path, steps: int = STEPS, *callbacks: lp.Callback) -> lp.Trainer:
    return lp.Trainer(
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[StepSeed(0), ExactResume(), *callbacks],
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
    )


class Watch(lp.Callback):
    """Notes gate, experts and number of steps in Adam's state after each batch; saves a checkpoint after some."""

    def __init__(self, folder: Path | None = None, save_after: tuple[int, ...] = ()) -> None:
        self.folder, self.save_after = folder, save_after
        self.gates: list[Any] = []
        self.experts: list[Any] = []
        self.adam: list[float] = []

    def on_train_batch_end(self, trainer: lp.Trainer, pl_module: Any, *_: Any) -> None:
        for kept, part in ((self.gates, pl_module.net.gate), (self.experts, pl_module.net.experts)):
            kept.append([p.detach().clone() for p in part.parameters()])
        first = next(iter(pl_module.net.experts.parameters()))
        self.adam.append(float(trainer.optimizers[0].state[first]["step"]))
        if trainer.global_step in self.save_after:
            trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt", weights_only=False)


def changed(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("keep", [False, True])
def test_the_gate_begins_with_the_second_step_and_so_does_the_optimizer(keep: bool, tmp_path: Path) -> None:
    data, watch = ToyTable(), Watch()
    made = module(data, keep_optimizer_state=keep)
    start = [p.detach().clone() for p in made.net.gate.parameters()]
    trainer(tmp_path, STEPS, watch).fit(made, datamodule=data)
    assert all(not changed(start, gate) for gate in watch.gates[:6])
    assert changed(watch.gates[5], watch.gates[6]) and changed(watch.gates[6], watch.gates[7])
    assert all(changed(a, b) for a, b in zip(watch.experts, watch.experts[1:]))
    assert watch.adam == [*range(1, 7), *(range(7, 11) if keep else range(1, 5))]
    # the new gate is drawn anew, not trained on: one step of Adam moves a weight by at most its rate
    moved = max(float((a - b).abs().max()) for a, b in zip(start, watch.gates[6]))
    assert moved > 0.01


def test_a_run_resumed_in_either_step_or_between_ends_with_the_same_weights(tmp_path: Path) -> None:
    data = ToyTable()
    whole = module(data)
    trainer(tmp_path, STEPS, Watch(tmp_path, (4, 6, 8))).fit(whole, datamodule=data)
    for step in (4, 6, 8):
        data = ToyTable()
        resumed = module(data)
        trainer(tmp_path).fit(resumed, datamodule=data, ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
            assert torch.equal(a, b), (step, name)
    other = ToyTable(label_seed=1)
    with pytest.raises(UserError, match="trained on other data or labels"):
        trainer(tmp_path).fit(module(other), datamodule=other, ckpt_path=tmp_path / "8.ckpt", weights_only=True)


def test_doubts_are_said_where_the_second_step_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, of the labelled candidates, with the gate that the second step begins with."""
    seen, watch = [], Watch()

    def doubts(network: Any, names: Any, tokens: torch.Tensor, targets: torch.Tensor) -> list[str]:
        gate = [p.detach().clone() for p in network.gate.parameters()]
        seen.append((names, len(tokens), bool(targets.isfinite().all()), changed(gate, watch.gates[-1])))
        return ["a doubt"]

    monkeypatch.setattr(predictor, "expert_doubts", doubts)
    data = ToyTable()
    with pytest.warns(UserWarning, match="a doubt"):
        trainer(tmp_path, STEPS, watch).fit(module(data), datamodule=data)
    assert seen == [(("a", "b"), 12, True, True)]


def fitted(folder: Path, data: ToyTable) -> tuple[PredictorModule, dict[str, float]]:
    made, engine = module(data), trainer(folder)
    engine.fit(made, datamodule=data)
    return made, {name: float(value) for name, value in engine.callback_metrics.items()}


def test_validation_measures_the_candidates_held_out(tmp_path: Path) -> None:
    data = ToyTable(eval_batch_size=13)
    made, logged = fitted(tmp_path, data)
    mean, _ = made.trained().fitted().predict(data.prepared.held_out)
    assert logged["val/kendall_tau"] == pytest.approx(kendall_tau(mean, data.prepared.held_out_targets))
    assert logged["val/p_at_5"] == pytest.approx(precision_at_k(mean, data.prepared.held_out_targets, 0.05))
    assert "val/p_at_1" not in logged, "there are 80: one per cent of them is none"
    assert logged["train/finetune_loss"] > 0


def test_nothing_that_training_must_not_see_changes_a_bit_of_it(tmp_path: Path) -> None:
    """Labels beside the subset, and everything held out, are replaced by noise."""
    table, data = toy_table(), ToyTable()
    hidden = torch.ones(200, dtype=torch.bool)
    hidden[data.prepared.labelled] = False
    target, low_fidelity = table.target.clone(), table.low_fidelity.clone()
    target[hidden], low_fidelity[120:] = torch.randn(int(hidden.sum())), torch.randn(80, 2)
    a, _ = fitted(tmp_path, data)
    b, _ = fitted(tmp_path, ToyTable(dataclasses.replace(table, target=target, low_fidelity=low_fidelity)))
    for one, other in ((a, "a"), (b, "b")):
        one.save_pretrained(tmp_path / other)
    for name in ("predictor.safetensors", "predictor.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_artifact_and_the_checkpoint_predict_as_the_module_does(tmp_path: Path) -> None:
    data = ToyTable()
    made, engine = module(data), trainer(tmp_path)
    engine.fit(made, datamodule=data)
    engine.save_checkpoint(tmp_path / "end.ckpt")
    tokens = data.prepared.held_out
    expected = made.trained().fitted().predict(tokens)
    made.save_pretrained(tmp_path)
    for part, value in zip(PredictorModule.from_pretrained(tmp_path).fitted().predict(tokens), expected):
        assert torch.equal(part, value)
    read = PredictorModule(ExpertSettings())
    checkpoint = load_checkpoint(tmp_path / "end.ckpt")
    read.on_load_checkpoint(checkpoint)  # the shape comes from the checkpoint
    read.load_state_dict(checkpoint["state_dict"])
    read.check_data(data)
    step = read.eval().predict_step({"tokens": tokens})
    assert torch.equal(step["mean"], expected[0]) and torch.equal(step["std"], expected[1])


@pytest.mark.parametrize("head", ["gp", "ridge"])
def test_regressions_leave_the_experts_as_they_are(head: str, tmp_path: Path) -> None:
    data = ToyTable(labels=40, pretrain_steps=STEPS)
    made, engine, watch = module(data, head=head), trainer(tmp_path), Watch()
    engine.callbacks.append(watch)  # type: ignore[attr-defined]
    engine.fit(made, datamodule=data)
    assert not changed(watch.gates[0], watch.gates[-1])
    known, pool = data.prepared.labelled, data.prepared.pool
    fitted = ExpertScorePredictor(made.net, pool, head).fit(pool.tokens[known], data.prepared.targets[known])
    tau = kendall_tau(fitted.predict(data.prepared.held_out)[0], data.prepared.held_out_targets)
    assert float(engine.callback_metrics["val/kendall_tau"]) == pytest.approx(tau)
    with pytest.raises(UserError, match=rf"module.head = {head} leaves the experts"):
        trainer(tmp_path, STEPS + 1).fit(made, datamodule=data)


def test_a_fit_that_ends_before_the_second_step_says_so(tmp_path: Path) -> None:
    for steps, said in ((6, True), (7, False)):
        with pytest.warns() as warnings:
            trainer(tmp_path, steps).fit(module(ToyTable()), datamodule=ToyTable())
        assert any("ends before a true score trains anything" in str(each.message) for each in warnings) == said


def test_other_names_of_the_categories_are_refused(tmp_path: Path) -> None:
    """They number the same text differently."""
    named, renamed = (
        ToyTable(dataclasses.replace(toy_table(), categories=(tuple(names), (), (), ()))) for names in ("pqrs", "apqr")
    )
    saved: dict[str, Any] = {}
    module(named).on_save_checkpoint(saved)
    read = PredictorModule(ExpertSettings())
    read.on_load_checkpoint(saved)
    read.check_data(named)
    message = "categories of token 0 were p, q, r, s in training, and are a, p, q, r in the data"
    for check in (lambda: read.check_data(renamed), lambda: module(renamed).on_load_checkpoint(saved)):
        with pytest.raises(UserError, match=message):
            check()
    read.check_data(named)
    read.save_pretrained(tmp_path)
    assert PredictorModule.from_pretrained(tmp_path).categories == (("p", "q", "r", "s"), (), (), ())


@pytest.mark.parametrize("higher", [True, False])
def test_what_is_saved_says_whether_targets_were_negated(higher: bool, tmp_path: Path) -> None:
    data, saved = ToyTable(higher_is_better=higher), dict[str, Any]()
    made = module(data)
    made.save_pretrained(tmp_path)
    made.on_save_checkpoint(saved)
    facts = {"data": data.fingerprint, "target": "score", "negated": not higher}
    assert io.read_json(tmp_path / "predictor.json")["facts"] == saved[predictor.SAVED]["facts"] == facts


def test_without_scores_there_is_one_expert_and_no_first_step(tmp_path: Path) -> None:
    data = ToyTable(low_fidelity=[], pretrain_steps=0)
    made, logged = fitted(tmp_path, data)
    assert made.net.num_experts == 1 and "train/pretrain_loss" not in logged


def test_data_and_checkpoints_that_do_not_fit_are_named(tmp_path: Path) -> None:
    from genlight.data.digits import DigitsDataModule

    data = ToyTable()
    made = module(data)
    digits = DigitsDataModule(8, 1, 10, 4, 4, 4, 0)
    for check, message in [
        (lambda: module(data, head="tree"), r"module.head = tree must be one of fusion, gp"),
        (lambda: PredictorModule(ExpertSettings()).check_data(digits), "which data=digits is not"),
        (
            lambda: made.check_data(ToyTable(low_fidelity=["a"], table=toy_table(1))),
            "set data.low_fidelity as in training",
        ),
        (lambda: PredictorModule(ExpertSettings("gates", depth=4)).check_data(data), "gates needs an operation"),
        (lambda: made.on_load_checkpoint({}), "not of a predictor"),
        (lambda: PredictorModule(ExpertSettings()).net, "call check_data"),
    ]:
        with pytest.raises((UserError, ValueError), match=message):
            check()  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match="made for module=predictor"):
        data.image_shape  # noqa: B018


def test_scores_are_not_rounded_to_16_bits(tmp_path: Path) -> None:
    made = lp.Trainer(accelerator="cpu", precision="bf16-true", logger=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match=r"trainer.precision = bf16-true rounds the scores"):
        made.validate(module(ToyTable()), datamodule=ToyTable(), verbose=False)
