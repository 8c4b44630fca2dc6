import os
from pathlib import Path

import pytest
import torch

from genlight.data import cache
from genlight.data.cache import cached_tensors, default_cache_folder, fingerprint_of, with_progress


@pytest.fixture
def build():
    calls = []

    def make() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"pixels": torch.arange(6)}

    make.calls = calls
    return make


def test_the_second_time_is_read_and_other_facts_are_built(tmp_path, build):
    for facts, calls in (({"a": 1}, 1), ({"a": 1}, 1), ({"a": 2}, 2), ({"a": 1}, 2)):
        assert cached_tensors(tmp_path, "set", facts, build)["pixels"].tolist() == list(range(6))
        assert len(build.calls) == calls


def test_every_damaged_file_is_built_anew(tmp_path, build, caplog):
    cached_tensors(tmp_path, "set", 1, build)
    (file,) = (tmp_path / "images").iterdir()
    whole = file.read_bytes()
    damages = [whole[:length] for length in (0, 5, len(whole) // 2, len(whole) - 1)]
    damages += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in (0, 9, 60, len(whole) - 3)]
    for number, damaged in enumerate(damages, start=2):
        file.write_bytes(damaged)
        assert cached_tensors(tmp_path, "set", 1, build)["pixels"].tolist() == list(range(6))
        assert len(build.calls) == number
        assert file.read_bytes() == whole
    assert "decoding again" in caplog.text and str(file) in caplog.text


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path, build, caplog):
    (tmp_path / "taken").write_text("a file")
    assert cached_tensors(tmp_path / "taken", "set", 1, build)["pixels"].tolist() == list(range(6))
    assert f"decoded images are not kept, cache folder {tmp_path / 'taken'}" in caplog.text


def test_the_environment_names_the_cache_folder(monkeypatch):
    monkeypatch.setenv("GENLIGHT_CACHE", "/some/where")
    assert default_cache_folder() == Path("/some/where")
    monkeypatch.delenv("GENLIGHT_CACHE")
    assert "genlight" in os.fspath(default_cache_folder())


def test_fingerprints_tell_facts_apart():
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    assert len({fingerprint_of(facts) for facts in (1, "1", [1], None, [1, 2], [2, 1])}) == 6


@pytest.mark.parametrize("seconds", [1e9, 0.0])
def test_progress_passes_every_item_on_with_and_without_a_bar(monkeypatch, capsys, seconds):
    monkeypatch.setattr(cache, "BAR_AFTER_SECONDS", seconds)
    assert list(with_progress(range(5), 5, "decoding")) == list(range(5))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "" or seconds == 0


def test_nothing_is_read_ahead_of_the_bar():
    def items():
        yield 1
        raise ValueError("row 1")

    with pytest.raises(ValueError, match=r"row 1"):
        list(with_progress(items(), 2, "decoding"))
