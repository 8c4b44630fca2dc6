"""What a sampler or a distillation needs of an autoregressive image network, and sampling from any that has it.

A sequence of N tokens is decided in groups: one token after the other (LlamaGen), or one scale after the other (VAR).
Given the groups before it, the tokens of a group are independent. Tokens are indices of a codebook [V, C].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Nucleus = Literal["head", "tail"]
# probabilities [B, n, V] of a group and its number to tokens [B, n]
Choose = Callable[[Tensor, int], Tensor]


class AutoregressiveModel(Protocol):
    """A network and the codebook of its tokens. Conditions are a tensor of B rows, of a kind that the network knows."""

    @property
    def nucleus(self) -> Nucleus:
        """Which of two readings of top-p its published samples use (see `filter_logits`)."""
        ...

    @property
    def guidance_ramp(self) -> bool:
        """Whether guidance grows in equal steps from none at the first group to all at the last, or never changes."""
        ...

    @property
    def codebook(self) -> Tensor:
        """[V, C], the vectors that tokens stand for."""
        ...

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of tokens of each group; their sum is N."""
        ...

    def null_condition(self, condition: Tensor) -> Tensor:
        """The condition that stands for none, in the shape of `condition`; ValueError if there are no conditions."""
        ...

    def begin(self, condition: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits [B, n, V] of the first group after `prefix`, whole groups [B, m], and the state for `extend`."""
        ...

    def extend(self, state: Any, tokens: Tensor) -> Tensor:
        """Logits [B, n, V] of the next group, given the tokens [B, n'] of the last one; changes the state."""
        ...

    def logits(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Logits [B, N, V] of every token given the groups before its own, in one pass; gradients pass."""
        ...


@dataclass(frozen=True)
class SamplingSettings:
    """From logits to the distribution that tokens are drawn from.

    Args:
        guidance_scale: s of classifier-free guidance, uncond + s·(cond - uncond): 1 is none. VAR's published ``cfg`` is
            s - 1, LlamaGen's is s.
        temperature: what logits are divided by, before all filters.
        top_k: how many of the likeliest codes may be drawn, more where several are as likely as the last; 0 is all.
        top_p: probability to which the likeliest codes are kept, after `top_k`; 1 is all.

    Raises:
        ValueError: a scale below 1, a temperature not above 0, `top_k` below 0, `top_p` outside (0, 1].
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale = {self.guidance_scale} must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature} must be above 0")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be in (0, 1]")


def check_guidance_range(guidance_range: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest guidance scale that a student learns.

    Raises:
        ValueError: not two numbers, 1 ≤ lowest ≤ highest.
    """
    found = tuple(float(scale) for scale in guidance_range)
    if len(found) != 2 or not 1 <= found[0] <= found[1] < math.inf:
        raise ValueError(f"guidance_range = {list(found)} must be two scales, 1 ≤ lowest ≤ highest")
    return found


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Guided logits (Ho & Salimans 2022, arXiv 2207.12598, equation 6), of any shape that `scale` broadcasts to."""
    return unconditional + scale * (conditional - unconditional)


def group_guidance(model: AutoregressiveModel, scale: float | Tensor) -> tuple[float | Tensor, ...]:
    """The guidance scale of each group, where that of the whole is `scale`, or one for each row."""
    last = len(model.group_sizes) - 1
    if not model.guidance_ramp or last == 0:
        return (scale,) * (last + 1)
    return tuple(1 + (scale - 1) * index / last for index in range(last + 1))


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0, nucleus: Nucleus = "head") -> Tensor:
    """Logits [..., V] with -inf for the codes that may not be drawn; the likeliest is always kept.

    Top-k comes first and keeps all that are as likely as the k-th. Top-p is read in two ways, which differ by one code
    where probabilities add up to `top_p` exactly: "head" keeps a code unless those likelier than it have more than
    `top_p` (LlamaGen), "tail" drops it if it and those less likely have at most 1 - `top_p` (VAR).

    Raises:
        ValueError: `top_k` above V.
    """
    if top_k > logits.shape[-1]:
        raise ValueError(f"top_k = {top_k} must be at most {logits.shape[-1]}, the number of codes")
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=nucleus == "head")
        total = ordered.softmax(-1).cumsum(-1)
        if nucleus == "head":
            dropped = (total > top_p).roll(1, dims=-1)
            dropped[..., 0] = False
        else:
            dropped = total <= 1 - top_p
            dropped[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def multinomial(generator: torch.Generator | None = None) -> Choose:
    """Draws each token of a group by its probabilities, for `decode`."""

    def choose(probabilities: Tensor, group: int) -> Tensor:
        drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator)
        return drawn.view(probabilities.shape[:2])

    return choose


@torch.no_grad()
def decode(
    model: AutoregressiveModel,
    condition: Tensor,
    settings: SamplingSettings,
    choose: Choose,
    prefix: Tensor | None = None,
    num_groups: int | None = None,
    guidance: Tensor | None = None,
) -> Tensor:
    """Decide tokens group by group.

    Args:
        model: the network.
        condition: B rows.
        settings: guidance and filters.
        choose: what makes tokens of probabilities, such as `multinomial()`.
        prefix: [B, m], tokens of the first groups, which are kept.
        num_groups: how many groups to end with, those of the prefix among them; None is all.
        guidance: [B], the guidance scale of each row, in place of that of `settings`.

    Returns:
        [B, n] int64, the tokens of the first `num_groups` groups.

    Raises:
        ValueError: a prefix that does not end with a group; `num_groups` not above the prefix, or above all; `top_k`
            above V; logits that are not finite, with their group.
    """
    ends = list(itertools.accumulate(model.group_sizes, initial=0))
    length = 0 if prefix is None else prefix.shape[1]
    if length not in ends:
        raise ValueError(f"prefix of {length} tokens must end with one of the groups {model.group_sizes}")
    first, last = ends.index(length), len(ends) - 1 if num_groups is None else num_groups
    if not first < last < len(ends):
        raise ValueError(f"num_groups = {last} must be from {first + 1} to {len(ends) - 1}")
    guided = guidance is not None or settings.guidance_scale > 1
    scales = group_guidance(model, settings.guidance_scale if guidance is None else guidance[:, None, None])
    rows = torch.cat((condition, model.null_condition(condition))) if guided else condition
    logits, state = model.begin(rows, _repeated(prefix, guided) if prefix is not None else None)
    chosen = [] if prefix is None else [prefix]
    for group in range(first, last):
        if not torch.isfinite(logits).all():
            raise ValueError(f"logits of group {group} must be finite")
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, scales[group])
        chosen.append(choose(_distribution(logits, model.nucleus, settings), group))
        if group + 1 < last:
            logits = model.extend(state, _repeated(chosen[-1], guided))
    return torch.cat(chosen, dim=1)


@torch.no_grad()
def parallel_probabilities(
    model: AutoregressiveModel, tokens: Tensor, condition: Tensor, settings: SamplingSettings
) -> Tensor:
    """The probabilities that `decode` would have given for each token of [B, N], all in one pass: [B, N, V].

    Raises:
        ValueError: `top_k` above V.
    """
    logits = model.logits(tokens, condition)
    if settings.guidance_scale > 1:
        unconditional = model.logits(tokens, model.null_condition(condition))
        scales = torch.tensor(group_guidance(model, settings.guidance_scale), dtype=logits.dtype)
        scale = scales.repeat_interleave(torch.tensor(model.group_sizes)).to(logits.device)
        logits = guide(logits, unconditional, scale[:, None])
    return _distribution(logits, model.nucleus, settings)


def _distribution(logits: Tensor, nucleus: Nucleus, settings: SamplingSettings) -> Tensor:
    return filter_logits(logits / settings.temperature, settings.top_k, settings.top_p, nucleus).softmax(-1)


def _repeated(tokens: Tensor, guided: bool) -> Tensor:
    return torch.cat((tokens, tokens)) if guided else tokens
