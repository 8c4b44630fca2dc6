"""How solver schedules are searched: the hand-made ones first, then times, then every decision (S³).

Liu et al. 2024, arXiv 2312.07243: stages of evolution, each guided by a predictor fitted on all that was measured.
Other strategies get a plan of the same kind (`PlainPlan`), so that they can be compared at equal evaluations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.presets import PRESETS, named_schedule
from genlight.diffusion.solver.spacings import SPACINGS, End
from genlight.predictors.gaussian_process import GaussianProcessPredictor
from genlight.search.evolution import Evolution
from genlight.search.guided import OfProblem, Predictor, PredictorGuided
from genlight.search.plan import SearchPlan, measured_twice, with_screening, without_duplicates
from genlight.search.polish import Polish
from genlight.search.spaces.solver_schedule import SolverScheduleSpace, schedule_key
from genlight.search.stages import Stage, Stages

# grids that every noise schedule has; the lists of AYS are made for certain models
PLAIN_SPACINGS: tuple[str, ...] = ("log_snr", "uniform", "quadratic", "edm")
# a well-spread part of PRESETS, for networks whose every evaluation costs
CORE_SOLVERS: tuple[str, ...] = (
    "ddim",
    *(f"{family}_{kind}" for family in ("dpm", "dpmpp") for kind in ("2m", "2m_heun", "3m", "3m_exact", "2s")),
    *(f"unipc_{order}_{kind}{space}" for order in (2, 3) for kind in ("bh1", "bh2") for space in ("", "_noise")),
    "deis_3",
    "deis_tab_3",
    "ipndm_3",
    "heun",
)


def baselines(
    noise_schedule: NoiseSchedule,
    nfe: int,
    *,
    end: End = "t_min",
    solvers: Iterable[str] = tuple(PRESETS),
    spacings: Iterable[str] = SPACINGS,
    integer_times: bool = False,
) -> list[tuple[str, SolverSchedule]]:
    """Every hand-made solver on every grid that has a form with `nfe` evaluations on the noise schedule.

    Names are solver/spacing, with "/full_order" for those that do not end with falling orders. Schedules that are the
    same (`schedule_key`) appear once, under the first of their names. With `integer_times` all times are rounded.

    Raises ValueError for an unknown solver or spacing, or where no solver has a form.
    """
    solvers, spacings = tuple(solvers), tuple(spacings)
    unknown = [*(set(solvers) - set(PRESETS)), *(set(spacings) - set(SPACINGS))]
    if unknown or nfe < 1:
        raise ValueError(f"baselines: nfe = {nfe} must be 1 or more, and unknown are {sorted(unknown)}")
    found: dict[str, tuple[str, SolverSchedule]] = {}
    for lower_order_final in (True, False):
        for spacing in spacings:
            for solver in solvers:
                try:
                    schedule = named_schedule(
                        solver,
                        noise_schedule,
                        nfe,
                        spacing=spacing,
                        end=end,
                        lower_order_final=lower_order_final,
                        integer_times=integer_times,
                    )
                    compile_schedule(schedule, noise_schedule)
                except ValueError:
                    # no form with so many evaluations, or no meaning on this family
                    continue
                name = f"{solver}/{spacing}" + ("" if lower_order_final else "/full_order")
                found.setdefault(schedule_key(schedule, noise_schedule), (name, schedule))
    if not found:
        raise ValueError(f"baselines: no solver has a form with nfe = {nfe} on {noise_schedule!r}")
    return list(found.values())


@dataclass(frozen=True)
class S3Settings:
    """S³: how the evaluations of a search are spent.

    Attributes:
        times_share: share of the evaluations that goes to times alone.
        time_parents, parents: the best so many are parents while times alone, and all genes, are searched. None: 20
            and 12 from 1000 evaluations on, in proportion for fewer and at least 4, because a small budget that is
            spread over many parents improves none of them.
        stage_size: evaluations between two fits of the predictor. None: 40 from 800 evaluations on, 1/20 of fewer, at
            least 10.
        edit_sizes: size of the edits at the beginning and at the end of each half, relative to the gaps in λ; from
            stage to stage it falls geometrically.
        predictor, guided_fraction, children_per_place, kappa: see `PredictorGuided`; guided_fraction 0 is plain
            evolution.
        screening_fidelity, promoted: the initial candidates are measured on so many samples, and only the best so many
            of them at the full fidelity. None, or no more candidates than that: all at the full fidelity.
        polish: last evaluations, given to CMA-ES around the best two; for objectives that have no teacher, whose
            continuous decisions cannot be refined by Gauss-Newton.
    """

    times_share: float = 0.5
    time_parents: int | None = None
    parents: int | None = None
    stage_size: int | None = None
    edit_sizes: tuple[float, float] = (0.45, 0.05)
    predictor: Predictor | OfProblem = field(default_factory=GaussianProcessPredictor)
    guided_fraction: float = 0.7
    children_per_place: int = 10
    kappa: float = 2.0
    screening_fidelity: int | None = 64
    promoted: int = 60
    polish: int = 0

    def __post_init__(self) -> None:
        # A config gives a list; repr is part of the fingerprint
        object.__setattr__(self, "edit_sizes", tuple(float(size) for size in self.edit_sizes))
        if not 0 <= self.times_share <= 1:
            raise ValueError(f"strategy.times_share = {self.times_share!r} must lie in [0, 1]")
        for name in ("time_parents", "parents", "stage_size", "screening_fidelity"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"strategy.{name} = {value!r} must be 1 or more, or null")
        if self.promoted < 1 or self.polish < 0:
            raise ValueError(
                f"strategy.promoted = {self.promoted!r} must be 1 or more and "
                f"strategy.polish = {self.polish!r} not negative"
            )

    def plan(
        self, space: SolverScheduleSpace, evaluations: int, initial: Sequence[SolverSchedule] | None = None
    ) -> SearchPlan:
        """S³ on a space: the initial candidates, then times, then all genes, then polishing.

        Args:
            space: of the problem; its genes are those of the second half.
            evaluations: true evaluations beside those of the initial candidates.
            initial: hand-made schedules; `baselines` of all solvers on plain spacings if None.

        Where the genes are times alone, or hold no times, all evaluations are of one kind.

        Raises:
            ValueError: no evaluation is left beside those for polishing.
        """
        if evaluations - self.polish < 1:
            raise ValueError(f"search.budget = {evaluations!r} must be above strategy.polish = {self.polish}")
        if initial is None:
            made = baselines(
                space.noise_schedule,
                space.nfe,
                end=space.end,
                spacings=PLAIN_SPACINGS,
                integer_times=space.integer_times,
            )
            initial = [schedule for _, schedule in made]
        unique = without_duplicates(space, initial)
        settings = self._for_budget(evaluations - self.polish)
        share = self.times_share if "times" in space.genes and len(space.genes) > 1 else 0.0
        for_times = round(share * (evaluations - self.polish))
        for_all = evaluations - self.polish - for_times
        times_only = replace(space, genes=("times",))
        stages = [
            *settings._stages(times_only, for_times, settings.time_parents),
            *settings._stages(space, for_all, settings.parents),
        ]
        if self.polish:
            stages.append(Stage(Polish(starts=2, evaluations=-(-self.polish // 2))))
        # the stages count the initial candidates too, and a larger budget extends the last one
        before = len(unique) + measured_twice(len(unique), self.screening_fidelity, self.promoted)
        stages[0] = replace(stages[0], evaluations=(stages[0].evaluations or 0) + before)
        stages[-1] = replace(stages[-1], evaluations=None)
        return with_screening(Stages(tuple(stages)), unique, evaluations, self.screening_fidelity, self.promoted)

    def _for_budget(self, evaluations: int) -> "S3Settings":
        """With numbers in place of None."""
        return replace(
            self,
            time_parents=self.time_parents or min(20, max(4, evaluations // 50)),
            parents=self.parents or min(12, max(4, evaluations // 80)),
            stage_size=self.stage_size or min(40, max(10, evaluations // 20)),
        )

    def _stages(self, space: SolverScheduleSpace, evaluations: int, parents: int | None) -> list[Stage]:
        """Stages of one kind whose edits become smaller, together `evaluations` long."""
        if parents is None or self.stage_size is None:
            raise RuntimeError("settings without numbers: see _for_budget")
        count = -(-evaluations // self.stage_size)
        first, last = self.edit_sizes
        result = []
        for number in range(count):
            size = first * (last / first) ** (number / max(1, count - 1))
            length = evaluations * (number + 1) // count - evaluations * number // count
            evolution = Evolution(parents, length, edit_sizes=(size, size))
            guided = PredictorGuided(
                evolution,
                self.predictor,
                length,
                self.guided_fraction,
                children_per_place=self.children_per_place,
                kappa=self.kappa,
            )
            result.append(Stage(guided if self.guided_fraction > 0 else evolution, length, space))
        return result
