"""A trajectory out of checkpoints of the trainer that are there already."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from genlight import io
from genlight.checkpoints.trajectory import INDEX_FILE, Trajectory
from genlight.checkpoints.writer import TrajectoryWriter
from genlight.errors import UserError

_RAW = "current_model_state"


def import_checkpoints(
    paths: Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    names: Iterable[str],
    *,
    skip_damaged: bool = False,
) -> Trajectory:
    """Write the trained weights of checkpoint files (``.ckpt``) as a trajectory, whole or not at all.

    Where a run averages its weights, ``state_dict`` holds the average, and the trained weights are taken from
    ``current_model_state``; `origin` says under "weights" which it was.

    Args:
        paths: checkpoints of one training, in any order.
        folder: a new folder for the trajectory.
        names: the parameters to take: those that the module trains.
        skip_damaged: leave out files that are damaged instead of raising; `damaged` of the trajectory says why.

    Raises:
        UserError: a trajectory is there already; no checkpoint; two of the same step; of different modules, or with and
            without average; a parameter that is missing or of another shape: the message names the file.
        CorruptFileError: a file is damaged.
        ValueError: no name.
    """
    names = sorted(set(names))
    if (Path(folder) / INDEX_FILE).exists():
        raise UserError(f"{folder} holds a trajectory already: choose another folder, or remove it")
    found, damaged = dict[int, tuple[Path, str]](), list[str]()
    first: tuple[dict[str, Any], dict[str, tuple[int, ...]]] | None = None
    for path in map(Path, paths):
        try:
            checkpoint = _load(path)
        except io.CorruptFileError as error:
            if not skip_damaged:
                raise
            damaged.append(str(error))
            continue
        step = int(checkpoint["global_step"])
        if step in found:
            raise UserError(f"{path} and {found[step][0]} are both of step {step}: give one of them")
        tensors = _weights(checkpoint, names, path)
        meaning = {"module": checkpoint.get("genlight_module"), "weights": _source(checkpoint)}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        first = first or (meaning, shapes)
        _check_same(first, (meaning, shapes), path)
        found[step] = (path, _source(checkpoint))
    if first is None:
        raise UserError("; ".join(["no checkpoint was given to make a trajectory of", *damaged[:1]]))
    steps = sorted(found)
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    module = hashlib.sha256(json.dumps(first[0]["module"], sort_keys=True, default=str).encode()).hexdigest()
    origin = {"module": module, "parameters": "imported", "weights": first[0]["weights"], "damaged": damaged}
    with io.atomic_folder(folder) as part:
        writer = TrajectoryWriter(part, first[1], origin, every_n_steps=min(gaps, default=1), max_members=len(steps))
        for step in steps:
            # read again rather than hold all in memory
            writer.append(step, _weights(_load(found[step][0]), names, found[step][0]))
        writer.close()
    return Trajectory.open(folder)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is no checkpoint file")
    checkpoint = io.load_state(path, kind="checkpoint")
    if not isinstance(checkpoint, dict) or not {"global_step", "state_dict"} <= set(checkpoint):
        raise io.CorruptFileError(f"{path} is not a checkpoint of a training")
    return checkpoint


def _source(checkpoint: dict[str, Any]) -> str:
    return _RAW if _RAW in checkpoint else "state_dict"


def _weights(checkpoint: dict[str, Any], names: list[str], path: Path) -> dict[str, Tensor]:
    state = checkpoint[_source(checkpoint)]
    if missing := [name for name in names if name not in state]:
        raise UserError(f"{path} holds no parameter {missing[0]!r}")
    return {name: state[name].float() for name in names}


def _check_same(first: tuple[Any, Any], other: tuple[Any, Any], path: Path) -> None:
    for what, there, here in (("", first[0], other[0]), ("shape of ", first[1], other[1])):
        for key in there:
            if there[key] != here[key]:
                raise UserError(
                    f"{path} is of another training than the first checkpoint: {what}{key} is {here[key]!r}, "
                    f"there {there[key]!r}"
                )
