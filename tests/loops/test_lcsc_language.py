"""LCSC on a causal language model: its checkpoints combined for the log-likelihood of answers."""

from pathlib import Path

import pytest
import torch
import transformers
from command_line import report_of
from transformers import AutoModelForCausalLM

from genlight.cli import main

MODEL = [
    "data=tiny_tasks",
    "data.tasks=[sort]",
    "data.batch_size=16",
    "data.num_samples=40",
    "module=causal_lm",
    "metrics=none",
    "callbacks=collector",
    "callbacks.ema=null",
    "callbacks.sample_grid=null",
    "module.config={_target_: transformers.LlamaConfig, vocab_size: 128, hidden_size: 16, intermediate_size: 16,"
    " num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 128}",
    "trainer.accelerator=cpu",
]
FIT = ["trainer.max_steps=16", "trainer.val_check_interval=16", "callbacks.collector.every_n_steps=2"]
SEARCH = ["method=lcsc", "search=lcsc", "search.budget=8", "search.fidelity=40", "search.finalists=2"]
SEARCH += ["search.shared=false"]
SEARCH += ["method.objective=val/sort/log_likelihood", "method.select=40", "method.singles=3"]


def test_checkpoints_of_a_language_model_are_combined(tmp_path: Path) -> None:
    assert main(["fit", *MODEL, *FIT, f"run.root={tmp_path}", "run.name=trained"]) == 0
    words = [*MODEL, *SEARCH, f"ckpt_path={tmp_path}/trained/fit", f"run.root={tmp_path}", "run.name=found"]
    assert main(["validate", *words]) == 0
    folder = tmp_path / "found" / "validate"
    rows = {row["kind"]: row for row in report_of(folder)["table"]}
    assert {"last", "swa", "lawa", "tracked ema", "power ema", "LCSC"} <= set(rows)
    # the best on the search draw is at least as good as each average that begins the search
    assert rows["LCSC"]["search"] >= max(row["search"] for row in rows.values() if row.get("l1") is not None)
    assert rows["LCSC"]["log_likelihood"] == pytest.approx(rows["LCSC"]["search"], abs=3)
    model = AutoModelForCausalLM.from_pretrained(folder / "artifact")
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
