"""Sampling with a student of Distilled Decoding (Liu et al. 2024, arXiv 2412.17153): one pass, or a few.

A pass says all tokens from the noise. Further passes keep the tokens of the first groups, put the same noise back in
the place of the others, and say those again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class StudentNetwork(Protocol):
    """See `genlight.nets.dd_student`."""

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of tokens of each group."""
        ...

    def __call__(self, vectors: Tensor, is_data: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N, V] and vectors [B, N, C] of vectors [B, N, C], flags [B, N] and B labels or texts."""
        ...


@dataclass(frozen=True)
class Decoded:
    """What sampling ends with.

    Attributes:
        tokens: [B, N] int64.
        vectors: [B, N, C] for the decoder: the codes of the tokens, or where they were predicted as such, vectors.
    """

    tokens: Tensor
    vectors: Tensor


def ends_of(group_sizes: Sequence[int]) -> tuple[int, ...]:
    """How many tokens the first k groups have, for k from 0 to all."""
    return tuple(itertools.accumulate(group_sizes, initial=0))


def check_timesteps(timesteps: Sequence[int], num_groups: int, key: str = "timesteps") -> tuple[int, ...]:
    """The list as a tuple.

    Raises:
        ValueError: it does not increase from 0, or reaches the number of groups, naming `key`.
    """
    found = tuple(int(each) for each in timesteps)
    if not found or found[0] != 0 or any(a >= b for a, b in itertools.pairwise(found)) or found[-1] >= num_groups:
        raise ValueError(f"{key} = {list(found)} must increase from 0 to less than {num_groups}, the number of groups")
    return found


def mix(noise: Tensor, tokens: Tensor, codebook: Tensor, is_data: Tensor) -> Tensor:
    """A student's input: codes of tokens [B, N] where `is_data` [B, N], noise [B, N, C] elsewhere."""
    return torch.where(is_data[..., None], functional.embedding(tokens, codebook).to(noise.dtype), noise)


@torch.no_grad()
def few_steps(
    student: StudentNetwork,
    codebook: Tensor,
    noise: Tensor,
    labels: Tensor,
    timesteps: Sequence[int] = (0,),
    split_timestep: int | None = None,
    tokens: Tensor | None = None,
) -> Decoded:
    """Decide all tokens in as many passes as there are timesteps.

    Args:
        student: the network.
        codebook: [V, C].
        noise: [B, N, C], the same in every pass.
        labels: [B] int64, or texts [B, T, D], as the student takes them.
        timesteps: how many groups are decided before each pass, increasing; 0 is pure noise.
        split_timestep: the groups from this one on are vectors of the last pass in place of codes; None: all are codes.
        tokens: [B, m], the groups that are decided before the first pass; None where that begins at 0.

    Raises:
        ValueError: timesteps that do not increase within the groups, `split_timestep` outside them, or tokens that are
            not those before the first pass.
    """
    ends = ends_of(student.group_sizes)
    num_groups, first = len(ends) - 1, timesteps[0] if timesteps else 0
    check_timesteps([0, *timesteps] if first else timesteps, num_groups)
    split = num_groups if split_timestep is None else split_timestep
    if not 0 <= split <= num_groups:
        raise ValueError(f"split_timestep = {split} must be from 0 to {num_groups}, the number of groups")
    known = torch.zeros(len(noise), 0, dtype=torch.long, device=noise.device) if tokens is None else tokens
    if known.shape[1] != ends[first]:
        raise ValueError(f"tokens {list(known.shape)} must be the {ends[first]} before timesteps[0] = {first}")
    known = functional.pad(known, (0, ends[-1] - known.shape[1]))
    place = torch.arange(ends[-1], device=noise.device)
    free = noise
    for timestep in timesteps:
        is_data = (place < ends[timestep]).expand(len(noise), -1)
        logits, free = student(mix(noise, known, codebook, is_data), is_data, labels)
        known = torch.where(is_data, known, logits.argmax(-1))
    is_code = (place < max(ends[split], ends[timesteps[-1]])).expand(len(noise), -1)
    return Decoded(known, mix(free, known, codebook, is_code))
