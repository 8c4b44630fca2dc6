"""Tensors and nested state in one safetensors file that verifies itself.

The first key of the header's metadata is a SHA-256 over the whole file with those 64 digits taken as zeros, so one pass
tells whether any bit changed, before anything is parsed. Any safetensors reader opens the file; nothing in it is code.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from genlight.errors import UserError
from genlight.io.errors import CorruptFileError
from genlight.io.primitives import CHUNK_BYTES, Path_, atomic_file
from genlight.io.strict_json import parse_json
from genlight.io.structure import Decoder, Encoder

if TYPE_CHECKING:
    import torch

_PREFIX = b'{"__metadata__":{"sha256":"'
_DIGEST_START = 8 + len(_PREFIX)
_DIGEST_END = _DIGEST_START + 64
_MAX_HEADER_BYTES = 100_000_000
_STATE_FORMAT = "genlight.state"
_STATE_VERSION = "1"
_RESERVED = ("sha256", "format", "version", "kind", "structure")
_LABEL = "label."

# Names of the safetensors format; what it cannot name is stored as bytes, and the structure keeps the real type.
_FORMAT_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
_DTYPE_NAMES = {name: dtype for dtype, name in _FORMAT_NAMES.items()}


def save_tensors(path: Path_, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors and texts to one safetensors file, atomically and with its own checksum.

    Args:
        path: the file to create or replace.
        tensors: any shapes, strides and devices, of a type that safetensors names.
        metadata: texts for the header; "sha256" is taken.

    Raises:
        TypeError: a tensor whose type or layout safetensors has no name for.
        ValueError: the key "sha256" in `metadata`, or a header above 100 MB.
        DiskFullError: no room; `path` is untouched.
    """
    import torch

    metadata = dict(metadata or {})
    if "sha256" in metadata:
        raise ValueError("the metadata key 'sha256' is the checksum of the file: choose another")
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"metadata of {path} must be texts, got {key!r}: {type(text).__name__}")
    for name, tensor in tensors.items():
        is_plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_meta
        if not is_plain or _dtype_name(tensor) not in _FORMAT_NAMES:
            raise TypeError(
                f"{name!r} cannot be saved to {path}: {type(tensor).__name__} {getattr(tensor, 'dtype', '')}"
            )
    _write_file(Path(path), dict(tensors), metadata)


def load_tensors(path: Path_) -> "tuple[dict[str, torch.Tensor], dict[str, str]]":
    """Read a file of `save_tensors`: tensors on the CPU, and the metadata without its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: truncated, altered, or not written by `save_tensors`.
    """
    path = Path(path)
    with path.open("rb") as file:
        _verify(file, path)
        header, start = _read_header(file, path)
        metadata = _metadata(header, path)
        return _read_tensors(file, header, start, path), {
            key: text for key, text in metadata.items() if key != "sha256"
        }


def save_state(path: Path_, state: Any, *, kind: str, labels: Mapping[str, str] | None = None) -> None:
    """Write nested state to one file, atomically and with its own checksum.

    Args:
        path: the file to create or replace.
        state: dicts (any subclass comes back as dict), lists, tuples, None, bool, int, float (also infinite and nan),
            str, bytes, paths, torch.Size, numpy arrays and numbers, and plain tensors of every type; views of the same
            memory with the same shape come back as one tensor.
        kind: what the file is, e.g. "checkpoint"; `load_state` asks for it.
        labels: short texts that `read_labels` gives without reading the file whole.

    Raises:
        TypeError: an object of another kind; the message gives its place in the structure.
        ValueError: nested too deeply, or a header above 100 MB.
        DiskFullError: no room; `path` is untouched.
    """
    import torch

    encoder = Encoder()
    structure = json.dumps(encoder.encode(state), separators=(",", ":"))
    metadata = {"format": _STATE_FORMAT, "version": _STATE_VERSION, "kind": kind}
    metadata |= {_LABEL + key: text for key, text in (labels or {}).items()}
    metadata["structure"] = structure
    stored = {
        name: tensor if _dtype_name(tensor) in _FORMAT_NAMES else _plain_memory(tensor).reshape(-1).view(torch.uint8)
        for name, tensor in encoder.tensors.items()
    }
    _write_file(Path(path), stored, metadata)


def load_state(path: Path_, *, kind: str) -> Any:
    """Read a file of `save_state`, tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: truncated, altered, or not written by `save_state`.
        UserError: whole, but of another kind or a newer version.
    """
    import torch

    path = Path(path)
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _STATE_FORMAT:
        raise CorruptFileError(f"{path} is not a state file of genlight")
    if metadata.get("version") != _STATE_VERSION:
        raise UserError(
            f"{path} has version {metadata.get('version')!r} of the state format; {_STATE_VERSION!r} is known here"
        )
    if metadata.get("kind") != kind:
        raise UserError(f"{path} is of kind {metadata.get('kind')!r}, where {kind!r} is needed")
    structure = _parse_structure(metadata.get("structure", ""), path)
    for dtype, shape, name in _raw_tensors(structure):
        if name in tensors and isinstance(real := getattr(torch, dtype, None), torch.dtype):
            try:
                tensors[name] = tensors[name].view(real).reshape(shape)
            except (RuntimeError, TypeError):
                raise CorruptFileError(f"{path}: tensor {name!r} has not the form its structure states") from None
    return Decoder(tensors, str(path)).decode(structure)


def _parse_structure(text: str, path: Path) -> Any:
    return parse_json(
        text, f"{path} (structure)", max_bytes=_MAX_HEADER_BYTES, max_depth=400, max_entries=_MAX_HEADER_BYTES
    )


def _raw_tensors(structure: Any) -> Iterator[tuple[str, list[int], str]]:
    """The tensors of a structure that the file holds as bytes: (type, shape, name)."""
    pending = [structure]
    while pending:
        value = pending.pop()
        if not isinstance(value, list) or not value:
            continue
        if value[0] == "tensor" and len(value) == 4 and isinstance(value[1], str) and isinstance(value[3], str):
            if value[1] not in _FORMAT_NAMES:
                yield value[1], value[2], value[3]
        else:
            pending.extend(value)


def read_labels(path: Path_) -> dict[str, str]:
    """The labels given to `save_state`, from the header alone: quick, and not yet verified.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: the header cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        metadata = _metadata(_read_header(file, path)[0], path)
    return {key.removeprefix(_LABEL): text for key, text in metadata.items() if key.startswith(_LABEL)}


def _dtype_name(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _plain_memory(tensor: "torch.Tensor") -> "torch.Tensor":
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def _chunks(tensor: "torch.Tensor") -> Iterator[memoryview]:
    """The memory of a tensor, little-endian and contiguous, in pieces."""
    import torch

    if not tensor.numel():
        return
    memory: Any = _plain_memory(tensor).reshape(-1).view(torch.uint8).numpy()
    view = memoryview(memory)
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def _write_file(path: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str]) -> None:
    # Wide types first: then every tensor is aligned to its own size, with no gaps, which the format forbids.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"sha256": "0" * 64, **metadata}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _FORMAT_NAMES[_dtype_name(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise ValueError(
            f"the header of {path} would have {len(text):,} bytes, the format allows {_MAX_HEADER_BYTES:,}: "
            "store long lists as tensors"
        )
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    for name in order:
        for chunk in _chunks(tensors[name]):
            digest.update(chunk)
    head = head[:_DIGEST_START] + digest.hexdigest().encode("ascii") + head[_DIGEST_END:]
    with atomic_file(path, len(head) + end) as write:
        write(head)
        for name in order:
            for chunk in _chunks(tensors[name]):
                write(chunk)


def _verify(file: BinaryIO, path: Path) -> None:
    """Compare the checksum in the file with its content; leaves the file at its start."""
    start = file.read(_DIGEST_END)
    stated = start[_DIGEST_START:]
    if start[8:_DIGEST_START] != _PREFIX or not re.fullmatch(rb"[0-9a-f]{64}", stated):
        raise CorruptFileError(f"{path} is truncated, altered, or not a file of genlight: its header has no checksum")
    digest = hashlib.sha256(start[:_DIGEST_START] + b"0" * 64)
    while block := file.read(CHUNK_BYTES):
        digest.update(block)
    if digest.hexdigest().encode("ascii") != stated:
        raise CorruptFileError(f"{path} is truncated or altered: its SHA-256 differs from the one it states")
    file.seek(0)


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    size = int.from_bytes(file.read(8), "little")
    if size > min(_MAX_HEADER_BYTES, max(0, os.fstat(file.fileno()).st_size - 8)):
        raise CorruptFileError(f"{path} is truncated or altered: its header would reach beyond the file")
    header = parse_json(file.read(size), f"{path} (header)", max_bytes=_MAX_HEADER_BYTES, max_entries=_MAX_HEADER_BYTES)
    if not isinstance(header, dict):
        raise CorruptFileError(f"{path} has a header that is not known")
    return header, 8 + size


def _metadata(header: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CorruptFileError(f"{path} has no metadata of genlight in its header")
    return metadata


def _read_tensors(file: BinaryIO, header: dict[str, Any], start: int, path: Path) -> "dict[str, torch.Tensor]":
    entries = [(name, *_entry(entry, name, path)) for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry[3], entry[4]))
    tensors, position = {}, 0
    size = os.fstat(file.fileno()).st_size - start
    for name, dtype, shape, begin, end in entries:
        if begin != position or end > size:
            raise CorruptFileError(f"{path}: tensor {name!r} lies outside its place in the file")
        tensors[name] = _read_tensor(file, dtype, shape, end - begin, path, name)
        position = end
    if position != size:
        raise CorruptFileError(f"{path} has {size - position:,} bytes that belong to no tensor")
    return {name: tensors[name] for name in header if name != "__metadata__"}


def _entry(entry: Any, name: str, path: Path) -> tuple[str, list[int], int, int]:
    is_entry = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    if (
        is_entry
        and entry["dtype"] in _DTYPE_NAMES
        and isinstance(entry["shape"], list)
        and isinstance(entry["data_offsets"], list)
    ):
        shape, offsets = entry["shape"], entry["data_offsets"]
        if all(type(number) is int and number >= 0 for number in shape + offsets) and len(offsets) == 2:
            return _DTYPE_NAMES[entry["dtype"]], shape, offsets[0], offsets[1]
    raise CorruptFileError(f"{path} describes tensor {name!r} in a form that is not known")


def _read_tensor(file: BinaryIO, dtype: str, shape: list[int], size: int, path: Path, name: str) -> "torch.Tensor":
    import torch

    real: torch.dtype = getattr(torch, dtype)
    if size != math.prod(shape) * real.itemsize:
        raise CorruptFileError(f"{path}: tensor {name!r} of shape {shape} cannot have {size:,} bytes")
    tensor = torch.empty(shape, dtype=real)
    memory: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    if size and file.readinto(memory) != size:  # type: ignore[attr-defined]
        raise CorruptFileError(f"{path} is truncated in tensor {name!r}")
    return tensor
