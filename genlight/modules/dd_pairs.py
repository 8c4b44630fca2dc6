"""Pairs of noise and the tokens that a teacher carries it to: what the student of Distilled Decoding learns from.

Noise is not kept: that of pair i is drawn again from (seed, i), and its label is i modulo the number of classes. So a
pair takes four bytes a token. Pairs are made in shards, each decoded in one batch and kept in one file, so that the
bytes of a shard depend neither on the number of processes nor on whether the making was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlight import io
from genlight.data.cache import fingerprint_of, with_progress
from genlight.data.sampling import PAIR_NOISE, Indices, generator
from genlight.diffusion.flow_codes import Method, flow_choice
from genlight.errors import UserError
from genlight.modules.token_folder import TokenTeacher
from genlight.nets.autoregressive import decode

INDEX = "index.json"


def pair_noise(seed: int, indices: Sequence[int] | Indices, shape: Sequence[int]) -> Tensor:
    """Unit noise of pairs, [B, *shape] float32: that of each from its own stream of (seed, index)."""
    noise = np.empty((len(indices), *shape), np.float32)
    for row, index in enumerate(indices):
        generator(seed, PAIR_NOISE, int(index)).standard_normal(tuple(shape), dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise)


@dataclass(frozen=True)
class PairSettings:
    """Which pairs, and by which solver.

    Args:
        num_pairs: pairs in all.
        seed: of their noise.
        shard_size: pairs decoded in one batch and kept in one file; the last may have fewer.
        steps, method: of the flow, see `genlight.diffusion.flow_codes.final_log_weights`.

    Raises:
        ValueError: a number below 1, or a negative seed.
    """

    num_pairs: int
    seed: int
    shard_size: int = 512
    steps: int = 32
    method: Method = "2m"

    def __post_init__(self) -> None:
        for name in ("num_pairs", "shard_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} must not be negative")

    @property
    def num_shards(self) -> int:
        return -(-self.num_pairs // self.shard_size)

    def indices(self, shard: int) -> Indices:
        """The pairs of a shard."""
        return np.arange(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_pairs))


@dataclass(frozen=True)
class Pairs:
    """Pairs in memory.

    Attributes:
        tokens: [num_pairs, N] int32.
        num_classes, code_dim: of the teacher.
        seed: of the noise.
    """

    tokens: Tensor
    num_classes: int
    code_dim: int
    seed: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """noise float32 [B, N, C], tokens int64 [B, N] and label int64 [B]."""
        index = torch.as_tensor(np.asarray(indices, np.int64))
        return {
            "noise": pair_noise(self.seed, index.tolist(), (self.tokens.shape[1], self.code_dim)),
            "tokens": self.tokens[index].long(),
            "label": index % self.num_classes,
        }


def pairs_record(teacher: TokenTeacher, settings: PairSettings) -> dict[str, Any]:
    """What decides the pairs; its fingerprint names their folder."""
    return {
        "kind": "pairs",
        "version": 1,
        "teacher": teacher.fingerprint,
        "num_classes": teacher.num_classes,
        "noise_shape": list(teacher.noise_shape),
        "num_pairs": settings.num_pairs,
        "seed": settings.seed,
        "shard_size": settings.shard_size,
        "steps": settings.steps,
        "method": settings.method,
    }


@torch.no_grad()
def make_pairs(
    folder: str | Path,
    teacher: TokenTeacher,
    settings: PairSettings,
    *,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Make the shards that `folder` lacks, or has damaged; this process those of number `rank` modulo `world_size`.

    Returns:
        How many were made.

    Raises:
        UserError: the folder holds pairs of another teacher, or of other settings.
        ValueError: the teacher's logits are not finite.
    """
    folder, record = Path(folder), pairs_record(teacher, settings)
    if (folder / INDEX).is_file():
        _check(folder, record)
    else:
        # all processes write the same
        io.atomic_write_json(folder / INDEX, record)
    missing = [shard for shard in range(rank, settings.num_shards, world_size) if not _is_whole(folder, shard)]
    for shard in with_progress(missing, len(missing), "pairs"):
        tokens = _decode(teacher.to(device), settings, shard, device)
        io.save_tensors(_file(folder, shard), {"tokens": tokens.cpu().int()}, {"shard": str(shard)})
    return len(missing)


def read_pairs(folder: str | Path, teacher: TokenTeacher, settings: PairSettings) -> Pairs:
    """All pairs of a folder that `make_pairs` filled.

    Raises:
        UserError: no pairs, those of another teacher or of other settings, or a shard that is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds no pairs: they are made by the fit of a student")
    _check(folder, pairs_record(teacher, settings))
    length, code_dim = teacher.noise_shape
    tokens = torch.empty(settings.num_pairs, length, dtype=torch.int32)
    for shard in range(settings.num_shards):
        try:
            found = io.load_tensors(_file(folder, shard))[0]["tokens"]
        except (FileNotFoundError, KeyError) as error:
            raise UserError(f"{folder} lacks shard {shard} of {settings.num_shards}: not all pairs are made") from error
        tokens[shard * settings.shard_size : (shard + 1) * settings.shard_size] = found
    return Pairs(tokens, teacher.num_classes, code_dim, settings.seed)


def folder_of(cache: str | Path, teacher: TokenTeacher, settings: PairSettings) -> Path:
    """Where these pairs lie below a cache folder."""
    return Path(cache) / "pairs" / fingerprint_of(pairs_record(teacher, settings))[:24]


def _decode(teacher: TokenTeacher, settings: PairSettings, shard: int, device: torch.device | str) -> Tensor:
    indices = settings.indices(shard)
    noise = pair_noise(settings.seed, indices, teacher.noise_shape).to(device)
    label = torch.from_numpy(indices % teacher.num_classes).to(device)
    model = teacher.model
    choose = flow_choice(noise, model.codebook, model.group_sizes, steps=settings.steps, method=settings.method)
    with torch.autocast(noise.device.type, enabled=False):
        return decode(model, label, teacher.settings, choose)


def _file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _is_whole(folder: Path, shard: int) -> bool:
    try:
        io.load_tensors(_file(folder, shard))
    except (FileNotFoundError, io.CorruptFileError):
        return False
    return True


def _check(folder: Path, record: dict[str, Any]) -> None:
    found = io.read_json(folder / INDEX)
    for key, value in record.items():
        if not isinstance(found, dict) or found.get(key) != value:
            shown = found.get(key) if isinstance(found, dict) else None
            raise UserError(f"{folder} holds other pairs: {key} is {shown!r}, {value!r} is wanted")
