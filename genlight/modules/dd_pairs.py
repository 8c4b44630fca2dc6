"""Pairs of noise and the tokens that a teacher carries it to: what the student of Distilled Decoding learns from.

Noise is not kept on disk: that of pair i is drawn again from (seed, i), and its label is i modulo the number of
classes. So a pair takes four bytes a token, and four for its guidance scale where each has its own. Pairs are made in
shards, each decoded in one batch and kept in one file, so that the bytes of a shard depend neither on the number of
processes nor on whether the making was interrupted. The number of pairs is not part of what they are: where more are
asked for, those that are there stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlight import io
from genlight.data.cache import fingerprint_of, with_progress
from genlight.data.sampling import PAIR_GUIDANCE, PAIR_NOISE, Indices, generator
from genlight.diffusion.flow_codes import Method, flow_choice
from genlight.diffusion.teacher_passes import refine
from genlight.errors import UserError
from genlight.modules.token_folder import TokenTeacher
from genlight.nets.autoregressive import check_guidance_range, decode

INDEX, ACCURACY = "index.json", "accuracy.json"
# numbers of noise that are kept in memory once they are drawn: 1 GiB, of 500,000 pairs of 64 tokens of 8 numbers
KEPT_NUMBERS = 1 << 28
# the flow that a part of the pairs is compared with, and the share of tokens that may be others by it
FINER_STEPS, TOLERATED = 64, 0.03
FINER_METHOD: Method = "heun"


def pair_noise(seed: int, indices: Sequence[int] | Indices, shape: Sequence[int]) -> Tensor:
    """Unit noise of pairs, [B, *shape] float32: that of each from its own stream of (seed, index)."""
    noise = np.empty((len(indices), *shape), np.float32)
    for row, index in enumerate(indices):
        generator(seed, PAIR_NOISE, int(index)).standard_normal(tuple(shape), dtype=np.float32, out=noise[row])
    return torch.from_numpy(noise)


def pair_guidance(seed: int, indices: Sequence[int] | Indices, guidance_range: tuple[float, float]) -> Tensor:
    """Guidance scales of pairs, [B] float32, uniform in the range: each from its own stream of (seed, index)."""
    drawn = [generator(seed, PAIR_GUIDANCE, int(index)).uniform(*guidance_range) for index in indices]
    return torch.tensor(drawn, dtype=torch.float32)


@dataclass(frozen=True)
class PairSettings:
    """Which pairs, and by which solver.

    Args:
        num_pairs: pairs in all.
        seed: of their noise.
        shard_size: pairs decoded in one batch and kept in one file; the last may have fewer.
        steps, method: of the flow, see `genlight.diffusion.flow_codes.final_log_weights`.
        guidance_range: lowest and highest guidance scale, each pair has its own, in place of the teacher's; None: all
            have the teacher's (Meng et al. 2022, arXiv 2210.03142, section 3.1, for students that are told the scale).

    Raises:
        ValueError: a number below 1, a negative seed, or no range.
    """

    num_pairs: int
    seed: int
    shard_size: int = 512
    steps: int = 32
    method: Method = "2m"
    guidance_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("num_pairs", "shard_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed} must not be negative")
        if self.guidance_range is not None:
            check_guidance_range(self.guidance_range)

    @property
    def num_shards(self) -> int:
        return -(-self.num_pairs // self.shard_size)

    def indices(self, shard: int) -> Indices:
        """The pairs of a shard; the last may have fewer than the others."""
        return np.arange(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_pairs))


@dataclass(frozen=True)
class Pairs:
    """Pairs in memory.

    Attributes:
        tokens: [num_pairs, N] int32.
        num_classes, code_dim: of the teacher; 1 class where it knows none.
        seed: of the noise.
        guidance: [num_pairs] float32, the guidance scale of each; None: all have the teacher's.
    """

    tokens: Tensor
    num_classes: int
    code_dim: int
    seed: int
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def kept_noise(self) -> Tensor | None:
        """Noise of all pairs, drawn at the first use, since that of a batch takes as long as a step on a fast device;
        None where it is more than `KEPT_NUMBERS`."""
        if self.tokens.numel() * self.code_dim > KEPT_NUMBERS:
            return None
        return pair_noise(self.seed, range(len(self)), (self.tokens.shape[1], self.code_dim))

    def __getitems__(self, indices: Sequence[int] | Indices) -> dict[str, Tensor]:
        """noise float32 [B, N, C], tokens int64 [B, N], label int64 [B], and with own scales guidance float32 [B]."""
        index = torch.as_tensor(np.asarray(indices, np.int64))
        kept = self.kept_noise
        shape = (self.tokens.shape[1], self.code_dim)
        batch = {
            "noise": pair_noise(self.seed, index.tolist(), shape) if kept is None else kept[index],
            "tokens": self.tokens[index].long(),
            "label": index % self.num_classes,
        }
        return batch if self.guidance is None else batch | {"guidance": self.guidance[index]}


def pairs_record(teacher: TokenTeacher, settings: PairSettings) -> dict[str, Any]:
    """What decides the pairs, however many; its fingerprint names their folder."""
    record = {
        "kind": "pairs",
        "version": 1,
        "teacher": teacher.fingerprint,
        "num_classes": teacher.num_classes,
        "noise_shape": list(teacher.noise_shape),
        "seed": settings.seed,
        "shard_size": settings.shard_size,
        "steps": settings.steps,
        "method": settings.method,
    }
    # named only where it is used: pairs that were made before there were ranges are still the same
    return record if settings.guidance_range is None else record | {"guidance_range": list(settings.guidance_range)}


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

    Some tokens of the first are solved again by a finer flow, and how many come out otherwise is kept in accuracy.json.

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
    missing = missing_shards(folder, settings, rank, world_size)
    for shard in with_progress(missing, len(missing), "pairs"):
        made = _decode(teacher.to(device), settings, shard, device)
        if shard == 0:
            io.atomic_write_json(folder / ACCURACY, _accuracy(teacher, settings, made["tokens"], device))
        io.save_tensors(_file(folder, settings, shard), made, {"shard": str(shard)})
    return len(missing)


def missing_shards(folder: Path, settings: PairSettings, rank: int = 0, world_size: int = 1) -> list[int]:
    """Numbers of the shards that `folder` lacks, or has damaged, of those of a process."""
    return [
        shard for shard in range(rank, settings.num_shards, world_size) if not _is_whole(_file(folder, settings, shard))
    ]


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
    guidance = None if settings.guidance_range is None else torch.empty(settings.num_pairs)
    for shard in range(settings.num_shards):
        part = slice(shard * settings.shard_size, (shard + 1) * settings.shard_size)
        try:
            found, _ = io.load_tensors(_file(folder, settings, shard))
            tokens[part] = found["tokens"]
            if guidance is not None:
                guidance[part] = found["guidance"]
        except (FileNotFoundError, KeyError) as error:
            raise UserError(
                f"{folder} lacks shard {shard} of {settings.num_shards}: not all pairs are made, which the fit of a "
                "student does. Several machines make them together, below a paths.cache that all of them see"
            ) from error
    return Pairs(tokens, teacher.num_classes or 1, code_dim, settings.seed, guidance)


def folder_of(cache: str | Path, teacher: TokenTeacher, settings: PairSettings) -> Path:
    """Where these pairs lie below a cache folder."""
    return Path(cache) / "pairs" / fingerprint_of(pairs_record(teacher, settings))[:24]


def _given(
    teacher: TokenTeacher, settings: PairSettings, indices: Indices, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noise [B, N, C] and labels [B] of pairs, and on the CPU the guidance scales [B] of those that have their own."""
    noise = pair_noise(settings.seed, indices, teacher.noise_shape).to(device)
    label = torch.from_numpy(indices % (teacher.num_classes or 1)).to(device)
    scales = settings.guidance_range
    return noise, label, None if scales is None else pair_guidance(settings.seed, indices, scales)


def _decode(teacher: TokenTeacher, settings: PairSettings, shard: int, device: torch.device | str) -> dict[str, Tensor]:
    """What is kept of a shard."""
    noise, label, guidance = _given(teacher, settings, settings.indices(shard), device)
    model = teacher.model
    choose = flow_choice(noise, model.codebook, model.group_sizes, steps=settings.steps, method=settings.method)
    with torch.autocast(noise.device.type, enabled=False):
        told = None if guidance is None else guidance.to(device)
        tokens = decode(model, label, teacher.settings, choose, guidance=told).cpu().int()
    return {"tokens": tokens} if guidance is None else {"tokens": tokens, "guidance": guidance}


def _accuracy(
    teacher: TokenTeacher, settings: PairSettings, tokens: Tensor, device: torch.device | str
) -> dict[str, Any]:
    """How many tokens of the first images a finer flow carries to another code; many of them are worth a warning.

    Args:
        tokens: [B, N], of the first shard; one image in a hundred is looked at.
    """
    count = -(-len(tokens) // 100)
    noise, label, guidance = _given(teacher, settings, settings.indices(0)[:count], device)
    flipped = 0
    for row in range(count):
        own, one = teacher.settings, slice(row, row + 1)
        if guidance is not None:
            own = replace(own, guidance_scale=float(guidance[row]))
        wanted = tokens[one].to(device).long()
        found = refine(teacher.model, own, noise[one], label[one], wanted, 1, FINER_STEPS, FINER_METHOD)
        flipped += int((found.tokens != wanted).sum())
    checked = count * tokens.shape[1]
    # a few tell nothing where a shard is small
    if flipped > max(4, TOLERATED * checked):
        warnings.warn(
            f"{flipped} of {checked} tokens are others by {FINER_STEPS} steps of Heun's method than by data.steps = "
            f"{settings.steps} of data.method = {settings.method}: more steps make the pairs more exact",
            stacklevel=2,
        )
    return {"checked": checked, "flipped": flipped, "steps": FINER_STEPS, "method": FINER_METHOD}


def _file(folder: Path, settings: PairSettings, shard: int) -> Path:
    """Of a shard that has fewer pairs than others the name says how many, as a larger set has all of them."""
    count = len(settings.indices(shard))
    part = "" if count == settings.shard_size else f"-first-{count}"
    return folder / f"shard-{shard:05d}{part}.safetensors"


def _is_whole(file: Path) -> bool:
    try:
        io.load_tensors(file)
    except (FileNotFoundError, io.CorruptFileError):
        return False
    return True


def _check(folder: Path, record: dict[str, Any]) -> None:
    found = io.read_json(folder / INDEX)
    found = found if isinstance(found, dict) else {}
    for key in {**record, **found}:
        if found.get(key) != record.get(key):
            shown, wanted = found.get(key), record.get(key)
            raise UserError(f"{folder} holds other pairs: {key} is {shown!r}, {wanted!r} is wanted")
