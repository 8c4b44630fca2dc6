"""What the method `dd` compares: the teacher, its student in a few steps, both together, and what needs no student."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from genlight.diffusion.flow_codes import Method, flow_choice
from genlight.diffusion.teacher_passes import Marginals, drawn_choice, refine, stopped_early, teacher_involved
from genlight.nets.autoregressive import Choose, decode
from genlight.nets.few_step import Decoded
from genlight.nets.residual_vq import ResidualQuantizer
from genlight.quantization.accounting import tensor_bytes

if TYPE_CHECKING:
    from genlight.modules.distilled_decoding import DistilledDecodingModule

TEACHER, DRAWN, DRAWN_AGAIN = "teacher", "teacher, drawn", "teacher, drawn again"
_SEEDS = {DRAWN: 1, DRAWN_AGAIN: 2}


@dataclass(frozen=True)
class Variant:
    """One way to make tokens.

    Attributes:
        name: e.g. "student, 2 steps".
        kind: "teacher", "student", "vectors", "teacher involved", "refined", "skip", "skip with zeros", "onestep" or
            "quantized".
        calls: of a network for one batch, one after the other.
        decode: noise [B, N, C] and labels [B] to tokens; fewer than N where the teacher stops and nothing is filled in.
        megabytes: of the network, 10⁶ bytes, where a student alone is called.
    """

    name: str
    kind: str
    calls: int
    decode: Callable[[Tensor, Tensor], Decoded]
    megabytes: float | None = None


@dataclass(frozen=True)
class Choices:
    """Which variants there are beside those that always are.

    Attributes:
        involved: (first, last) groups, counted from 1: the teacher decides first to last - 1; None: one of each kind.
        refine: passes of the teacher after the student's one.
        skip: by how many groups the teacher stops early; None: a sixth, a third and a half of them.
        steps, method: of the flow from noise to tokens.
        skip_zeros: whether zeros take the place of what is left out, in further rows.
    """

    involved: Sequence[tuple[int, int]] | None
    refine: Sequence[int]
    skip: Sequence[int] | None
    steps: int
    method: Method
    skip_zeros: bool = False

    def involved_in(self, num_groups: int, timesteps: Sequence[int]) -> list[tuple[int, int]]:
        """The teacher up to where the student's second step begins, if it learned one, and for the last quarter."""
        if self.involved is not None:
            return [(int(first), int(last)) for first, last in self.involved]
        second = [(1, timestep + 1) for timestep in timesteps[1:2]]
        return [*second, (num_groups + 1 - max(1, num_groups // 4), num_groups + 1)]

    def skip_of(self, num_groups: int) -> list[int]:
        """Numbers of groups that are left out, each once."""
        if self.skip is not None:
            return [int(count) for count in self.skip]
        return sorted({max(1, num_groups // part) for part in (6, 3, 2)} - {num_groups})


def variants_of(
    module: DistilledDecodingModule, choices: Choices, marginals: Marginals, unconditional: Marginals
) -> list[Variant]:
    """All of them, the teacher first; `marginals` are those of each class."""
    groups, settings = len(module.teacher.model.group_sizes), module.settings
    megabytes = tensor_bytes(module.student) / 1e6
    found = [Variant(TEACHER, "teacher", groups, _teacher(module, choices, groups))]
    for name, seed in _SEEDS.items():
        found.append(Variant(name, "teacher", groups, _drawn(module, seed)))
    for split in (None,) if module.split_timestep is None else (None, module.split_timestep):
        for steps in range(1, len(module.timesteps) + 1):
            run = _student(module, module.sampling_timesteps(steps), groups if split is None else split)
            kind = "student" if split is None else "vectors"
            found.append(Variant(student_name(steps, split), kind, steps, run, megabytes))
    for first, last in choices.involved_in(groups, module.timesteps):

        def involved(noise: Tensor, label: Tensor, first: int = first, last: int = last) -> Decoded:
            choose, teacher = _flow(module, choices, noise), module.active_teacher.model
            told, split = module.told_student(), module.split_timestep
            return teacher_involved(told, teacher, settings, noise, label, choose, first, last, split)

        calls = (first > 1) + (last - first) + (last <= groups)
        found.append(Variant(involved_name(first, last), "teacher involved", calls, involved))
    for passes in choices.refine:

        def refined(noise: Tensor, label: Tensor, passes: int = passes) -> Decoded:
            guess = module.decode_noise(noise, label, timesteps=(0,), split_timestep=groups).tokens
            teacher = module.active_teacher.model
            return refine(teacher, settings, noise, label, guess, passes, choices.steps, choices.method)

        found.append(Variant(f"student + {passes} passes of the teacher", "refined", 1 + passes, refined))
    for count in choices.skip_of(groups):
        kept = groups - count
        found.append(Variant(f"skip-{count}", "skip", kept, _stopped(module, choices, marginals, kept)))
        # what is left out of a sum of scales is nothing but zeros
        if choices.skip_zeros and not isinstance(module.teacher.model.quantizer, ResidualQuantizer):
            zeros = _with_zeros(module, choices, kept)
            found.append(Variant(f"skip-{count}, zeros", "skip with zeros", kept, zeros))
    for name, of in (("onestep*, by class", marginals), ("onestep*", unconditional)):

        def independent(noise: Tensor, label: Tensor, of: Marginals = of) -> Decoded:
            return of.sample(module.teacher.model.codebook, noise, label, choices.steps)

        found.append(Variant(name, "onestep", 1, independent))
    return found


def student_name(steps: int, split_timestep: int | None) -> str:
    """The row of a student in so many steps; None: all are codes."""
    name = f"student, {steps} step{'s' if steps > 1 else ''}"
    return name if split_timestep is None else f"{name}, vectors from {split_timestep}"


def involved_name(first: int, last: int) -> str:
    """The row of a teacher that decides groups `first` to `last` - 1."""
    return f"teacher for {first} to {last - 1}"


def _flow(module: DistilledDecodingModule, choices: Choices, noise: Tensor) -> Choose:
    model = module.teacher.model
    return flow_choice(noise, model.codebook, model.group_sizes, steps=choices.steps, method=choices.method)


def _teacher(module: DistilledDecodingModule, choices: Choices, num_groups: int) -> Callable[[Tensor, Tensor], Decoded]:
    """The teacher by the flow from noise, group after group, without autocast: the function that made the pairs."""

    def run(noise: Tensor, label: Tensor) -> Decoded:
        model = module.active_teacher.model
        with torch.autocast(noise.device.type, enabled=False):
            tokens = decode(model, label, module.settings, _flow(module, choices, noise), num_groups=num_groups)
        return Decoded(tokens, functional.embedding(tokens, model.codebook))

    return run


def _drawn(module: DistilledDecodingModule, seed: int) -> Callable[[Tensor, Tensor], Decoded]:
    """The teacher by drawing, which is how it is sampled elsewhere, independently of the flow from this noise."""

    def run(noise: Tensor, label: Tensor) -> Decoded:
        model = module.active_teacher.model
        choose = drawn_choice(_numbers(noise, seed).to(noise.device), model.group_sizes)
        tokens = decode(model, label, module.settings, choose)
        return Decoded(tokens, functional.embedding(tokens, model.codebook))

    return run


def _numbers(noise: Tensor, seed: int) -> Tensor:
    """Uniform in [0, 1) for each token, [B, N]: a sample's are from its own stream, which its noise [N, C] names, so
    that neither the batch that it is in counts nor what was drawn before."""
    rows = noise.cpu().numpy()
    drawn = [np.random.default_rng((seed, zlib.crc32(row.tobytes()))).random(len(row), np.float32) for row in rows]
    return torch.from_numpy(np.stack(drawn))


def _student(
    module: DistilledDecodingModule, timesteps: Sequence[int], split: int
) -> Callable[[Tensor, Tensor], Decoded]:
    def run(noise: Tensor, label: Tensor) -> Decoded:
        return module.decode_noise(noise, label, timesteps=timesteps, split_timestep=split)

    return run


def _stopped(
    module: DistilledDecodingModule, choices: Choices, marginals: Marginals, kept: int
) -> Callable[[Tensor, Tensor], Decoded]:
    """The teacher's first groups: the sum of these scales, or with the likeliest code in every other place."""
    run_teacher = _teacher(module, choices, kept)

    def run(noise: Tensor, label: Tensor) -> Decoded:
        model = module.teacher.model
        sums = isinstance(model.quantizer, ResidualQuantizer)
        filling = None if sums else marginals.likeliest(label)
        tokens = stopped_early(run_teacher(noise, label).tokens, model.group_sizes, kept, filling)
        return Decoded(tokens, functional.embedding(tokens, model.codebook))

    return run


def _with_zeros(module: DistilledDecodingModule, choices: Choices, kept: int) -> Callable[[Tensor, Tensor], Decoded]:
    """The teacher's first groups, and zeros as the vectors of all others."""
    run_teacher = _teacher(module, choices, kept)

    def run(noise: Tensor, label: Tensor) -> Decoded:
        first = run_teacher(noise, label)
        missing = noise.shape[1] - first.tokens.shape[1]
        return Decoded(first.tokens, functional.pad(first.vectors, (0, 0, 0, missing)))

    return run
