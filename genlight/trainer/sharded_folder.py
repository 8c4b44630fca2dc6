"""A checkpoint of many processes: one folder, whole or not there at all.

The processes write into a staging folder beside the final one. When all are through, process 0 moves the files,
writes the manifest (SHA-256 and size of every file) and renames, by `genlight.io.atomic_folder`. A folder without a
manifest was not written here: its shards may be pickled files, and it is refused.

    step-000500.ckpt/
      manifest.json
      trainer.safetensors      the trainer's state: loops, callbacks, schedulers
      weights.safetensors      the whole model in fp32, whatever the number of processes
      checkpoint/*.pt          one shard per process, safetensors files under the names that DeepSpeed gives them
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from genlight.errors import UserError
from genlight.io import (
    atomic_folder,
    create_folder,
    load_state,
    load_tensors,
    remove_path,
    save_state,
    save_tensors,
    verify_folder,
)

SHARDS = "checkpoint"
MANIFEST = "manifest.json"
TRAINER_FILE = "trainer.safetensors"
WEIGHTS_FILE = "weights.safetensors"
_TRAINER_KIND = "sharded-trainer-state"
# scripts that DeepSpeed puts beside the shards; they unpickle, and would fail on these shards
_RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


def is_sharded_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder written by `commit`; its content is not verified."""
    folder = Path(path)
    return (folder / MANIFEST).is_file() and (folder / WEIGHTS_FILE).is_file()


def check_sharded_checkpoint(path: str | os.PathLike[str]) -> None:
    """Verifies every file of a sharded checkpoint against its manifest.

    Raises:
        UserError: if `path` is no folder, was not written here, or a file in it is missing or has changed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no sharded checkpoint: this strategy continues from a folder that it wrote itself"
        )
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} is not a checkpoint written by genlight (it has no {MANIFEST}): shards of other programs are "
            "pickled files, which are never read; export the weights as safetensors where they were made"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(f"{folder} is no sharded checkpoint: it holds no {WEIGHTS_FILE}")
    verify_folder(folder)


def staging_folder(path: str | os.PathLike[str]) -> Path:
    """Where the processes write before the checkpoint at `path` appears.

    The name is the same in every process, and one that `genlight.io.remove_leftovers` sweeps.
    """
    final = Path(path)
    return final.with_name(f".{final.name}.tmp-shards")


def make_staging(path: str | os.PathLike[str]) -> None:
    """Makes the staging folder of `path`, without what a killed run left there."""
    drop_staging(path)
    create_folder(staging_folder(path))


def drop_staging(path: str | os.PathLike[str]) -> None:
    """Removes the staging folder of `path`, if there is one."""
    remove_path(staging_folder(path))


def write_common(
    staging: Path,
    weights: Mapping[str, Tensor],
    trainer_state: Mapping[str, Any],
    labels: Mapping[str, str] | None = None,
) -> None:
    """Writes what belongs to all processes; called by process 0.

    Args:
        labels: how far the training was, which is read without the state.
    """
    save_tensors(staging / WEIGHTS_FILE, dict(weights), {"kind": "consolidated-weights"})
    save_state(staging / TRAINER_FILE, dict(trainer_state), kind=_TRAINER_KIND, labels=labels)


def read_trainer_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The trainer's state, as given to `write_common`."""
    state: dict[str, Any] = load_state(Path(path) / TRAINER_FILE, kind=_TRAINER_KIND)
    return state


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The whole model of the folder at `path`, on the CPU."""
    return load_tensors(Path(path) / WEIGHTS_FILE)[0]


def commit(path: str | os.PathLike[str]) -> None:
    """Makes the staged files the checkpoint at `path`, in place of an older one; called by process 0."""
    staging = staging_folder(path)
    for script in _RECOVERY_SCRIPTS:
        (staging / script).unlink(missing_ok=True)
    with atomic_folder(path, replace=True) as folder:
        for entry in sorted(staging.iterdir()):
            os.rename(entry, Path(folder) / entry.name)
    staging.rmdir()


def remove(path: str | os.PathLike[str]) -> None:
    """Deletes a sharded checkpoint; killed half-way, it leaves a folder that is not taken for whole."""
    (Path(path) / MANIFEST).unlink(missing_ok=True)
    remove_path(path)
