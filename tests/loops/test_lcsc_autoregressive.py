"""LCSC on an autoregressive network of images: its checkpoints combined for the likelihood of tokens."""

from pathlib import Path

import pytest
from command_line import report_of, untrained_features

from genlight.cli import main
from genlight.data.digits import DigitsDataModule
from genlight.modules.autoregressive import AutoregressiveModule
from genlight.modules.token_folder import read_token_teacher

DATA = ["trainer.accelerator=cpu", "data.eval_batch_size=40", "data.num_samples=40"]
FIT = ["trainer.max_steps=16", "trainer.val_check_interval=16"]
SEARCH = ["method=lcsc", "search=lcsc", "search.budget=8", "search.fidelity=40", "search.finalists=2"]
SEARCH += ["search.shared=false", "method.select=40", "method.singles=3", "method.random_search=false"]


def test_checkpoints_of_an_autoregressive_network_are_combined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))
    untrained_features(tmp_path / "cache")
    tokenizer = [*DATA, *FIT, "experiment=dd/digits_var_tokenizer", f"run.root={tmp_path}", "run.name=tokens"]
    assert main(["fit", *tokenizer]) == 0
    model = [*DATA, "experiment=dd/digits_var_teacher", "module.tokenizer_recipe=null", "metrics.metrics=[fd]"]
    model += [f"module.tokenizer={tmp_path}/tokens/fit/artifact", "callbacks=collector", f"run.root={tmp_path}"]
    assert main(["fit", *model, *FIT, "callbacks.collector.every_n_steps=2", "run.name=trained"]) == 0
    words = [*model, *SEARCH, f"ckpt_path={tmp_path}/trained/fit", "run.name=found"]
    assert main(["validate", *words, "method.objective=val/nll", "method.mode=min"]) == 0
    folder = tmp_path / "found" / "validate"
    rows = {row["kind"]: row for row in report_of(folder)["table"]}
    assert {"last", "swa", "tracked ema", "post-hoc ema", "LCSC"} <= set(rows)
    assert all({"search", "select", "nll", "fd_digits"} <= row.keys() for row in rows.values())
    # the best on the search draw is at least as good as each average that begins the search
    assert rows["LCSC"]["search"] <= min(row["search"] for row in rows.values() if row.get("l1") is not None)
    # a search, a choice and the report have images of their own
    assert all(len({row["search"], row["select"], row["nll"]}) == 3 for row in rows.values())

    teacher = read_token_teacher(folder / "artifact")
    again = AutoregressiveModule(teacher.model.transformer, str(folder / "artifact" / "tokenizer"))
    held = report_of(folder)["metrics"]["nll_artifact"]
    digits = DigitsDataModule(8, 1, 10, batch_size=64, eval_batch_size=40, num_samples=40, seed=0)
    assert again.held_out_likelihood(digits) == pytest.approx(held, rel=1e-5)
