"""What a search of solver schedules measures against: noise, and what a teacher with many steps makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.spacings import End
from genlight.diffusion.solver.teacher import NetworkSampling, Sampling, TeacherBank
from genlight.diffusion.solver.trajectory import TeacherTrajectories
from genlight.errors import UserError
from genlight.loops.evaluation import CandidateTrainer, noise_of
from genlight.search.protocols import Evaluation
from genlight.search.spaces.solver_objective import (
    TeacherObjective,
    bank_fingerprint,
    make_teacher_bank,
    rms_evaluation,
    teacher_schedule,
)

_HALF = (torch.float16, torch.bfloat16)
# names of the networks of a pipeline that are given timesteps
_DENOISERS = ("unet", "transformer", "transformer_2", "prior")


@dataclass(frozen=True)
class Teacher:
    """How the teacher samples.

    Attributes:
        steps: evaluations.
        solver: one of `genlight.diffusion.solver.presets.PRESETS`, on times even in λ.
    """

    steps: int = 100
    solver: str = "dpmpp_3m_exact"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"method.teacher.steps = {self.steps!r} must be 1 or more")


@dataclass(frozen=True)
class BankSizes:
    """How many noises each draw has.

    Attributes:
        search: for measuring candidates.
        select: for choosing among finalists, and for tuning.
        report: for the report.
    """

    search: int = 256
    select: int = 256
    report: int = 1024

    def __post_init__(self) -> None:
        for name in ("search", "select", "report"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.noise.{name} = {getattr(self, name)!r} must be 1 or more")


@dataclass(frozen=True)
class PipelineSampling:
    """A module that samples compiled tables by itself, by calls of its pipeline.

    Attributes:
        module: the pipeline.
        integer_timesteps: as in `Sampling`; the scheduler of a table gives integers where all times are.
    """

    module: Any
    integer_timesteps: bool = False

    @property
    def prediction(self) -> Any:
        return self.module.prediction

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents between evaluations."""
        found: torch.dtype = self.module.latent_kind()[1]
        return found

    @cached_property
    def rounded_timesteps(self) -> bool:
        """Whether the pipeline gives its network timesteps in 16 bits, found by one evaluation."""
        if self.dtype not in _HALF:
            return False
        given: list[torch.dtype] = []

        def note(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            found = options.get("timestep", arguments[1] if len(arguments) > 1 else None)
            given.extend([found.dtype] if isinstance(found, Tensor) else [])

        networks = [self.module.networks[key] for key in _DENOISERS if key in self.module.networks]
        handles = [network.register_forward_pre_hook(note, with_kwargs=True) for network in networks]
        try:
            schedule = self.prediction.schedule
            table = compile_schedule(teacher_schedule(schedule, 1, solver="ddim"), schedule)
            noise = torch.zeros(1, *self.module.sample_shape, device=self.module.device)
            self.module.sample_tables([table], noise, torch.zeros(1, dtype=torch.long))
        finally:
            for handle in handles:
                handle.remove()
        return any(dtype in _HALF for dtype in given)

    def __call__(self, tables: Sequence[SolverTable], bank: TeacherBank) -> Tensor:
        """Undecoded samples [S, M, ...]."""
        samples: Tensor = self.module.sample_tables(tables, bank.noise, bank.conditions.get("label"))
        return samples


def sampling_of(module: Any, integer_timesteps: bool = False) -> Sampling:
    """How a module is sampled with solver tables; UserError for a module that is no diffusion model."""
    if hasattr(module, "denoiser"):
        return NetworkSampling(module.denoiser(), module.prediction, integer_timesteps=integer_timesteps)
    if hasattr(module, "sample_tables"):
        return PipelineSampling(module, integer_timesteps)
    raise UserError(
        f"method=s3 searches the sampler of a diffusion or flow model, which {type(module).__name__} is not; use "
        "module=diffusion, module=diffusion_pretrained or module=pipeline"
    )


class Banks:
    """The three banks of a run, each made once and kept in the run folder.

    Args:
        evaluations: what samples the teacher.
        module, datamodule: of the run.
        teacher, sizes, end: see `Teacher`, `BankSizes`, `spacings.grid`.
        folder: where they are kept.
        integer_times: the teacher's times are whole too.
    """

    def __init__(
        self,
        evaluations: CandidateTrainer,
        module: Any,
        datamodule: Any,
        teacher: Teacher,
        sizes: BankSizes,
        end: End,
        folder: Path,
        integer_times: bool = False,
    ) -> None:
        self.evaluations, self.module, self.datamodule, self.sizes = evaluations, module, datamodule, sizes
        self.folder, self.device = folder, evaluations.trainer.strategy.root_device
        self.sampling = sampling_of(module, integer_times)
        self.schedule = teacher_schedule(
            self.sampling.prediction.schedule,
            teacher.steps,
            solver=teacher.solver,
            end=end,
            integer_times=integer_times,
        )
        self.uses_labels = bool(getattr(module, "class_conditional", True))
        self.model_fingerprint = f"{evaluations.fingerprint(module)}/{module.guidance_scale}"

    def bank(self, draw: str) -> TeacherBank:
        """The bank of a draw, read from the folder where it was made before."""
        noise, conditions = noise_of(self.datamodule, draw, getattr(self.sizes, draw))
        conditions = conditions if self.uses_labels else {}
        found = self.fingerprint(draw, noise, conditions)
        file = self.folder / f"teacher-{draw}.safetensors"
        if self.evaluations.agreed(file.is_file()):
            return TeacherBank.load(file, found, self.device)
        on_device = {name: value.to(self.device) for name, value in conditions.items()}
        bank = self.evaluations.inside(
            self.module,
            lambda: make_teacher_bank(
                self.sampling,
                noise.to(self.device),
                schedule=self.schedule,
                conditions=on_device,
                model_fingerprint=self.model_fingerprint,
            ),
        )
        if self.evaluations.trainer.is_global_zero:
            bank.save(file)
        return bank

    def trajectories(self) -> TeacherTrajectories | None:
        """Of the teacher on the search draw, read from the folder where they were made before.

        None for a pipeline, which does not say what its network answers.
        """
        if not isinstance(self.sampling, NetworkSampling):
            return None
        sampling, bank, schedule = self.sampling, self.bank("search"), self.sampling.prediction.schedule
        table, file = compile_schedule(self.schedule, schedule), self.folder / "trajectories.safetensors"
        if not self.evaluations.agreed(file.is_file()):
            made = self.evaluations.inside(self.module, lambda: TeacherTrajectories.of(sampling, bank, table))
            if self.evaluations.trainer.is_global_zero:
                made.save(file)
            self.evaluations.agreed(None)  # it is written before any other process reads it
        return TeacherTrajectories.load(file, schedule, table, bank.fingerprint)

    def fingerprint(self, draw: str, noise: Tensor, conditions: dict[str, Tensor]) -> str:
        """What the bank of a draw depends on."""
        return bank_fingerprint(self.sampling.prediction, noise, self.schedule, conditions, self.model_fingerprint)


class TeacherScoring:
    """Distances of schedules to the teacher, measured in validations: objective and batch objective of a search.

    Args:
        module: the generator.
        sampling: how it is sampled.
        bank: noise and target; where the module is sharded, each process measures a share of the rows.
        evaluations: what validates.
    """

    def __init__(self, module: Any, sampling: Sampling, bank: TeacherBank, evaluations: CandidateTrainer) -> None:
        self.module, self.evaluations, self.bank = module, evaluations, bank
        trainer = evaluations.trainer
        self.parts = int(trainer.world_size) if evaluations.sharded else 1
        rank = int(trainer.global_rank) if evaluations.sharded else 0
        self.objective = TeacherObjective(sampling, bank.rows(slice(rank, None, self.parts)))

    @property
    def fingerprint(self) -> str:
        """Of the bank: what scores depend on."""
        return self.bank.fingerprint

    def evaluate(self, candidate: Any, fidelity: int) -> Evaluation:
        """The RMS distance over the first `fidelity` noises."""
        return self.evaluate_many([candidate], fidelity)[0]

    def evaluate_many(self, candidates: Sequence[Any], fidelity: int) -> list[Evaluation]:
        """One evaluation for each candidate, in shared forward passes."""
        return [rms_evaluation(value) for value in self.errors(candidates, fidelity).mean(dim=1).tolist()]

    def errors(self, candidates: Sequence[Any], fidelity: int) -> Tensor:
        """Mean squared error of each candidate on each noise, float64 [candidates, fidelity], in no order of noises."""
        if fidelity % self.parts:
            raise UserError(f"search.fidelity = {fidelity} must be a multiple of the {self.parts} processes")
        rows = fidelity // self.parts
        errors = self.evaluations.inside(self.module, lambda: self.objective.errors(candidates, rows))
        if self.parts == 1:
            return errors
        strategy = self.evaluations.trainer.strategy
        gathered: Tensor = strategy.all_gather(errors.to(strategy.root_device))
        return gathered.transpose(0, 1).flatten(1).cpu()
