"""What the disk holds before each write of a run, as SIGKILL or a power loss there would leave it."""

import hashlib
import json
import os
import resource
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

# of all below a folder: the content of a file, the target of a link, None for a folder
State = dict[str, bytes | str | None]
_Key = tuple[int, int]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass
class Repeats:
    """Tells the third and further writes to a file in a row: there are thousands, one for each tensor."""

    last: tuple[str, str] = ("", "")
    times: int = 0

    def __call__(self, name: str, path: Path) -> bool:
        self.times = self.times + 1 if self.last == (name, str(path)) else 1
        self.last = (name, str(path))
        return name == "write" and self.times > 2


@dataclass
class Synced:
    """The contents of files and the names in folders as they were last synced, by device and inode.

    Attributes:
        contents: of files.
        names: in folders: the target of a link; of all else the inode, and whether it is a folder.
    """

    contents: dict[_Key, bytes] = field(default_factory=dict)
    names: dict[_Key, dict[str, str | tuple[_Key, bool]]] = field(default_factory=dict)

    def trace(self) -> None:
        """Note every sync of this process from here on."""
        real, (_, most) = os.fsync, resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

        def fsync(descriptor: int) -> None:
            real(descriptor)
            self._note(descriptor)

        os.fsync = fsync

    def _note(self, descriptor: int) -> None:
        status, place = os.fstat(descriptor), Path(f"/proc/self/fd/{descriptor}")
        key = _key(status)
        if key not in self.contents and key not in self.names:
            os.dup(descriptor)  # as long as it is open, no other file gets its inode
        if stat.S_ISDIR(status.st_mode):
            self.names[key] = {path.name: _entry(path) for path in place.iterdir()}
        else:
            self.contents[key] = place.read_bytes()

    def content(self, file: Path) -> bytes:
        return self.contents.get(_key(file.stat()), b"")

    def below(self, folder: _Key, prefix: str = "") -> State:
        """All below a folder that a power loss leaves for certain: a name that was not synced is gone, and one that was
        removed without a sync is back."""
        found: State = {}
        for name, entry in self.names.get(folder, {}).items():
            path = prefix + name
            if isinstance(entry, str):
                found[path] = entry
            elif entry[1]:
                found |= {path: None, **self.below(entry[0], f"{path}/")}
            else:
                found[path] = self.contents.get(entry[0], b"")
        return found


def _key(status: os.stat_result) -> _Key:
    return status.st_dev, status.st_ino


def _entry(path: Path) -> str | tuple[_Key, bool]:
    return os.readlink(path) if path.is_symlink() else (_key(path.stat()), path.is_dir())


@dataclass
class Watcher:
    """A hook that keeps what the disk holds before each write, each different content once.

    Args:
        run_root: that the run writes below `tiny` in.
        kept: where the states go, folders that can be a run.root.
        power: as a power loss may leave it, in two ways: with the names that are there, what was not synced of their
            files cut off; and with only those names and contents that were synced.
    """

    run_root: Path
    kept: Path
    power: bool = False
    calls: int = 0
    steps: int = 0
    seen: set[str] = field(default_factory=set)
    synced: Synced = field(default_factory=Synced)
    repeats: Repeats = field(default_factory=Repeats)

    def begin(self) -> None:
        """In the process that is watched, before the command: count optimizer steps, and know what is synced."""
        register_optimizer_step_post_hook(self._stepped)
        if self.power:
            self.synced.trace()

    def _stepped(self, *_: Any) -> None:
        self.steps += 1

    def __call__(self, name: str, path: Path) -> None:
        self.calls += 1
        if self.repeats(name, path):
            return
        moment = f"{self.calls} {name} {path.name}"
        if not self.power:
            self._keep("killed", self._present(), moment)
            return
        self._keep("cut", self._present(), moment)
        below = self.synced.below(_key(self.run_root.stat()))
        tiny = {inner: held for inner, held in below.items() if inner.split("/")[0] == "tiny"}
        self._keep("synced", tiny, f"{moment} (names as synced)")

    def _present(self) -> State:
        found: State = {}
        for path in sorted((self.run_root / "tiny").rglob("*")):
            inner = str(path.relative_to(self.run_root))
            if path.is_symlink():
                found[inner] = os.readlink(path)
            elif path.is_dir():
                found[inner] = None
            else:
                found[inner] = self.synced.content(path) if self.power else path.read_bytes()
        return found

    def _keep(self, kind: str, state: State, moment: str) -> None:
        plain = {inner: digest(held) if isinstance(held, bytes) else [held] for inner, held in state.items()}
        key = digest(json.dumps(plain, sort_keys=True).encode())
        if key in self.seen:
            return
        self.seen.add(key)
        place = self.kept / f"{kind}-{len(self.seen):04d}"
        place.mkdir(parents=True)
        for inner, held in state.items():
            path = place / inner
            if held is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(held, str):
                path.symlink_to(held)
            else:
                path.write_bytes(held)
        (place / "moment.txt").write_text(f"{moment}\n{self.steps}")


def states(kept: Path) -> list[tuple[Path, str, int]]:
    """What a watcher kept: the folder, the moment, and how many optimizer steps were done then."""
    found = []
    for place in sorted(kept.glob("*-[0-9]*")):
        moment, steps = (place / "moment.txt").read_text().split("\n")
        found.append((place, moment, int(steps)))
    return found
