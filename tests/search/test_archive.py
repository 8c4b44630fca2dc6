"""The archive says what it holds or which line is wrong; nothing damaged is read as whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search.toy_search import FINGERPRINT, Word, WordSpace, rugged, run_search

from genlight import io
from genlight.errors import UserError
from genlight.search.archive import ATTEMPTS_FILE, HISTORY_FILE, Archive, seal, unseal
from genlight.search.codec import CandidateCodec
from genlight.search.random_search import RandomSearch
from genlight.search.records import Failure, Record, Trial

CODEC = CandidateCodec(Word)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def record(index: int, generation: int = 0, **changes: Any) -> Record[Word]:
    word = Word((index, 1))
    values = {"key": str(index), "candidate": word, "fidelity": 64, "source": "random", "cost": {"nfe": 5.0}} | changes
    trial = Trial(index=index, generation=generation, seeds=(0, index), **values)
    return Record(trial, 0.1 * index, {"fid": 1.5, "name": "x", "n": 3}, None)


def filled(folder: Path, count: int = 3) -> Archive[Word]:
    archive = Archive.open(folder, CODEC, FINGERPRINT)
    for index in range(count):
        archive.start([index])
        archive.append(record(index))
    return archive


@given(st.dictionaries(st.text(), plain, min_size=1, max_size=4))
def test_a_sealed_line_opens_again(content: dict[str, Any]) -> None:
    line = seal(content)
    assert "\n" not in line and json.loads(line).keys() >= content.keys()
    assert unseal(line, "here") == json.loads(json.dumps(content))


def test_a_candidate_of_many_numbers_is_read_again() -> None:
    """EEP merges 48 layers of 128 experts to 64: 786,432 numbers."""
    content = {"candidate": [[0.123456] * 786_432]}
    assert unseal(seal(content), "here") == content


@settings(max_examples=300)
@given(st.data())
def test_every_flipped_bit_is_seen(data: st.DataObject) -> None:
    line = seal({"score": 0.25, "candidate": {"letters": [1, 2]}, "reason": "ä"}).encode()
    position = data.draw(st.integers(0, len(line) - 1))
    damaged = bytearray(line)
    damaged[position] ^= 1 << data.draw(st.integers(0, 6))
    with pytest.raises(io.CorruptFileError, match="line 7"):
        unseal(damaged.decode(), "line 7")


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    written = filled(tmp_path)
    failed = Record(record(3).trial, None, {}, Failure("timeout", "took longer than 1 s"))
    written.append(failed)
    read = Archive.open(tmp_path, CODEC, FINGERPRINT)
    assert read.records == written.records and read.records[3] == failed
    assert read.is_measured("2", 64) and not read.is_measured("2", 256) and not read.is_measured("9", 64)


@pytest.mark.parametrize("length", range(0, 400, 23))
def test_a_torn_last_line_is_cut_off(length: int, tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / HISTORY_FILE
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: min(length, len(lines[-1]) - 1)])
    archive = Archive.open(tmp_path, CODEC, FINGERPRINT)
    assert [r.index for r in archive.records] == [0, 1]
    archive.append(record(2))
    assert path.read_bytes() == whole


def test_a_torn_header_is_a_new_archive(tmp_path: Path) -> None:
    (tmp_path / HISTORY_FILE).write_bytes(b'{"kind":"sea')
    filled(tmp_path)
    assert len(Archive.open(tmp_path, CODEC, FINGERPRINT).records) == 3


@pytest.mark.parametrize("name", [HISTORY_FILE, ATTEMPTS_FILE])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_line_is_named(name: str, number: int, tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / name
    lines = path.read_text().splitlines()
    lines[number - 1] = lines[number - 1].replace("1", "2", 1)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(io.CorruptFileError, match=rf"line {number} of .*{name} is damaged"):
        Archive.open(tmp_path, CODEC, FINGERPRINT)


@pytest.mark.parametrize("keep", [(0, 2, 3), (0, 1, 1, 2), (0, 2, 1)])
def test_missing_repeated_and_swapped_lines_are_named(keep: tuple[int, ...], tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / HISTORY_FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[number] for number in keep) + "\n")
    with pytest.raises(io.CorruptFileError, match=r"line \d of .* does not follow the line before"):
        Archive.open(tmp_path, CODEC, FINGERPRINT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "line 2 .*extra"),
        ({"index": "0"}, "line 2 .*index"),
        ({"score": None}, "either a score or a failure"),
        ({"score": None, "failure": {"kind": "mood", "reason": ""}}, "'mood' is none of"),
        ({"candidate": {"letters": [0.5]}}, "line 2 .*not a Word: letters"),
        ({"candidate": {"letters": [1], "x": 1}}, "line 2 .*not a Word: x"),
        ({"kind": "note"}, "line 2 .*kind"),
    ],
)
def test_a_whole_line_of_another_form_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    filled(tmp_path, 1)
    path = tmp_path / HISTORY_FILE
    header, line = path.read_text().splitlines()
    path.write_text(header + "\n" + seal(unseal(line, "") | changes) + "\n")
    with pytest.raises(io.CorruptFileError, match=message):
        Archive.open(tmp_path, CODEC, FINGERPRINT)


@pytest.mark.parametrize("name", [HISTORY_FILE, ATTEMPTS_FILE])
def test_another_search_is_refused_with_both_values(name: str, tmp_path: Path) -> None:
    filled(tmp_path)
    if name == ATTEMPTS_FILE:
        (tmp_path / HISTORY_FILE).unlink()
    with pytest.raises(UserError, match="objective is 'toy' there and 'fid' here; use another folder"):
        Archive.open(tmp_path, CODEC, FINGERPRINT | {"objective": "fid"})
    with pytest.raises(UserError, match="data is 'none' there and None here"):
        Archive.open(tmp_path, CODEC, {k: v for k, v in FINGERPRINT.items() if k != "data"})


@pytest.mark.parametrize(("key", "value"), [("version", 2), ("kind", "run")])
def test_an_unknown_version_or_kind_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    header = {"kind": "search_history", "version": 1, "fingerprint": FINGERPRINT} | {key: value}
    io.append_line(tmp_path / HISTORY_FILE, seal(header))
    with pytest.raises(UserError, match=f"line 1 .*{key} {value!r}.*(1|'search_history')"):
        Archive.open(tmp_path, CODEC, FINGERPRINT)


def test_only_the_next_new_record_can_follow(tmp_path: Path) -> None:
    archive = filled(tmp_path)
    before = (tmp_path / HISTORY_FILE).read_bytes()
    for wrong in (record(4), record(2), record(3, key="1")):
        with pytest.raises(RuntimeError, match="cannot follow 3 records"):
            archive.append(wrong)
    assert (tmp_path / HISTORY_FILE).read_bytes() == before
    archive.append(record(3, key="1", fidelity=256))


def test_attempts_are_counted_until_released(tmp_path: Path) -> None:
    archive = filled(tmp_path, 0)
    archive.start([0, 1])
    archive.start([1])
    archive.release([0])
    for opened in (archive, Archive.open(tmp_path, CODEC, FINGERPRINT)):
        assert [opened.attempts(index) for index in range(3)] == [0, 2, 0]


def test_a_reader_writes_nothing(tmp_path: Path) -> None:
    reader = Archive.open(tmp_path / "new", CODEC, FINGERPRINT, writable=False)
    reader.start([0])
    reader.append(record(0))
    reader.save_traceback(0, "text")
    assert len(reader.records) == 1 and not (tmp_path / "new").exists()


def test_the_form_on_disk_is_the_recorded_one(tmp_path: Path) -> None:
    """The archive is an artifact that users keep: a change of its form needs a new version."""
    run_search(tmp_path, RandomSearch(2), WordSpace(2, 2), rugged, 1, seed=5)
    header, line = (json.loads(text) for text in (tmp_path / HISTORY_FILE).read_text().splitlines())
    assert header.keys() == {"kind", "version", "fingerprint", "crc"}
    assert header["fingerprint"].keys() == {
        *("space", "strategy", "seed", "fidelity", "cost_limits", "initial", "objective", "data", "base_weights")
    }
    letters = line["candidate"]["letters"]
    assert line == {
        "kind": "result",
        "index": 0,
        "generation": 0,
        "key": "".join(map(str, letters)),
        "candidate": {"letters": letters},
        "fidelity": 1,
        "source": "random",
        "score": rugged(Word(tuple(letters))),
        "failure": None,
        "cost": {"sum": float(sum(letters))},
        "facts": {"fidelity": 1},
        "seeds": [5, 0],
        "crc": line["crc"],
    }
