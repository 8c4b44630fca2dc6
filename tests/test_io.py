"""What genlight.io promises on a healthy disk: exact round trips, every altered bit noticed, no path out of a
folder."""

import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight import io
from genlight.errors import UserError
from genlight.io import primitives, tensors

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def same(first, second) -> bool:
    """Equal in type, order, value and bits."""
    if isinstance(first, torch.Tensor):
        first, second = first.detach().contiguous(), second.contiguous()
        raw = [tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8) for tensor in (first, second)]
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(*raw)
    if isinstance(first, numpy.ndarray | numpy.generic):
        return type(first) is type(second) and first.shape == second.shape and first.tobytes() == second.tobytes()
    if isinstance(first, dict):
        pairs = zip(first.items(), second.items(), strict=True)
        return type(second) is dict and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if type(first) is not type(second):
        return False
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float):
        return struct.pack("d", first) == struct.pack("d", second) or (math.isnan(first) and math.isnan(second))
    return bool(first == second)


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    state = {"weights": torch.randn(40, generator=torch.Generator().manual_seed(0)), "step": 7, "names": ["a", "b"]}
    io.save_state(tmp_path / "state.ckpt", state, kind="checkpoint", labels={"step": "7"})
    return tmp_path / "state.ckpt"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_tensor_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.arange(24).reshape(2, 12).to(torch.uint8)
    base = (numbers % 2).bool() if dtype == torch.bool else numbers.repeat(1, dtype.itemsize).view(dtype)
    state = [base, base.T, base[0, 0], base[:, ::2], base[:0]]
    io.save_state(tmp_path / "x", state, kind="test")
    assert same(state, io.load_state(tmp_path / "x", kind="test"))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.builds(Path, st.just("a/b")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(state=values)
def test_any_plain_structure_comes_back_equal(state, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    io.save_state(path, state, kind="test")
    assert same(state, io.load_state(path, kind="test"))


def test_numpy_sizes_and_odd_dicts(tmp_path: Path) -> None:
    state = {
        "array": numpy.arange(6, dtype="<f8").reshape(2, 3).T,
        "empty": numpy.zeros((0, 2), dtype="<i2"),
        "number": numpy.float32(1.5),
        "flag": numpy.bool_(True),
        "size": torch.Size([2, 3]),
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    }
    io.save_state(tmp_path / "x", state, kind="test")
    loaded = io.load_state(tmp_path / "x", kind="test")
    assert same({**state, "parameter": state["parameter"].data}, loaded)
    assert loaded["parameter"].requires_grad is False

    plain = {"ordered": OrderedDict(b=1, a=2), "default": defaultdict(int, x=1)}
    io.save_state(tmp_path / "y", plain, kind="test")
    assert same({"ordered": {"b": 1, "a": 2}, "default": {"x": 1}}, io.load_state(tmp_path / "y", kind="test"))


def test_big_endian_arrays_keep_their_values(tmp_path: Path) -> None:
    io.save_state(tmp_path / "x", numpy.arange(3, dtype=">i4"), kind="test")
    assert io.load_state(tmp_path / "x", kind="test").tolist() == [0, 1, 2]


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    tied = torch.randn(1000)
    io.save_state(tmp_path / "x", {"a": tied, "b": tied, "part": tied[:10]}, kind="test")
    loaded = io.load_state(tmp_path / "x", kind="test")
    assert loaded["a"] is loaded["b"] and torch.equal(loaded["part"], tied[:10])
    assert (tmp_path / "x").stat().st_size < 6000


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "builtins.object"),
        ({1, 2}, "builtins.set"),
        (Point(1, 2), "Point"),
        (lambda: None, "function"),
        (numpy.array(["text"]), "numpy.ndarray"),
        (torch.float32, "torch.dtype"),
        (torch.empty(2, device="meta"), "tensor without plain memory"),
        (torch.eye(2).to_sparse(), "tensor without plain memory"),
    ],
)
def test_other_objects_are_refused_by_place_and_name(value: object, named: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['callbacks'\]\[1\]") as error:
        io.save_state(tmp_path / "x", {"callbacks": [0, value]}, kind="test")
    assert named in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_odd_keys_and_endless_structures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"key of type builtins.frozenset"):
        io.save_state(tmp_path / "x", {frozenset(): 1}, kind="test")
    loop: list = []
    loop.append(loop)
    with pytest.raises(ValueError, match="nested deeper than 64"):
        io.save_state(tmp_path / "x", loop, kind="test")


def test_any_safetensors_reader_opens_the_file(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    saved = {
        "weight": torch.randn(3, 5).bfloat16(),
        "bias": torch.arange(3),
        "odd": torch.tensor([1], dtype=torch.int8),
    }
    io.save_tensors(tmp_path / "m.safetensors", saved, {"architecture": "é"})
    assert same(saved, {name: load_file(tmp_path / "m.safetensors")[name] for name in saved})
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["architecture"] == "é"
    loaded, metadata = io.load_tensors(tmp_path / "m.safetensors")
    assert same(saved, {name: loaded[name] for name in saved}) and metadata == {"architecture": "é"}


def test_flat_tensors_refuse_what_the_format_cannot_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'x' cannot be saved"):
        io.save_tensors(tmp_path / "m", {"x": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="'sha256'"):
        io.save_tensors(tmp_path / "m", {}, {"sha256": "0"})
    with pytest.raises(TypeError, match="must be texts"):
        io.save_tensors(tmp_path / "m", {}, {"step": 1})  # type: ignore[dict-item]


def test_every_flipped_bit_is_noticed(state_file: Path) -> None:
    whole = state_file.read_bytes()
    rng = random.Random(0)
    header = range(8 * 8)  # each bit of the length, then random places
    for bit in [*header, *rng.sample(range(64, 8 * len(whole)), 300)]:
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        state_file.write_bytes(altered)
        with pytest.raises(io.CorruptFileError, match=r"state\.ckpt"):
            io.load_state(state_file, kind="checkpoint")


def test_every_truncation_and_addition_is_noticed(state_file: Path) -> None:
    whole = state_file.read_bytes()
    for length in sorted({0, 1, 7, 8, 9, 40, len(whole) - 1, *random.Random(1).sample(range(len(whole)), 20)}):
        state_file.write_bytes(whole[:length])
        with pytest.raises(io.CorruptFileError, match=r"state\.ckpt"):
            io.load_state(state_file, kind="checkpoint")
    state_file.write_bytes(whole + b"\0")
    with pytest.raises(io.CorruptFileError):
        io.load_state(state_file, kind="checkpoint")


def sealed(header: dict, data: bytes) -> bytes:
    """A file with a right checksum over any content: what an attacker can make."""
    import hashlib

    header = {"__metadata__": {"sha256": "0" * 64, **header.pop("__metadata__", {})}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    digest = hashlib.sha256(whole).hexdigest().encode()
    return whole.replace(b"0" * 64, digest, 1)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize(
    "header",
    [
        {"t": entry(offsets=(4, 12))},
        {"t": entry(shape=(3,))},
        {"t": entry(shape=(1 << 60, 1 << 60))},
        {"t": entry(shape=(-2,))},
        {"t": entry(dtype="OBJECT")},
        {"t": entry(offsets=(0, 1 << 70))},
        {"t": entry(more=1)},
        {"t": 3},
        {},
        {"t": entry(), "u": entry()},
        {"__metadata__": {"step": 3}, "t": entry()},
    ],
)
def test_hostile_headers_are_refused(header: dict, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(sealed(header, b"\0" * 8))
    with pytest.raises(io.CorruptFileError):
        io.load_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    "structure",
    [
        '["eval","1"]',
        "{}",
        '["tensor","float32",[2],"missing"]',
        '["tensor","float64",[2],"t"]',
        '["tensor","load",[2],"t"]',
        '["tensor","complex128",[9],"t"]',
        '["dict",[1]]',
        '["dict",[["list"],1]]',
        '["bytes","?"]',
        '["ndarray","O",[1],"t"]',
        '["float","1"]',
        "[]",
        "[[]]",
        "NaN",
        "[" * 5000,
    ],
)
def test_hostile_structures_are_refused(structure: str, tmp_path: Path) -> None:
    metadata = {"format": "genlight.state", "version": "1", "kind": "k", "structure": structure}
    (tmp_path / "x").write_bytes(sealed({"__metadata__": metadata, "t": entry()}, b"\0" * 8))
    with pytest.raises(io.CorruptFileError, match="x"):
        io.load_state(tmp_path / "x", kind="k")


def test_kind_version_and_format_are_checked(state_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kind 'checkpoint', where 'search' is needed"):
        io.load_state(state_file, kind="search")
    io.save_tensors(tmp_path / "flat", {"t": torch.zeros(1)})
    with pytest.raises(io.CorruptFileError, match="not a state file"):
        io.load_state(tmp_path / "flat", kind="checkpoint")
    io.save_tensors(tmp_path / "new", {}, {"format": "genlight.state", "version": "9"})
    with pytest.raises(UserError, match="version '9'"):
        io.load_state(tmp_path / "new", kind="checkpoint")
    with pytest.raises(FileNotFoundError):
        io.load_state(tmp_path / "absent", kind="checkpoint")


def test_labels_are_read_from_the_header(state_file: Path) -> None:
    assert io.read_labels(state_file) == {"step": "7"}
    state_file.write_bytes(state_file.read_bytes()[:50])
    with pytest.raises(io.CorruptFileError):
        io.read_labels(state_file)
    state_file.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(io.CorruptFileError):
        io.read_labels(state_file)


def test_a_header_beyond_the_format_is_refused_before_writing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensors, "_MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match="the header of"):
        io.save_state(tmp_path / "x", list(range(1000)), kind="test")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"a": NaN}', "not a number"),
        (b"[-Infinity]", "not a number"),
        (b"[1e999]", "too large"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested deeper"),
        (b"[" + b"1," * 1_000_000 + b"1]", "more than 200,000 entries"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(300_000)) + b"}", "more than 200,000 entries"),
        (b'"' + b"x" * 9_000_000 + b'"', "longer than 8,388,608 bytes"),
        (b"[" + b"9" * 5000 + b"]", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'\xef\xbb\xbf{"a":1}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'["' + b"\\" * 200_001 + b'"' + b"[" * 100, "not valid JSON"),
        (b"[" * 10 + b'"' + b'\\"' * 500_000 + b"[" * 100, "not valid JSON"),
        (b"[1]," * 190_000, "not valid JSON"),
    ],
)
def test_hostile_json_is_refused_quickly(text: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.json"
    path.write_bytes(text)
    times = []
    for _ in range(3):
        start = time.process_time()
        with pytest.raises(io.CorruptFileError, match=reason) as error:
            io.read_json(path)
        times.append(time.process_time() - start)
    assert "hostile.json" in str(error.value) and len(str(error.value)) < 300
    assert min(times) < 0.05
    tracemalloc.start()
    with pytest.raises(io.CorruptFileError):
        io.read_json(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_brackets_inside_texts_are_not_depth() -> None:
    assert io.parse_json('["' + "[{" * 100 + '\\"["]', "x") == ["[{" * 100 + '"[']
    assert io.parse_json("[" + "[]," * 100 + "[]]", "x")[0] == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé"\\\n☃'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=60, deadline=None)
@given(value=json_values)
def test_json_round_trip(value, tmp_path_factory) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    io.atomic_write_json(path, value)
    assert io.read_json(path) == value


@pytest.mark.parametrize(("value", "kind"), [(math.nan, ValueError), ({1: 2}, TypeError), ({"a": object()}, TypeError)])
def test_json_refuses_what_it_cannot_hold(value, kind, tmp_path: Path) -> None:
    io.atomic_write_text(tmp_path / "x.json", "old")
    with pytest.raises(kind):
        io.atomic_write_json(tmp_path / "x.json", value)
    assert (tmp_path / "x.json").read_text() == "old"


def test_lines_are_appended_and_a_torn_one_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "history.jsonl"
    io.append_line(path, "first")
    io.append_line(path, "é" * 5000)
    with path.open("ab") as file:
        file.write(b"torn" * 3000)
    assert io.read_lines(path) == ["first", "é" * 5000]
    io.append_line(path, "third")
    assert io.read_lines(path) == ["first", "é" * 5000, "third"]
    path.write_bytes(b"only torn")
    io.append_line(path, "again")
    assert io.read_lines(path) == ["again"]
    with pytest.raises(ValueError, match="line break"):
        io.append_line(path, "a\nb")
    path.write_bytes(b"\xff\n")
    with pytest.raises(io.CorruptFileError, match="UTF-8"):
        io.read_lines(path)


def test_writing_replaces_links_and_makes_folders(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    io.atomic_write_text(tmp_path / "link", "new")
    assert (tmp_path / "real").read_text() == "kept" and (tmp_path / "link").read_text() == "new"
    io.atomic_write_bytes(tmp_path / "a" / "b" / "c", b"")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b""
    with pytest.raises(NotADirectoryError, match="is a file where a folder is needed"):
        io.atomic_write_text(tmp_path / "real" / "x", "")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "link").stat().st_mode & 0o777 == 0o666 & ~umask


NAMES = st.text(st.sampled_from("./\\a~$\0\n") | st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["..", "a/../..", "/etc/passwd", "a//b", "link/x", "link", "a/./b", "", "C:\\x", "..\\x", "a/b", "x" * 300]
)


@settings(max_examples=2000, deadline=None)
@given(name=NAMES)
def test_no_name_leads_out_of_the_folder(name: str, tmp_path_factory) -> None:
    folder = tmp_path_factory.getbasetemp() / "below"
    folder.mkdir(exist_ok=True)
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to("..")
    try:
        path = io.resolve_below(folder, name)
    except UserError:
        return
    assert os.path.normpath(path) == str(path) and path.resolve().is_relative_to(folder.resolve())
    assert path != folder and "\0" not in name and not name.startswith("link")


def test_a_name_through_a_ring_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(UserError, match="ring"):
        io.resolve_below(tmp_path, "ring/x")


def make_folder(path: Path, text: str = "one", replace: bool = False) -> None:
    with io.atomic_folder(path, replace=replace) as folder:
        (folder / "unet").mkdir()
        io.atomic_write_text(folder / "unet" / "weights", text * 100)
        (folder / "config.json").write_text("{}")


def test_a_folder_appears_whole_with_a_manifest(tmp_path: Path) -> None:
    make_folder(tmp_path / "model")
    io.verify_folder(tmp_path / "model")
    manifest = io.read_json(tmp_path / "model" / "manifest.json")
    assert manifest["files"]["unet/weights"] == {
        "sha256": io.sha256_of(tmp_path / "model" / "unet" / "weights"),
        "bytes": 300,
    }
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "model")
    make_folder(tmp_path / "model", "two", replace=True)
    io.verify_folder(tmp_path / "model")
    assert (tmp_path / "model" / "unet" / "weights").read_text() == "two" * 100
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="not a folder"):
        make_folder(tmp_path / "file", replace=True)


def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), io.atomic_folder(tmp_path / "model") as folder:
        (folder / "x").write_text("")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_without_exchange_the_swap_takes_two_steps(tmp_path: Path, monkeypatch) -> None:
    make_folder(tmp_path / "model")
    monkeypatch.setattr(primitives, "_exchange", lambda first, second: False)
    make_folder(tmp_path / "model", "two", replace=True)
    assert (tmp_path / "model" / "unet" / "weights").read_text() == "two" * 100
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("number", range(40))
def test_every_flipped_bit_of_a_folder_is_noticed(number: int, tmp_path: Path) -> None:
    make_folder(tmp_path / "model")
    rng = random.Random(number)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    victim = rng.choice(files) if number % 2 else tmp_path / "model" / "manifest.json"
    data = bytearray(victim.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    victim.write_bytes(data)
    with pytest.raises(io.CorruptFileError, match=victim.name):
        io.verify_folder(tmp_path / "model")


def test_missing_extra_and_escaping_files_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_folder(model)
    (model / "extra").write_text("")
    with pytest.raises(io.CorruptFileError, match="extra is not listed"):
        io.verify_folder(model)
    io.verify_folder(model, allow_extra=True)
    (model / "extra").unlink()
    (model / "config.json").write_text("{ }")
    with pytest.raises(io.CorruptFileError, match=r"config\.json has 3 bytes"):
        io.verify_folder(model)
    (model / "config.json").unlink()
    with pytest.raises(io.CorruptFileError, match=r"config\.json is missing"):
        io.verify_folder(model)
    (tmp_path / "outside").write_text("{}")
    (model / "config.json").symlink_to(tmp_path / "outside")
    with pytest.raises(io.CorruptFileError, match="leads out of"):
        io.verify_folder(model)
    with pytest.raises(UserError, match="leads out of"):
        io.write_manifest(model)
    (model / "manifest.json").unlink()
    with pytest.raises(io.CorruptFileError, match="has no manifest"):
        io.verify_folder(model)


@pytest.mark.parametrize("change", [{"kind": "other"}, {"version": 2}, {"files": []}, {"files": {}}, {"more": 1}])
def test_foreign_manifests_are_refused(change: dict, tmp_path: Path) -> None:
    make_folder(tmp_path / "model")
    manifest = io.read_json(tmp_path / "model" / "manifest.json")
    io.atomic_write_json(tmp_path / "model" / "manifest.json", manifest | change)
    with pytest.raises(io.CorruptFileError, match="manifest"):
        io.verify_folder(tmp_path / "model")


@pytest.mark.parametrize("entry_", [1, {"sha256": "", "bytes": "1"}, {"sha256": 1, "bytes": 1}])
def test_manifests_with_odd_entries_are_refused(entry_, tmp_path: Path) -> None:
    from genlight.io import folders

    make_folder(tmp_path / "model")
    files = {"config.json": entry_}
    manifest = {"kind": "manifest", "version": 1, "sha256": folders._digest(files), "files": files}
    io.atomic_write_json(tmp_path / "model" / "manifest.json", manifest)
    with pytest.raises(io.CorruptFileError, match="form that is not known"):
        io.verify_folder(tmp_path / "model")


def test_copying_and_removing(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100)
    (tmp_path / "target").mkdir()
    assert io.copy_to_folder(tmp_path / "source", tmp_path / "target").read_bytes() == b"x" * 100
    assert io.copy_to_folder(tmp_path / "source", tmp_path / "target", "in/new").read_bytes() == b"x" * 100
    with pytest.raises(UserError):
        io.copy_to_folder(tmp_path / "source", tmp_path / "target", "../new")
    io.remove_path(tmp_path / "target")
    io.remove_path(tmp_path / "target")
    io.remove_path(tmp_path / "source")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", range(200))
def test_every_change_of_a_record_is_noticed(number: int, tmp_path: Path) -> None:
    path, content = tmp_path / "record.json", {"scores": {"a": 1.5, "b": [2, 3]}, "name": "é"}
    io.write_record(path, content, kind="scores", version=3)
    assert io.read_record(path, kind="scores", version=3) == {"kind": "scores", "version": 3, **content}
    for kind, version in (("scores", 4), ("other", 3)):
        with pytest.raises(UserError, match="is no"):
            io.read_record(path, kind=kind, version=version)
    data = bytearray(path.read_bytes())
    data[number * len(data) // 200] ^= 1 << number % 8
    path.write_bytes(data)
    with pytest.raises(io.CorruptFileError, match=r"record\.json"):
        io.read_record(path, kind="scores", version=3)


def test_importing_io_does_not_import_torch() -> None:
    program = "import sys, genlight.io, genlight.run_folder; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
