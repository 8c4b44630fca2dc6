"""Weights are told apart by samples of their files, and models of the hub by their commit."""

import os

from genlight.reports.origin import sampled_sha256, weights_record

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_one_changed_byte_of_a_small_file_is_seen(tmp_path):
    file = tmp_path / "unet" / "a.safetensors"
    file.parent.mkdir()
    content = bytearray(os.urandom(200_000))
    file.write_bytes(content)
    (tmp_path / "notes.txt").write_text("one")
    first = weights_record(str(tmp_path))
    assert first.source == str(tmp_path) and first.hub_commit is None and len(first.sampled_sha256) == 64
    (tmp_path / "notes.txt").write_text("two")
    assert weights_record(str(tmp_path)) == first
    content[123_456] ^= 1
    file.write_bytes(content)
    assert sampled_sha256(tmp_path) != first.sampled_sha256
    assert sampled_sha256(file) not in (None, sampled_sha256(tmp_path))


def test_of_a_large_file_only_samples_are_read(tmp_path):
    file, size = tmp_path / "a.safetensors", 1 << 33
    with file.open("wb") as opened:
        opened.truncate(size)  # 8 GiB, of which the disk holds nothing
    before = sampled_sha256(tmp_path)
    with file.open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(b"x")
    assert sampled_sha256(tmp_path) != before


def test_a_run_stands_for_its_artifact(tmp_path):
    (tmp_path / "artifact").mkdir()
    assert sampled_sha256(tmp_path) is None
    (tmp_path / "artifact" / "a.safetensors").write_bytes(b"a")
    before = sampled_sha256(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"b")
    assert sampled_sha256(tmp_path) == before == sampled_sha256(tmp_path / "artifact")


def test_a_model_of_the_hub_has_the_commit_that_was_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert weights_record("some/pipeline").hub_commit is None
    kept = tmp_path / "models--some--pipeline"
    (kept / "snapshots" / COMMIT).mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(COMMIT)
    (kept / "snapshots" / COMMIT / "config.json").write_text("{}")
    found = weights_record("some/pipeline")
    assert (found.source, found.hub_commit, found.sampled_sha256) == ("some/pipeline", COMMIT, None)
