"""Prompts as classes of evaluation noise."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genlight.data.evaluation_noise import EvaluationNoise
from genlight.data.prompts import EMBEDDED, PromptsDataModule, read_prompts, split_prompts
from genlight.data.sampling import DRAWS
from genlight.errors import UserError


def labels_of(data: PromptsDataModule) -> list[int]:
    return torch.cat([batch["label"] for batch in data.val_dataloader()]).tolist()


def test_the_embedded_list_is_short_distinct_and_plain() -> None:
    prompts = PromptsDataModule().prompts
    assert len(prompts) == len(set(prompts)) == 64
    assert prompts == EMBEDDED.read_text("utf-8").splitlines()
    assert all(prompt.isascii() and 10 < len(prompt) < 60 for prompt in prompts)


@given(st.integers(3, 300))
def test_draws_share_no_prompt_and_lose_none(count: int) -> None:
    parts = {draw: split_prompts(count, draw) for draw in DRAWS}
    assert sorted(number for part in parts.values() for number in part) == list(range(count))
    assert all(parts.values())
    assert len(parts["report"]) >= max(len(parts["search"]), len(parts["select"]))


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_prompts_are_shared(count: int) -> None:
    assert [split_prompts(count, draw) for draw in DRAWS] == [list(range(count))] * 3


def test_batches_are_evaluation_noise_with_numbers_of_the_whole_list() -> None:
    data = PromptsDataModule(num_samples=40, eval_batch_size=7, noise_shape=(2, 3), seed=5, draw="search")
    part = split_prompts(64, "search")
    assert len(part) == 16 and part != sorted(part)
    batches = list(data.val_dataloader())
    index = torch.cat([batch["index"] for batch in batches])
    assert index.tolist() == list(range(40))
    assert labels_of(data) == [part[i % 16] for i in range(40)]
    expected = EvaluationNoise(40, (2, 3), None, 5, "search").__getitems__(range(40))["noise"]
    assert torch.equal(torch.cat([batch["noise"] for batch in batches]), expected)


def test_processes_share_the_samples() -> None:
    whole = PromptsDataModule(num_samples=9, noise_shape=(2,))
    alone, parts = list(whole.val_dataloader()), []
    for rank in range(2):
        data = PromptsDataModule(num_samples=9, noise_shape=(2,))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        parts += list(data.val_dataloader())
    for key in ("index", "noise", "label"):
        assert torch.equal(torch.cat([b[key] for b in parts]), torch.cat([b[key] for b in alone]))


def test_prompts_of_the_draws_do_not_depend_on_the_seed_and_switch_with_the_draw() -> None:
    data, other = (PromptsDataModule(noise_shape=(1,), seed=seed, num_samples=64) for seed in (0, 9))
    seen = {}
    for draw in DRAWS:
        data.draw = other.draw = draw
        seen[draw] = set(labels_of(data))
        assert labels_of(data) == labels_of(other)
    assert [len(seen[draw]) for draw in ("search", "select", "report")] == [16, 16, 32]
    assert not seen["search"] & seen["report"] and not seen["select"] & seen["report"]


def test_lists_of_every_kind(tmp_path: Path) -> None:
    text = tmp_path / "list.txt"
    text.write_text("a café\n\n  two, words \na café\nlast\n", "utf-8")
    assert read_prompts(text) == ["a café", "two, words", "last"]
    table = tmp_path / "list.csv"
    table.write_text('id,caption\n1,"a, b"\n2,"two\nlines"\n3,\n', "utf-8")
    assert read_prompts(table, "caption") == ["a, b", "two\nlines"]
    lines = tmp_path / "list.jsonl"
    lines.write_text("\n".join(json.dumps({"prompt": p, "id": 0}) for p in ("x", "é")) + "\n\n", "utf-8")
    assert read_prompts(lines) == ["x", "é"]
    data = PromptsDataModule(str(text), num_prompts=2)
    assert data.prompts == ["a café", "two, words"] and data.num_classes == 2


def test_fingerprint_is_of_the_prompts_alone() -> None:
    one, two = PromptsDataModule(), PromptsDataModule(num_samples=3, seed=4, draw="search")
    assert one.fingerprint == two.fingerprint and len(one.fingerprint) == 64
    assert PromptsDataModule(num_prompts=63).fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("no.txt", None, "prompt", "there is no such file"),
        ("empty.txt", b"\n \n", "prompt", "holds no prompts"),
        ("bytes.txt", b"\xff\xfe\xff", "prompt", "is no text in UTF-8"),
        ("a.csv", b"caption\nx\n", "prompt", r"data.column=prompt: .* has caption"),
        ("a.jsonl", b'{"a": "x"}\n', "b", r"data.column=b: .* has a"),
        ("b.jsonl", b"[1]\n", "b", "line 1 is no JSON object"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes | None, column: str, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        PromptsDataModule(str(path), column=column).prompts  # noqa: B018


def test_what_it_does_not_have_is_said() -> None:
    data = PromptsDataModule()
    with pytest.raises(UserError, match="no images to train on"):
        data.train_dataloader()
    with pytest.raises(UserError, match="no real images to compare with"):
        data.reference_loader("test")
    with pytest.raises(UserError, match="made for module=pipeline"):
        data.image_shape  # noqa: B018
    with pytest.raises(UserError, match=r"data\.noise_shape is null"):
        data.val_dataloader()
    for options in ({"num_prompts": 0}, {"num_samples": 0}, {"eval_batch_size": 0}, {"seed": -1}, {"draw": "x"}):
        with pytest.raises(ValueError, match=f"data.{next(iter(options))}"):
            PromptsDataModule(**options)  # type: ignore[arg-type]
