"""Tokens of a student of Distilled Decoding with some passes of its teacher, and what needs no student at all.

Everything here is a function of the same noise: where a token is drawn from a distribution, the flow carries its noise
to a code (`genlight.diffusion.flow_codes`). The teacher's passes are in its own precision, whatever autocast says: one
token that another rounding decides otherwise changes all after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from genlight.diffusion.flow_codes import Method, transport
from genlight.nets.autoregressive import (
    AutoregressiveModel,
    Choose,
    SamplingSettings,
    decode,
    parallel_probabilities,
)
from genlight.nets.few_step import Decoded, StudentNetwork, ends_of, few_steps


def teacher_involved(
    student: StudentNetwork,
    teacher: AutoregressiveModel,
    settings: SamplingSettings,
    noise: Tensor,
    labels: Tensor,
    choose: Choose,
    first: int,
    last: int,
    split_timestep: int | None = None,
) -> Decoded:
    """The student's sample, of which the teacher decides some groups again ("pre-trained-n-m", arXiv 2412.17153).

    The student says the groups before `first`; the teacher reads them and decides `first` to `last` - 1, one after the
    other; the student says the rest. With `last` one above the number of groups the teacher has the last word, as in
    Liu et al. 2025 (arXiv 2510.21003, algorithm 4).

    Args:
        student, teacher: of the same tokens.
        settings: guidance and filters of the teacher.
        noise: [B, N, C], of the student.
        labels: [B] int64.
        choose: what makes the teacher's tokens of probabilities, such as a flow from the same noise.
        first, last: groups, counted from 1. The student goes on after `last` - 1 of them, which it should have learned.
        split_timestep: the groups from this one on that the student says in the end are vectors in place of codes;
            None: all are codes.

    Raises:
        ValueError: not 1 ≤ first < last ≤ number of groups + 1.
    """
    num_groups, codebook = len(teacher.group_sizes), teacher.codebook
    if not 1 <= first < last <= num_groups + 1:
        raise ValueError(f"first = {first} and last = {last} must be 1 ≤ first < last ≤ {num_groups + 1}")
    prefix = None
    if first > 1:
        known = ends_of(teacher.group_sizes)[first - 1]
        prefix = few_steps(student, codebook, noise, labels).tokens[:, :known]
    with torch.autocast(noise.device.type, enabled=False):
        tokens = decode(teacher, labels, settings, choose, prefix, last - 1)
    if last > num_groups:
        return Decoded(tokens, functional.embedding(tokens, codebook))
    return few_steps(student, codebook, noise, labels, (last - 1,), split_timestep, tokens)


def drawn_choice(numbers: Tensor, group_sizes: Sequence[int]) -> Choose:
    """Draws tokens, for `decode`: each is the first code up to which the probabilities add up to more than its number.

    Args:
        numbers: [B, N], uniform in [0, 1).
        group_sizes: of all groups.
    """
    ends = ends_of(group_sizes)

    def choose(probabilities: Tensor, group: int) -> Tensor:
        totals = probabilities.double().cumsum(-1)
        wanted = numbers[:, ends[group] : ends[group + 1], None] * totals[..., -1:]
        return torch.searchsorted(totals, wanted, right=True)[..., 0]

    return choose


@torch.no_grad()
def refine(
    teacher: AutoregressiveModel,
    settings: SamplingSettings,
    noise: Tensor,
    labels: Tensor,
    tokens: Tensor,
    passes: int,
    steps: int = 32,
    method: Method = "2m",
) -> Decoded:
    """Bring tokens nearer to what the teacher makes of the noise, all of them at once in each pass.

    The teacher's sample is the only fixed point of "each token is where the flow carries its noise, given the tokens
    before it". A pass makes at least one more group exact, so that after as many passes as there are groups the tokens
    are the teacher's, whatever they were (fixed-point iteration of predictive sampling, Wiggers & Hoogeboom 2020,
    arXiv 2002.09928).

    Args:
        teacher, settings: as `teacher_involved`.
        noise: [B, N, C].
        labels: [B] int64.
        tokens: [B, N], a guess, such as a student's.
        passes: of the teacher.
        steps, method: of the flow, as in `genlight.diffusion.flow_codes.transport`; those of the sample that is wanted.
    """
    codebook = teacher.codebook
    for _ in range(passes):
        with torch.autocast(noise.device.type, enabled=False):
            probabilities = parallel_probabilities(teacher, tokens, labels, settings)
        logarithms = probabilities.flatten(0, 1).log()
        _, moved = transport(noise.flatten(0, 1), logarithms, codebook, steps=steps, method=method)
        tokens = moved.view_as(tokens)
    return Decoded(tokens, functional.embedding(tokens, codebook))


class Marginals:
    """How often each code stands at each place, in the tokens of a class or in all.

    Tokens drawn from it are the best that independent tokens can be ("onestep*" in arXiv 2510.21003, appendix E.5).
    Counted are the classes of a batch, when they are asked for: a table of all of them, [classes, N, V], can be larger
    than memory.

    Args:
        tokens: [M, N], kept on the CPU.
        num_codes: V.
        labels: [M], for each class apart; None: all together.
    """

    def __init__(self, tokens: Tensor, num_codes: int, labels: Tensor | None = None) -> None:
        self.tokens, self.num_codes = tokens.cpu(), num_codes
        self.labels = None if labels is None else labels.cpu()
        self._asked: tuple[tuple[torch.device, list[int]], Tensor] | None = None

    def frequencies(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Shares [K, N, V] of codes, on the device of the labels [B], and which of the K belongs to each label, [B].

        Those that were asked for last are kept.

        Raises:
            ValueError: a class without tokens.
        """
        classes, index = (torch.zeros_like(labels) if self.labels is None else labels).unique(return_inverse=True)
        key = labels.device, classes.tolist()
        if self._asked is None or self._asked[0] != key:
            self._asked = key, torch.stack([self._counted(each).to(labels.device) for each in key[1]])
        return self._asked[1], index

    def _counted(self, label: int) -> Tensor:
        """[N, V], of one class."""
        tokens = self.tokens if self.labels is None else self.tokens[self.labels == label]
        if not len(tokens):
            raise ValueError(f"labels: class {label} must have tokens")
        length = tokens.shape[1]
        codes = tokens.long() + self.num_codes * torch.arange(length)
        counts = codes.flatten().bincount(minlength=length * self.num_codes)
        return counts.view(length, self.num_codes).float() / len(tokens)

    def sample(self, codebook: Tensor, noise: Tensor, labels: Tensor, steps: int = 32) -> Decoded:
        """Independent tokens from noise [B, N, C] and labels [B]."""
        shares, index = self.frequencies(labels)
        logarithms = shares.log()[index].flatten(0, 1)
        _, tokens = transport(noise.flatten(0, 1), logarithms, codebook, steps=steps)
        tokens = tokens.view(noise.shape[:2])
        return Decoded(tokens, functional.embedding(tokens, codebook))

    def likeliest(self, labels: Tensor) -> Tensor:
        """The most frequent code of each place, [B, N]."""
        shares, index = self.frequencies(labels)
        return shares.argmax(-1)[index]


def stopped_early(tokens: Tensor, group_sizes: Sequence[int], num_groups: int, filling: Tensor | None) -> Tensor:
    """The teacher's tokens [B, N] of the first groups, as if it had stopped there ("skip-k").

    Args:
        tokens: the teacher's.
        group_sizes: of all groups.
        num_groups: how many are kept.
        filling: [B, N], what stands in the place of the others; None leaves them out, where the decoder sums scales.
    """
    end = ends_of(group_sizes)[num_groups]
    kept = tokens[:, :end]
    return kept if filling is None else torch.cat((kept, filling[:, end:]), dim=1)
