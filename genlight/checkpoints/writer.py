"""Writing a trajectory: member after member, or a set of means at once; and a thread that does it beside training."""

import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from genlight import io
from genlight.checkpoints.trajectory import INDEX_FILE, Index, Member, StoredType, read_index, write_index
from genlight.errors import UserError


@dataclass(frozen=True)
class Snapshot:
    """Weights to be written: of one step, or the mean over `count` checkpoints from `first_step` to `last_step`."""

    first_step: int
    last_step: int
    count: int
    lr: float | None
    tensors: Mapping[str, Tensor]


class TrajectoryWriter:
    """Writes the members of one training to a folder. The disk is first touched by `append`, `replace_all` or `close`.

    Every file is whole before the index names it, and leaves the index before it is removed: a process killed at any
    point leaves a trajectory that opens. Only one process may write to a folder.

    Args:
        folder: created if it is missing.
        shapes: shape of each parameter, by name.
        origin: where the weights come from, as plain values; `every_n_steps` is added.
        every_n_steps: optimizer steps between two members.
        max_members: how many of the newest are kept.
        dtype: "float32", or "bfloat16_difference": members are written in float32, and `close` turns all but the newest
            into 16-bit differences to it, which needs the larger room until then.
        resume_at: the optimizer step that training continues from: later members are dropped; 0 drops all. None keeps
            what is there. From a later step than 0 on, the interval may be another one than that of the members there.

    Raises:
        ValueError: a value out of range, or no parameter.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        shapes: Mapping[str, Iterable[int]],
        origin: Mapping[str, Any],
        *,
        every_n_steps: int,
        max_members: int = 150,
        dtype: StoredType = "float32",
        resume_at: int | None = None,
    ) -> None:
        if not shapes:
            raise ValueError("a trajectory needs at least one parameter, got none")
        for key, value in (("every_n_steps", every_n_steps), ("max_members", max_members)):
            if value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        if dtype not in get_args(StoredType):
            raise ValueError(f"dtype must be one of {get_args(StoredType)}, got {dtype!r}")
        self.folder = Path(folder)
        self.shapes = {name: tuple(int(n) for n in shapes[name]) for name in sorted(shapes)}
        self.origin = {**origin, "every_n_steps": every_n_steps}
        self.max_members = max_members
        self.dtype = dtype
        self.resume_at = resume_at
        self._members: list[Member] | None = None

    def check(self) -> None:
        """Read the index that is there, and change nothing.

        Raises:
            UserError: it is of another training: the first difference is shown.
            CorruptFileError: it is damaged.
        """
        self._present()

    @property
    def steps(self) -> list[int]:
        """`last_step` of the members that are there and that `resume_at` keeps."""
        members = self._present() if self._members is None else self._members
        return [m.last_step for m in members if self.resume_at is None or m.last_step <= self.resume_at]

    def append(self, step: int, tensors: Mapping[str, Tensor], lr: float | None = None) -> None:
        """Add the checkpoint of `step`, and drop the oldest beyond `max_members`.

        Args:
            step: optimizer steps done; more than at the newest member.
            tensors: float32 of the shapes given before, on any device.
            lr: learning rate of that step.

        Raises:
            ValueError: the step does not follow, or the tensors differ in names, shapes or type.
            DiskFullError: no room; the trajectory is as it was.
            UserError: the folder holds the trajectory of another training.
        """
        members = self._begin()
        if members and step <= members[-1].last_step:
            raise ValueError(f"step {step} cannot follow step {members[-1].last_step}, the newest member")
        member = self._write(Snapshot(step, step, 1, lr, tensors))
        self._commit([*self._expanded(members), member][-self.max_members :])

    def replace_all(self, snapshots: Iterable[Snapshot]) -> None:
        """Make these, oldest first, the only members; raises as `append`."""
        self._begin()
        self._commit([self._write(snapshot) for snapshot in snapshots])

    def close(self, *, finished: bool = True) -> None:
        """Drop what `resume_at` drops and, with dtype "bfloat16_difference", turn members into differences.

        Args:
            finished: False: further members may follow, and differences to the newest would be to another one then.
        """
        members = self._begin()
        if not finished or self.dtype == "float32" or len(members) < 2:
            return
        newest = io.load_tensors(self.folder / members[-1].file)[0]
        for number, member in enumerate(members[:-1]):
            if member.dtype == "float32":
                weights = io.load_tensors(self.folder / member.file)[0]
                difference = {name: (weights[name] - newest[name]).bfloat16() for name in self.shapes}
                members[number] = self._save(member, difference, "bfloat16_difference")
                self._commit(members)

    def _begin(self) -> list[Member]:
        if self._members is None:
            found = self._present()
            io.create_folder(self.folder)
            kept = [m for m in found if self.resume_at is None or m.last_step <= self.resume_at]
            if len(kept) < len(found):
                # what is dropped may be what the others are differences to
                kept = self._expanded(found)[: len(kept)]
            for path in self.folder.glob(".*.tmp-*"):
                io.remove_path(path)
            self._commit(kept)
        assert self._members is not None
        return self._members

    def _present(self) -> list[Member]:
        if not (self.folder / INDEX_FILE).exists():
            return []
        index = read_index(self.folder)
        origin = dict(index.origin)
        if self.resume_at:
            # a training that goes on may be longer than it was to be, and its interval with it
            origin["every_n_steps"] = self.origin["every_n_steps"]
        for what, there, here in (("origin", origin, self.origin), ("shape", index.shapes, self.shapes)):
            for key in sorted({*there, *here}):
                if there.get(key) != here.get(key):
                    raise UserError(
                        f"{self.folder} holds the trajectory of another training: {what} {key} is {there.get(key)!r} "
                        f"there and {here.get(key)!r} here; use another folder, or remove it"
                    )
        return list(index.members)

    def _expanded(self, members: list[Member]) -> list[Member]:
        """The same members, all of them in float32."""
        if all(member.dtype == "float32" for member in members):
            return members
        base = io.load_tensors(self.folder / members[-1].file)[0]
        members = list(members)
        for number, member in enumerate(members):
            if member.dtype != "float32":
                difference = io.load_tensors(self.folder / member.file)[0]
                weights = {name: base[name] + difference[name].float() for name in self.shapes}
                members[number] = self._save(member, weights, "float32")
        return members

    def _write(self, snapshot: Snapshot) -> Member:
        tensors = snapshot.tensors
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted({*shapes, *self.shapes}):
            if shapes.get(name) != self.shapes.get(name) or tensors[name].dtype != torch.float32:
                raise ValueError(
                    f"parameter {name!r} at step {snapshot.last_step} has shape {shapes.get(name)}, float32 "
                    f"{self.shapes.get(name)} is needed"
                )
        first, last, count = snapshot.first_step, snapshot.last_step, snapshot.count
        return self._save(Member(first, last, count, snapshot.lr, "", "", "float32"), tensors, "float32")

    def _save(self, member: Member, tensors: Mapping[str, Tensor], dtype: StoredType) -> Member:
        steps = f"{member.last_step:08d}"
        if member.count > 1:
            steps = f"{member.first_step:08d}-{steps}"
        file = f"step-{steps}{'' if dtype == 'float32' else '.difference'}.safetensors"
        labels = {"kind": "trajectory_member", "count": str(member.count), "dtype": dtype}
        io.save_tensors(self.folder / file, tensors, labels)
        with safe_open(self.folder / file, framework="pt") as handle:
            sha256 = handle.metadata()["sha256"]
        return replace(member, file=file, sha256=sha256, dtype=dtype)

    def _commit(self, members: list[Member]) -> None:
        """Make these the members, durably, and then remove the files of others."""
        write_index(self.folder, Index(self.origin, self.shapes, tuple(members)))
        self._members = list(members)
        files = {member.file for member in members}
        for path in self.folder.glob("step-*.safetensors"):
            if path.name not in files:
                io.remove_path(path)


class BackgroundWriter:
    """Runs jobs one after another on a thread of its own. After a job has failed, later ones are not begun.

    Args:
        size: jobs that may wait; `put` waits while there are more.
    """

    def __init__(self, size: int = 2) -> None:
        self.error: Exception | None = None
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(size)
        self._thread: threading.Thread | None = None

    def put(self, job: Callable[[], None]) -> None:
        """Have `job` run after those before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="trajectory-writer", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def flush(self) -> None:
        """Wait until every job is done; raise the first error of them all."""
        self._jobs.join()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Finish the jobs and end the thread; raises nothing, see `error`."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self.error is None:
                    job()
            except Exception as error:
                self.error = error
            finally:
                job = None  # the tensors it holds, before the wait for the next one
                self._jobs.task_done()
        self._jobs.task_done()


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """Free room where `folder` is or will be."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: str | os.PathLike[str]) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return path


def stored_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes that the members in `folder`, and in the trajectories of averages below it, take now."""
    patterns = ("step-*.safetensors", "power-*/step-*.safetensors")
    return sum(path.stat().st_size for pattern in patterns for path in Path(folder).glob(pattern))
