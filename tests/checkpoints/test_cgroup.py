"""What is left of the memory of a container, from files as Linux shows them."""

import math
from pathlib import Path

import pytest
import torch

from genlight.checkpoints import mixing
from genlight.checkpoints.cgroup import bytes_left

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: str, taken: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(f"anon 3\n{names[2]} {idle}\nfile 999\n")


def groups_of(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "own").write_text("\n".join(lines) + "\n")
    return tmp_path / "own"


def test_the_narrowest_group_on_the_way_counts(tmp_path: Path) -> None:
    own, root = groups_of(tmp_path, "0::/outer/inner"), tmp_path / "root"
    assert bytes_left(root, own) == math.inf
    group(root / "outer" / "inner", V2, "max", 100, 0)
    assert bytes_left(root, own) == math.inf
    group(root / "outer", V2, "1000", 300, 50)
    assert bytes_left(root, own) == 750
    group(root / "outer" / "inner", V2, "200", 100, 5)
    assert bytes_left(root, own) == 105
    group(root / "outer" / "inner", V2, "200", 250, 5)
    assert bytes_left(root, own) == 0
    assert bytes_left(root, tmp_path / "nothing") == math.inf


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    """Version 1, where the path is that of the machine outside."""
    own, root = groups_of(tmp_path, "5:cpu,cpuacct:/docker/a", "4:memory:/docker/a", "0::/docker/a"), tmp_path / "root"
    group(root / "memory", V1, "4096", 1096, 96)
    assert bytes_left(root, own) == 3096


def test_the_free_memory_of_a_cpu_is_at_most_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "bytes_left", lambda: 12345.0)
    assert mixing.free_bytes(torch.device("cpu")) == 12345
    monkeypatch.setattr(mixing, "bytes_left", lambda: math.inf)
    assert mixing.free_bytes(torch.device("cpu")) > 12345
