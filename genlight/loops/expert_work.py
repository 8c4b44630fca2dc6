"""The work of EEP: baselines, the search, and the choice among the best on questions of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genlight.errors import in_config
from genlight.experts.maps import selection_maps
from genlight.experts.prefix_cache import PrefixCache
from genlight.experts.statistics import routing_load
from genlight.loops.cost import CHOICE
from genlight.loops.draw_metrics import DrawMetrics
from genlight.loops.evaluation import CandidateTrainer, MetricObjective, in_turn, measured
from genlight.loops.expert_calibration import RANDOM, WholeModel
from genlight.loops.expert_remarks import remarks_after
from genlight.loops.search import SearchRunner, SearchTask
from genlight.search.engine import INITIAL, SearchResult
from genlight.search.evaluation import is_lost, one_by_one
from genlight.search.protocols import Evaluation
from genlight.search.records import Problem, Record
from genlight.search.spaces.expert_map_edits import random_kept
from genlight.search.spaces.expert_maps import ExpertMaps, ExpertMapSpace

if TYPE_CHECKING:
    from genlight.loops.expert_search import ExpertSearch

FULL, PRUNED, MERGED = "full", "EEP prune", "EEP merge"
# batches behind the tokens per second, and how often they run
TIMED_BATCHES, REPEATS = 4, 3


@dataclass(frozen=True)
class Choice:
    """One model that was measured.

    Attributes:
        name: e.g. "reap", "EEP prune 137".
        kind: "full", the baseline, "random", "EEP prune" or "EEP merge".
        candidate: its experts; None: all of them.
        search, select: scores on these draws, lower is better.
    """

    name: str
    kind: str
    candidate: ExpertMaps | None
    search: float
    select: float = float("nan")


@dataclass(frozen=True)
class ExpertObjective:
    """Scores candidates by the metric of a draw.

    Attributes:
        metric: of the module as it is.
        space: applies candidates.
        cache: of hidden states; None: none. Not for answers that are generated.
        writes: let the model write answers, which nothing but their exact match needs.
    """

    metric: MetricObjective
    space: ExpertMapSpace
    cache: PrefixCache | None = None
    writes: bool = True

    def evaluate(self, candidate: ExpertMaps | None, fidelity: int) -> Evaluation:
        """The metric over `fidelity` questions, negated where more is better; of the whole model for None."""
        module = self.metric.module
        if candidate is None:
            self.space.restore(module)
        else:
            self.space.apply(module, candidate)
        cache = nullcontext() if self.cache is None or self.writes else self.cache.running()
        with _writing(module, self.writes), cache:
            return self.metric.evaluate_applied(fidelity)


@dataclass
class ExpertWork:
    """Everything that the steps of the method share.

    Attributes:
        method: the settings.
        num_experts: that are left in each layer, E'.
        whole: what all numbers of experts have in common.
        datamodule: of the run.
        metric: that candidates are compared by.
        cache: of hidden states.
    """

    method: ExpertSearch
    num_experts: int
    whole: WholeModel
    datamodule: Any
    metric: str
    cache: PrefixCache | None = None
    _begun: list[float] = field(default_factory=list, init=False)

    @property
    def evaluations(self) -> CandidateTrainer:
        """Of the run."""
        return self.whole.evaluations

    @property
    def module(self) -> Any:
        """Of the run."""
        return self.whole.module

    @property
    def task_data(self) -> Any:
        """The data with the tasks of the search alone."""
        return self.whole.task_data

    @property
    def editor(self) -> Any:
        """Of the module's experts."""
        return self.module.expert_editor()

    @property
    def per_token(self) -> int:
        """k of candidates."""
        return self.method.experts_per_token(self.editor, self.num_experts)

    @property
    def bytes_per_parameter(self) -> int:
        """Of the weights as they are held."""
        return int(next(iter(self.module.network.parameters())).element_size())

    @property
    def name(self) -> str:
        """Of the search and its folder."""
        return f"experts{self.num_experts}"

    @cached_property
    def runner(self) -> SearchRunner:
        """Runs the search in the run folder."""
        return SearchRunner(self.evaluations, self.method.settings)

    @cached_property
    def space(self) -> ExpertMapSpace:
        """The space of the model's experts."""
        method, editor = self.method, self.editor
        orders = {
            name: {layer: one.neuron_orders for layer, one in maps.items() if one.neuron_orders is not None}
            for name, maps in self.whole.baseline_maps[self.num_experts].items()
        }
        sizes = []
        for layer in editor.layers.values():
            tensors = [*layer.weights().values(), *layer.router_rows().values()]
            sizes.append(sum(tensor[0].numel() for tensor in tensors if isinstance(tensor, torch.nn.Parameter)))
        with in_config("method"):
            return ExpertMapSpace(
                tuple(editor.layers),
                editor.num_experts,
                self.num_experts,
                method.groups,
                self.per_token,
                editor.own_routing.n_group,
                sizes,
                self.bytes_per_parameter,
                neuron_orders={name: each for name, each in orders.items() if each},
                router_mapping=method.router_mapping,
            )

    @cached_property
    def baselines(self) -> dict[str, ExpertMaps]:
        """Every baseline as a candidate, by name."""
        known = self.space.neuron_orders
        return {
            name: self.space.candidate_of(maps, name if name in known else "")
            for name, maps in self.whole.baseline_maps[self.num_experts].items()
        }

    @cached_property
    def draws(self) -> DrawMetrics:
        """The metric on the questions of each draw."""
        method = self.method
        return DrawMetrics(self.evaluations, self.module, self.task_data, self.metric, method.mode, self.runner.folder)

    def objective(self, draw: str) -> ExpertObjective:
        """Scores candidates on a draw."""
        kinds = {self.task_data.tasks[name].kind for name in self.task_data.evaluate}
        writes = "generation" in kinds and not self.metric.endswith(("log_likelihood", "choice_probability"))
        return ExpertObjective(self.draws.objective(self.space, draw), self.space, self.cache, writes)

    @cached_property
    def task(self) -> SearchTask:
        """The search."""
        settings = self.method.settings
        planner: Any = settings.strategy
        initial = list(self.baselines.values())
        with in_config("search"):
            plan = self.runner.plan(self.name, lambda budget: planner.plan(self.space, budget, initial))
        problem = Problem(self.space, settings.seed, settings.fidelity)
        evaluator = one_by_one(self.objective("search"), settings.time_limit_s)
        depends = {
            **self.draws.describe(),
            "tasks": ", ".join(self.task_data.evaluate),
            "weights": self.whole.fingerprint,
        }
        return SearchTask(self.name, problem, plan, evaluator, depends, self._seen)

    def _seen(self, record: Record[ExpertMaps]) -> None:
        """Say at once where all that the search begins with tie: there is nothing to choose parents by."""
        if record.source == INITIAL and record.score is not None:
            self._begun.append(record.score)
            if len(self._begun) == len(self.task.plan.initial) and len(set(self._begun)) == 1:
                remarks = remarks_after(self.metric, self.method.mode, self._begun, "that the search begins with")
                self.runner.remark([f"{self.num_experts} experts: {remark}" for remark in remarks])

    @cached_property
    def result(self) -> SearchResult[ExpertMaps]:
        """The search, from where it stopped."""
        return self.runner.run(self.task)

    @property
    def fidelity(self) -> int:
        """Questions behind the scores that are compared: the most that candidates were measured on."""
        scored = [record.fidelity for record in self.result.records if record.score is not None]
        return max(scored, default=self.method.settings.fidelity)

    def choices(self) -> list[Choice]:
        """The whole model, every baseline and the finalists of both phases, with scores on both draws."""
        found = [Choice(FULL, FULL, None, float("nan"))]
        for name, candidate in self.baselines.items():
            found.append(Choice(name, RANDOM if name.startswith(RANDOM) else name, candidate, float("nan")))
        found += [*self.finalists(PRUNED), *self.finalists(MERGED)]
        records = [record for record in self.result.records if record.fidelity == self.fidelity]
        known = {record.key: float(record.score) for record in records if record.score is not None}
        with self.evaluations.timing(f"{CHOICE}, {self.num_experts} experts"):
            search = self._scores(found, "search", self.fidelity, known)
            select = self._scores(found, "select", self.method.select, {})
        return [Choice(c.name, c.kind, c.candidate, search[self._key(c)], select[self._key(c)]) for c in found]

    def _scores(self, choices: Sequence[Choice], draw: str, count: int, known: Mapping[str, float]) -> dict[str, float]:
        """On a draw, by key; measured where they are not known, the whole model's once for all numbers of experts."""
        whole = self.whole.scores
        known = {**known, **({FULL: whole[draw, count]} if (draw, count) in whole else {})}
        missing = {self._key(c): c.candidate for c in choices if self._key(c) not in known}
        known |= dict(zip(missing, self.judge(list(missing.values()), draw, count), strict=True))
        whole[draw, count] = known[FULL]
        return known

    def _key(self, choice: Choice) -> str:
        return FULL if choice.candidate is None else self.space.key(choice.candidate)

    @property
    def merges(self) -> bool:
        """Whether the search came to merging: that it began with merged baselines is no merging of its own."""
        made = [r for r in self.result.records if r.source != INITIAL and r.score is not None]
        return any(not record.candidate.prunes for record in made)

    def ranked(self, kind: str) -> list[Record[ExpertMaps]]:
        """What the search measured of one phase, best first, the baselines that it began with among it.

        Nothing of merging where it did not come to that.
        """
        if kind == MERGED and not self.merges:
            return []
        own = [r for r in self.result.records if r.score is not None and r.fidelity == self.fidelity]
        kept = [record for record in own if record.candidate.prunes is (kind == PRUNED)]
        return sorted(kept, key=lambda record: record.rank)

    def measured_scores(self) -> list[float]:
        """Of all candidates of the search that answered all questions, lower is better."""
        return [float(r.score) for r in self.result.records if r.score is not None and r.fidelity == self.fidelity]

    def finalists(self, kind: str) -> list[Choice]:
        """The best of a phase by the search draw, and all that the search began with; not yet with scores.

        So what is chosen is never worse than a baseline on the questions that choose; where nothing was merged, than
        one that only prunes.
        """
        if kind == MERGED and not self.merges:
            return []
        names = {self.space.key(candidate): name for name, candidate in reversed(self.baselines.items())}
        best = self.ranked(kind)[: self.method.settings.finalists]
        found = {record.key: (str(record.index), record.candidate) for record in best}
        for candidate in self.task.plan.initial:
            if candidate.prunes is (kind == PRUNED):
                found.setdefault(self.space.key(candidate), ("", candidate))
        return [
            Choice(f"{kind} {names.get(key, index)}", kind, candidate, float("nan"))
            for key, (index, candidate) in found.items()
        ]

    def judge(self, candidates: Sequence[ExpertMaps | None], draw: str, count: int) -> list[float]:
        """Scores on a draw, lower is better; infinite where a measurement fails, unless the device is lost."""
        objective = self.objective(draw)

        def one(candidate: ExpertMaps | None) -> float:
            try:
                return objective.evaluate(candidate, count).score
            except (ValueError, FloatingPointError, RuntimeError) as error:
                if is_lost(error):
                    raise
                return float("inf")

        pieces: list[Callable[[], float]] = [partial(one, each) for each in candidates]
        return in_turn(self.evaluations, pieces)

    def report(self, candidate: ExpertMaps | None) -> dict[str, float]:
        """Every metric of all tasks on the report draw."""
        self.apply(candidate)
        return measured(self.evaluations, self.module, self.datamodule, "report", self.datamodule.num_samples)

    def apply(self, candidate: ExpertMaps | None) -> None:
        """Edit the module; None gives it its own experts back."""
        if candidate is None:
            self.space.restore(self.module)
        else:
            self.space.apply(self.module, candidate)

    def parameters(self, candidate: ExpertMaps | None) -> int:
        """Parameters of the whole model once it is saved."""
        self.apply(candidate)
        return int(self.editor.num_parameters())

    def tokens_per_second(self, candidate: ExpertMaps | None) -> float:
        """Tokens that scoring goes through in a second, the best of a few times; of the edited model, not the saved."""
        self.apply(candidate)
        return self._tokens_per_second()

    def _tokens_per_second(self) -> float:
        def timed() -> float:
            seconds, tokens = [], 0
            for _ in range(REPEATS + 1):
                begun = time.perf_counter()
                tokens = self.whole.run_batches("report", self.task_data.num_samples, TIMED_BATCHES)
                if self.module.device.type == "cuda":
                    torch.cuda.synchronize(self.module.device)
                seconds.append(time.perf_counter() - begun)
            return tokens / min(seconds[1:])

        return self.evaluations.inside(self.module, timed)

    def size(self, timed: bool) -> dict[str, float]:
        """What `method.limits` may limit, of any model with so many experts: the time only if asked for."""
        editor, rng = self.editor, np.random.default_rng(0)
        kept = random_kept(editor.num_experts, self.num_experts, editor.own_routing.n_group, rng)
        maps = selection_maps(kept, editor.num_experts)
        editor.apply(dict.fromkeys(editor.layers, maps), num_experts_per_tok=self.per_token)
        parameters = int(editor.num_parameters())
        found = {"parameters": float(parameters), "bytes": float(parameters * self.bytes_per_parameter)}
        if timed:
            found["ms_per_token"] = 1000 / float(self.evaluations.agreed(self._tokens_per_second()))
        editor.restore()
        return found

    def routing(self, candidate: ExpertMaps) -> dict[str, torch.Tensor]:
        """Tokens that each expert gets in the edited model, on the calibration questions, int64 [E] by layer."""
        self.apply(candidate)
        run = partial(self.whole.run_batches, "search", self.method.calibration)
        return self.evaluations.inside(self.module, partial(routing_load, self.editor, run))


@contextmanager
def _writing(module: Any, writes: bool) -> Iterator[None]:
    """Whether the model writes answers, for a while."""
    before = module.generate
    module.generate = before and writes
    try:
        yield
    finally:
        module.generate = before
