"""The real commands on two CPU processes: fit, checkpoint, resume, and one diffusers folder out of the shards."""

from pathlib import Path

import pytest
import torch
from command_line import TINY, genlight, report_of, run_in_own_process, run_in_ranks, untrained_features

from genlight import io
from genlight.trainer.consolidate import consolidated_state_dict

STRATEGIES = {
    "ddp": ["strategy=ddp"],
    "zero2": ["strategy=deepspeed_cpu", "strategy.stage=2"],
    "zero3": ["strategy=deepspeed_cpu", "strategy.stage=3", "callbacks.ema=null"],
}


def on_two_processes(root: Path, *words: str) -> list[str]:
    """The words of a command."""
    options = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=4", "data.num_samples=41"]
    return [words[0], *TINY, f"run.root={root}", *words[1:], *options]


# the third splits all that the first two do not
@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("ddp", "zero2")), "zero3"])
def test_fit_checkpoint_resume_and_consolidation(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))
    untrained_features(tmp_path / "cache")
    folder = tmp_path / name / "fit"
    run_in_own_process(*on_two_processes(tmp_path, "fit", *STRATEGIES[name], f"run.name={name}"), timeout=200)
    whole = consolidated_state_dict(folder / "checkpoints" / "step-000004.ckpt")

    io.remove_path(folder / "checkpoints" / "step-000004.ckpt")
    # the launcher has been seen to work
    run_in_ranks(*on_two_processes(tmp_path, "fit", *STRATEGIES[name], f"run.name={name}", "resume=true"))
    resumed = consolidated_state_dict(folder / "checkpoints" / "step-000004.ckpt")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)

    pipeline = DiffusionPipeline.from_pretrained(folder / "artifact")
    saved = {key.removeprefix("network."): value for key, value in resumed.items()}
    assert all(torch.equal(value, saved[key]) for key, value in pipeline.unet.state_dict().items())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)

    # the shards, loaded by one process, score as the folder made of them
    scores = []
    for label, path in (("shards", folder), ("artifact", folder / "artifact")):
        assert genlight(tmp_path, "validate", f"run.name={label}", f"ckpt_path={path}") == 0
        scores.append(report_of(tmp_path / label / "validate")["metrics"]["val/fd_digits"])
    assert scores[0] == scores[1]
    if name == "ddp":
        run_in_ranks(*on_two_processes(tmp_path, "validate", "strategy=ddp", "run.name=both", f"ckpt_path={folder}"))
        assert genlight(tmp_path, "validate", "run.name=one", f"ckpt_path={folder}", "data.num_samples=41") == 0
        one, both = (report_of(tmp_path / label / "validate") for label in ("one", "both"))
        assert both["metrics"]["val/fd_digits"] == pytest.approx(one["metrics"]["val/fd_digits"], rel=1e-4)


def test_a_fit_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """From inside an epoch of eight batches into epochs of four global ones, and back; the report says so."""
    words = ("fit", "run.name=moved", "data.batch_size=100", "callbacks.checkpoint.every_n_train_steps=3")
    assert genlight(tmp_path, *words) == 0
    two = ("resume=true", "strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=9")
    run_in_ranks(words[0], *TINY, f"run.root={tmp_path}", *words[1:], *two)
    folder = tmp_path / "moved" / "fit"
    assert "trainer.devices: was 1, now 2" in report_of(folder)["notes"][0]
    assert genlight(tmp_path, *words, "resume=true", "trainer.max_steps=12") == 0
    assert max(path.name for path in (folder / "checkpoints").iterdir()) == "step-000012.ckpt"


@pytest.mark.slow  # half a minute; zero3 is consolidated above
def test_a_language_model_in_shards_is_saved_with_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = ("data.tasks=[digits]", "data.batch_size=4", "data.eval_batch_size=4", "module.config.num_hidden_layers=1")
    small = (*small, "trainer.limit_val_batches=1", "trainer.num_sanity_val_steps=0")
    run_in_own_process(
        "fit", "experiment=eep/tiny_moe", *STRATEGIES["zero3"], *small, "trainer.accelerator=cpu", "trainer.devices=2",
        "trainer.max_steps=2", f"run.root={tmp_path}", "run.name=moe", timeout=200,
    )  # fmt: skip
    folder = tmp_path / "moe" / "fit"
    model = AutoModelForCausalLM.from_pretrained(folder / "artifact").state_dict()
    shards = consolidated_state_dict(folder / "checkpoints" / "step-000002.ckpt")
    assert all(torch.equal(value, shards[f"network.{key}"]) for key, value in model.items())
    assert len(AutoTokenizer.from_pretrained(folder / "artifact")("cab").input_ids) == 3
