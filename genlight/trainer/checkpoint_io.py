"""Lightning checkpoints as single files that verify themselves, written atomically in their own folder.

Lightning's own writer goes through the system's temporary folder and copies across file systems, syncs nothing, and
loads a flipped bit in silence.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins import CheckpointIO

from genlight import io
from genlight.errors import UserError
from genlight.trainer.sharded_folder import TRAINER_FILE

CHECKPOINT_KIND = "checkpoint"
_STEP_IN_NAME = re.compile(r"(?:step[=_-]?|^)(\d+)")
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_PROTOCOL = b"\x80"


class AtomicCheckpointIO(CheckpointIO):
    """A Lightning plugin: `Trainer(plugins=[AtomicCheckpointIO()])`. The strategy calls `save_checkpoint` on rank 0
    only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint so that `path` holds the old one or the new one, whole.

        Raises:
            TypeError: the checkpoint holds an object that is not plain state (its place is named), or `storage_options`
                are given.
            DiskFullError: no room; the old file is untouched.
        """
        if storage_options is not None:
            raise TypeError(
                f"storage_options are for remote stores; checkpoints are local files here, got {storage_options!r}"
            )
        _refuse_url(path)
        io.save_state(path, checkpoint, kind=CHECKPOINT_KIND, labels=progress_labels(checkpoint))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read and verify a checkpoint, tensors on the CPU (Lightning moves them). The other arguments do not apply.

        Raises:
            UserError: see `load_checkpoint`.
        """
        return load_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint file or folder; a missing one is no error."""
        io.remove_path(path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and verify a checkpoint written by `AtomicCheckpointIO`.

    Raises:
        UserError: a URL, a missing file, a folder, or a pickle.
        CorruptFileError: truncated or altered.
    """
    _refuse_url(path)
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; a checkpoint file is needed (they end in .ckpt)")
    _refuse_pickle(path)
    checkpoint = io.load_state(path, kind=CHECKPOINT_KIND)
    if not isinstance(checkpoint, dict):
        raise io.CorruptFileError(f"{path} holds a {type(checkpoint).__name__} where a checkpoint is a dict")
    return checkpoint


def newest_whole_checkpoint(folder: str | Path) -> tuple[Path | None, list[tuple[Path, UserError | OSError]]]:
    """The newest checkpoint of a folder that verifies, and those newer ones that do not, with the reason.

    Newest is the highest training step that the file states, else the one in its name; never the time of the file. A
    folder that ends in .ckpt counts if it has a manifest and matches it.

    Returns:
        path: None where no checkpoint is whole.
        skipped: for each one passed over its path, and what was raised: `CorruptFileError` where it is damaged.
    """
    skipped: list[tuple[Path, UserError | OSError]] = []
    seen: set[Path] = set()
    for path in sorted(Path(folder).glob("*.ckpt"), key=_newness, reverse=True):
        real = path.resolve()
        if real in seen:
            continue
        seen.add(real)
        try:
            if path.is_dir():
                io.verify_folder(path)
            else:
                load_checkpoint(path)
        except (UserError, OSError) as error:
            skipped.append((path, error))
            continue
        return path, skipped
    return None, skipped


def _newness(path: Path) -> tuple[int, int, int, str]:
    labels: dict[str, str] = {}
    with suppress(UserError, OSError):
        labels = io.read_labels(path / TRAINER_FILE if path.is_dir() else path)
    numbers = [_number(labels.get(key, "")) for key in ("step", "batches", "epochs")]
    if numbers[0] < 0 and (match := _STEP_IN_NAME.search(path.name)):
        numbers[0] = _number(match.group(1))
    return numbers[0], numbers[1], numbers[2], path.name


def _number(text: str) -> int:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else -1


def progress_labels(checkpoint: dict[str, Any]) -> dict[str, str]:
    """How far the training was: optimizer steps, then batches, then epochs, for files of the same step."""
    labels = {"step": str(int(checkpoint.get("global_step", 0)))}
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    for label, key in (("batches", "epoch_loop.batch_progress"), ("epochs", "epoch_progress")):
        if key in loops:
            labels[label] = str(loops[key]["total"]["processed"])
    return labels


def _refuse_url(path: str | Path) -> None:
    if "://" in str(path) or re.match(r"[a-z][a-z0-9+.-]+:/[^/]", str(path)):
        raise UserError(f"{path} is a URL: checkpoints are read from local files only; download it first")


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(9)
    # The length of a safetensors header may also begin with the byte of the pickle protocol; its text begins with a
    # brace.
    is_pickle = start[:1] == _PICKLE_PROTOCOL and start[1:2] in b"\x02\x03\x04\x05" and start[8:] != b"{"
    if start[:4] == _ZIP_MAGIC or is_pickle:
        raise UserError(
            f"{path} was written by torch.save: it is a pickle, which can run code, and is not read; "
            "convert it to safetensors first"
        )
