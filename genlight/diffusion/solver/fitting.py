"""Fitting the parameters of a solver to a teacher's samples: the problem, two methods, and the record.

What is fitted is any map from a vector of numbers to a `SolverTable`: free tables (`finetune`), times of a fixed solver
(`learned_times`), times and factors of a schedule (`refine`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.jacobian import normal_equations
from genlight.diffusion.solver.teacher import ConditionalModel, NetworkSampling, Sampling, TeacherBank, TuningProblem

_TRIES, _PATIENCE, _SELECT_PATIENCE = 8, 3, 5


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damped Gauss-Newton steps, for models cheap enough for a Jacobian (some E²/4 passes over the bank per step).

    The Jacobian is made of differences: any model in float32 or wider will do, gradients are not needed.

    Args:
        iterations: steps at most.
        damping: the first factor μ of diag(JᵀJ); falls by 5 after a step that helps, rises by 4 after one that does
            not.
        tolerance: stop after three steps in a row that lower the RMS by less than this share; or after five that do
            not lower it on the selection bank.
        difference: size of the differences, in parameter units; None: 1e-5 in float64, 2e-3 in float32, and 6e-2 to
            both sides where states are rounded to 16 bits.
        central: differences to both sides, at twice the cost.
    """

    iterations: int = 40
    damping: float = 1e-2
    tolerance: float = 1e-3
    difference: float | None = None
    central: bool = False

    def __post_init__(self) -> None:
        _positive(iterations=self.iterations, damping=self.damping, tolerance=self.tolerance)


@dataclass(frozen=True)
class Adam:
    """First-order descent with cosine decay, for large models: the model must be differentiable in x and in the time.

    Args:
        steps, learning_rate: of Adam, in parameter units.
        batch_size: noises per step, drawn anew in each epoch from `seed`; None: the whole bank.
        checkpointing: keep only the inputs of each evaluation and make it again in the backward pass.
        select_every: steps between looks at the selection bank.
    """

    steps: int = 300
    learning_rate: float = 0.02
    batch_size: int | None = None
    checkpointing: bool = True
    select_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(steps=self.steps, learning_rate=self.learning_rate, select_every=self.select_every)
        if self.batch_size is not None:
            _positive(batch_size=self.batch_size)


@dataclass(frozen=True)
class TuningStep:
    """Paired RMS distances after `step` steps: on training noise, on selection noise, and the least of the latter."""

    step: int
    train_rms: float
    select_rms: float
    best_rms: float


Progress = Callable[[TuningStep], None]


@dataclass(frozen=True)
class TuningRecord:
    """How it went.

    Attributes:
        steps: from the start (step 0) on.
        best_step: the step that was kept; 0 if nothing was better than the start.
        model_rows: rows that went through the model (forward; Adam's gradients cost two to three times as much).
        refused: proposals with an RMS that is not finite or not better (Levenberg-Marquardt), gradients that are not
            finite (Adam).
    """

    method: str
    steps: tuple[TuningStep, ...]
    best_step: int
    model_rows: int
    refused: int


@torch.inference_mode(False)
def fit(
    problem: TuningProblem,
    make: Callable[[Tensor], SolverTable],
    start: Tensor,
    method: LevenbergMarquardt | Adam | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, TuningRecord]:
    """The parameters with the least RMS on the selection bank among those the method came by, and the record.

    Args:
        make: the table of parameters [P], float64 on the CPU, differentiable for Adam. It may raise ValueError for
            parameters that make no table; they count as infinitely bad.
        start: the first parameters.

    Raises ValueError if there are no parameters, the start has no finite RMS, or Adam is to descend through something
    else than a network.
    """
    if len(start) == 0:
        raise ValueError("nothing is left to tune: no weights are free, and no inner time is")
    method = method if method is not None else LevenbergMarquardt()
    run = _Run(problem, make, start.detach().clone(), progress)
    if isinstance(method, Adam):
        if not isinstance(run.problem.sampling, NetworkSampling):
            raise ValueError("Adam needs gradients through a network; a whole pipeline is fitted by LevenbergMarquardt")
        _descend(run, method)
    else:
        _damped_gauss_newton(run, method)
    return run.best, run.record("adam" if isinstance(method, Adam) else "levenberg_marquardt")


class _Run:
    """What both methods share: counting, judging, remembering the best."""

    def __init__(
        self, problem: TuningProblem, make: Callable[[Tensor], SolverTable], start: Tensor, progress: Progress | None
    ) -> None:
        self.rows, self.refused = 0, 0
        train, select = problem.train.usable(), problem.select.usable()
        self.problem = replace(problem, sampling=self._counting(problem.sampling), train=train, select=select)
        self.make, self.start, self.progress = make, start, progress
        self.best, self.best_step, self.steps = start, 0, list[TuningStep]()
        train_rms = self.rms(start)
        self.look(0, start, train_rms)
        if not math.isfinite(train_rms + self.steps[0].select_rms):
            raise ValueError("the table to start from gives results that are not finite")

    def _counting(self, sampling: Sampling) -> Sampling:
        if not isinstance(sampling, NetworkSampling):
            return _CountedSampling(sampling, self._count)
        model = sampling.model

        def counted(x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            self._count(len(x))
            return model(x, timestep, **conditions)

        return replace(sampling, model=counted)

    def _count(self, rows: int) -> None:
        self.rows += rows

    @torch.no_grad()
    def table(self, raw: Tensor) -> SolverTable | None:
        """None for parameters that make no table."""
        try:
            return self.make(raw)
        except ValueError:
            return None

    def rms(self, raw: Tensor) -> float:
        """On the training bank; inf for parameters that make no table."""
        table = self.table(raw)
        return math.inf if table is None else self.problem.rms(table, self.problem.train)

    def look(self, step: int, raw: Tensor, train_rms: float) -> None:
        """Judge parameters on the selection bank."""
        with torch.no_grad():
            select_rms = self.problem.rms(self.make(raw), self.problem.select)
        best_rms = min(select_rms, self.steps[-1].best_rms if self.steps else math.inf)
        if self.steps and select_rms < self.steps[-1].best_rms:
            self.best, self.best_step = raw.detach().clone(), step
        self.steps.append(TuningStep(step, train_rms, select_rms, best_rms))
        if self.progress is not None:
            self.progress(self.steps[-1])

    def record(self, method: str) -> TuningRecord:
        return TuningRecord(method, tuple(self.steps), self.best_step, self.rows, self.refused)


@dataclass(frozen=True, eq=False)
class _CountedSampling:
    """Sampling by a whole pipeline that says how many rows went through its network."""

    sampling: Sampling
    count: Callable[[int], None]

    @property
    def prediction(self) -> Prediction:
        return self.sampling.prediction

    @property
    def dtype(self) -> torch.dtype | None:
        return getattr(self.sampling, "dtype", None)

    def __call__(self, tables: Sequence[SolverTable], bank: TeacherBank) -> Tensor:
        self.count(sum(table.nfe for table in tables) * len(bank))
        return self.sampling(tables, bank)


def _damped_gauss_newton(run: _Run, method: LevenbergMarquardt) -> None:
    """Marquardt 1963: (JᵀJ + μ diag JᵀJ) δ = -Jᵀr; the scaling makes units of the parameters irrelevant."""
    raw, damping, idle = run.start, method.damping, 0
    rms = run.steps[0].train_rms
    for step in range(1, method.iterations + 1):
        curvature, slope = normal_equations(run.problem, run.make, raw, method.difference, central=method.central)
        diagonal = curvature.diagonal()
        if not bool(diagonal.any()):
            return  # nothing that is fitted moves a sample
        scale = diagonal.clamp_min(1e-12 * diagonal.max().item() + 1e-300)
        for _ in range(_TRIES):
            proposal = raw - torch.linalg.solve(curvature + damping * scale.diag(), slope)
            found = run.rms(proposal)
            if found < rms:
                break
            run.refused += 1
            damping *= 4
        else:
            return
        idle = idle + 1 if found > rms * (1 - method.tolerance) else 0
        raw, rms, damping = proposal, found, damping / 5
        run.look(step, raw, rms)
        if idle == _PATIENCE or step - run.best_step >= _SELECT_PATIENCE:
            return


def _descend(run: _Run, method: Adam) -> None:
    """Adam (Kingma & Ba 2015) on the mean squared distance."""
    raw = run.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=method.learning_rate)
    batches = _batches(len(run.problem.train), method)
    for step in range(1, method.steps + 1):
        gradient = gradient_of(run.problem, run.make, raw, next(batches), method.checkpointing)
        before = raw.detach().clone()
        if bool(gradient.isfinite().all()):
            raw.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = method.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / method.steps))
            optimizer.step()
        if not bool(gradient.isfinite().all()) or run.table(raw) is None:
            run.refused += 1
            with torch.no_grad():
                raw.copy_(before)
        if step % method.select_every == 0 or step == method.steps:
            current = raw.detach().clone()
            train_rms = run.rms(current)
            if math.isfinite(train_rms):
                run.look(step, current, train_rms)


def gradient_of(
    problem: TuningProblem,
    make: Callable[[Tensor], SolverTable],
    raw: Tensor,
    rows: Tensor | None = None,
    checkpointing: bool = True,
) -> Tensor:
    """The gradient [P] of the squared RMS on some rows of the training bank, by reverse mode, in chunks."""
    sampling = problem.sampling
    if checkpointing and isinstance(sampling, NetworkSampling):
        sampling = replace(sampling, model=_checkpointed(sampling.model))
    bank = problem.train if rows is None else problem.train.rows(rows.to(problem.train.noise.device))
    with torch.enable_grad():
        values = raw.detach().clone().requires_grad_()
        total = torch.zeros_like(values)
        for part in bank.chunks(problem.batch_rows):
            found = sampling([make(values)], part)[0]
            loss = (found - part.target).double().square().sum() / bank.target.numel()
            total += torch.autograd.grad(loss, values)[0]
    return total


def _checkpointed(model: ConditionalModel) -> ConditionalModel:
    return lambda x, timestep, **conditions: checkpoint(model, x, timestep, use_reentrant=False, **conditions)


def _batches(count: int, method: Adam) -> Iterator[Tensor]:
    """Row indices without end: each epoch a new order of all rows, the rest of an epoch dropped."""
    size = min(method.batch_size or count, count)
    generator = torch.Generator().manual_seed(method.seed)
    while True:
        order = torch.randperm(count, generator=generator) if size < count else torch.arange(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} = {value!r} must be positive")
