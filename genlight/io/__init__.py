"""Every write, checksum and self-verifying file of genlight.

`primitives` holds the only system calls that change the disk, so it is the one place where tests inject faults. Above
it: `strict_json` reads what others may have written, `folders` writes whole folders with a manifest, `tensors` stores
nested state in one safetensors file. Importing this package does not import torch.
"""

from genlight.io.errors import CorruptFileError, DiskFullError
from genlight.io.folders import (
    atomic_folder,
    copy_to_folder,
    resolve_below,
    sha256_of,
    verify_folder,
    verify_if_described,
    write_manifest,
)
from genlight.io.primitives import (
    append_line,
    atomic_file,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    create_folder,
    read_lines,
    remove_leftovers,
    remove_path,
    rename,
)
from genlight.io.records import read_record, write_record
from genlight.io.strict_json import parse_json, read_json
from genlight.io.tensors import load_state, load_tensors, read_labels, save_state, save_tensors

__all__ = [
    "CorruptFileError",
    "DiskFullError",
    "append_line",
    "atomic_file",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "copy_to_folder",
    "create_folder",
    "load_state",
    "load_tensors",
    "parse_json",
    "read_json",
    "read_labels",
    "read_lines",
    "read_record",
    "remove_leftovers",
    "remove_path",
    "rename",
    "resolve_below",
    "save_state",
    "save_tensors",
    "sha256_of",
    "verify_folder",
    "verify_if_described",
    "write_manifest",
    "write_record",
]
