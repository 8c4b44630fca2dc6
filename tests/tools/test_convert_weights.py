"""Pickled weights become safetensors, or a sentence that says why not."""

import argparse
import runpy
from pathlib import Path

import pytest
import safetensors.torch
import torch

from genlight.errors import UserError

PROGRAM = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"))
convert, main = PROGRAM["convert"], PROGRAM["main"]
WEIGHTS = {"a.weight": torch.randn(3, 4).T, "a.bias": torch.arange(3), "b": torch.randn(2).bfloat16()}


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        (WEIGHTS, None),
        ({"model": WEIGHTS, "steps": 3, "args": argparse.Namespace(lr=0.1)}, None),
        ({"model": WEIGHTS, "ema": {"a": torch.zeros(1)}, "optimizer": {"state": {0: {"m": torch.zeros(1)}}}}, "model"),
        ({"trainer": {"ema_parameters": WEIGHTS, "var_wo_ddp": {"a": torch.zeros(1)}}}, "trainer.ema_parameters"),
    ],
)
def test_the_named_weights_come_back(tmp_path: Path, content: object, entry: str | None) -> None:
    source = save(tmp_path / "published.pt", content)
    assert convert(source, tmp_path / "out.safetensors", entry) == 3
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], WEIGHTS[name]) and found[name].dtype == WEIGHTS[name].dtype for name in found)


def test_two_sets_of_weights_need_a_choice(tmp_path: Path) -> None:
    source = save(tmp_path / "published.pt", {"model": WEIGHTS, "ema": WEIGHTS})
    for entry in (None, "other"):
        with pytest.raises(UserError, match="'model', 'ema'"):
            convert(source, tmp_path / "out.safetensors", entry)
    with pytest.raises(UserError, match="none"):
        convert(save(tmp_path / "empty.pt", {"steps": 3}), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


class Command:
    """What an unpickler would call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_nothing_in_the_file_is_run(tmp_path: Path) -> None:
    source = save(tmp_path / "evil.pt", {"model": WEIGHTS, "args": Command(tmp_path / "touched")})
    with pytest.raises(UserError, match=r"evil\.pt cannot be read as weights alone"):
        main([str(source), str(tmp_path / "out.safetensors")])
    assert not (tmp_path / "touched").exists()
    (tmp_path / "text.pt").write_text("no weights")
    for name in ("text.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            convert(tmp_path / name, tmp_path / "out.safetensors")
