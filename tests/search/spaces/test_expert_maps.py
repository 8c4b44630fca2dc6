"""The space of expert maps: its operators, its names, its forms, and a search with an optimum that is known."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experts.tiny_models import logits, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.errors import UserError
from genlight.experts.baselines import baseline
from genlight.experts.editor import ExpertEditor
from genlight.experts.maps import LayerMaps, selection_maps
from genlight.experts.statistics import RoutingStatistics
from genlight.search.codec import CandidateCodec
from genlight.search.engine import Search, open_archive
from genlight.search.evaluation import one_by_one
from genlight.search.protocols import Evaluation
from genlight.search.records import History, Problem
from genlight.search.spaces.expert_map_edits import crossed_rows, disturbed, exchanged, normalised_rows
from genlight.search.spaces.expert_map_file import read_expert_maps
from genlight.search.spaces.expert_maps import ExpertMaps, ExpertMapSpace
from genlight.search.spaces.expert_plan import ExpertPlan, NearTheBest

LAYERS = tuple(f"model.layers.{number}.mlp" for number in range(6))
SPACES = {
    "alone": ExpertMapSpace(LAYERS, 8, 3),
    "groups": ExpertMapSpace(LAYERS, 8, 2, groups=4),
    "limited": ExpertMapSpace(LAYERS[:2], 8, 4, routing_groups=2),
    "all": ExpertMapSpace(LAYERS[:3], 4, 4),
}


def merging(space: ExpertMapSpace) -> ExpertMapSpace:
    return dataclasses.replace(space, phase="merge")


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(list(SPACES)), seed=st.integers(0, 10_000))
def test_pruning_keeps_sets(name: str, seed: int) -> None:
    """Ascending, distinct, as many of each routing group; a mutation changes something wherever it can."""
    space, rng = SPACES[name], np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    child = space.crossover(a, b, rng)
    for one in (a, space.mutate(a, rng), child):
        assert one.prunes and len(one.kept) == space.count
        for kept in one.kept:
            assert list(kept) == sorted(set(kept)) and len(kept) == space.num_kept
            size = space.num_experts // space.routing_groups
            counts = np.bincount(np.array(kept) // size, minlength=space.routing_groups)
            assert set(counts) == {space.num_kept // space.routing_groups}
    assert (space.mutate(a, rng) != a) is (space.num_kept < space.num_experts)
    for own, first, second in zip(child.kept, a.kept, b.kept, strict=True):
        assert set(first) & set(second) <= set(own) <= set(first) | set(second)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(list(SPACES)), seed=st.integers(0, 10_000), size=st.floats(0.05, 1))
def test_merging_keeps_matrices(name: str, seed: int, size: float) -> None:
    """Of the space's shape; whole again from JSON; of a crossover every row is a parent's, and no two are equal."""
    space, rng = merging(SPACES[name]), np.random.default_rng(seed)
    pruned = SPACES[name].sample(rng)
    a = space.mutate(pruned, rng, size=size)
    assert not a.prunes and space.key(a) != space.key(pruned)
    codec = CandidateCodec(ExpertMaps)
    assert codec.from_plain(codec.to_plain(a)) == a and codec.from_plain(codec.to_plain(pruned)) == pruned
    np.testing.assert_allclose(space.matrices(a), np.array([a.expert_maps, a.router_maps]).swapaxes(0, 1))
    b = space.sample(rng)
    child, first, second = (space.matrices(one) for one in (space.crossover(a, b, rng), a, b))
    for place in np.ndindex(*child.shape[:2]):
        rows = [tuple(row) for row in child[place]]
        assert set(rows) <= {tuple(row) for row in (*first[place], *second[place])}
        assert len(set(rows)) == len(rows)
    assert space.encode(a).shape == (space.count, 2 * space.num_experts)


def test_a_merge_s_mutation_has_the_paper_s_numbers() -> None:
    """A quarter of the entries of a touched matrix, by a Gaussian of 0.065; a quarter of the matrices is touched."""
    rng = np.random.default_rng(0)
    changed = disturbed(np.zeros((400, 400)), 0.25, 0.065, rng)
    assert np.mean(changed != 0) == pytest.approx(0.25, abs=0.01)
    assert changed[changed != 0].std() == pytest.approx(0.065, rel=0.02)
    space = merging(ExpertMapSpace([f"l.{n}." for n in range(40)], 8, 2))
    start = ExpertMaps(((0, 1),) * 40)
    shares = []
    for _ in range(60):
        maps = space.matrices(space.mutate(start, rng))
        shares.append(np.mean((maps != space.matrices(start)).any(axis=(2, 3))))
    assert np.mean(shares) == pytest.approx(0.25, abs=0.02)


def test_edits_by_hand() -> None:
    rng = np.random.default_rng(3)
    assert exchanged((0, 3), 4, 2, 1.0, rng) == (1, 2)  # each of its own routing group
    assert exchanged((0, 1), 2, 1, 1.0, rng) == (0, 1)
    np.testing.assert_array_equal(normalised_rows(np.array([[2.0, 2.0], [0.05, -0.02]])), [[0.5, 0.5], [0.05, -0.02]])
    a, b = np.eye(3)[[0, 1]], np.eye(3)[[1, 2]]
    np.testing.assert_array_equal(crossed_rows(a, b, 1.0, rng), a)
    # the second parent's first row is there already as the first parent's second
    np.testing.assert_array_equal(crossed_rows(a, b, 0.0, rng), np.eye(3)[[0, 2]])


def test_the_same_model_has_one_name() -> None:
    """Sets in any order; a candidate by layers that fits the groups; one-hot matrices."""
    space = SPACES["groups"]
    grouped = ExpertMaps(((0, 5), (1, 2), (3, 4), (6, 7)))
    by_layer = {layer: selection_maps(grouped.kept[space.group_of(n)], 8) for n, layer in enumerate(LAYERS)}
    assert space.candidate_of(by_layer) == grouped
    spread = ExpertMaps(tuple(grouped.kept[space.group_of(n)] for n in range(6)))
    assert space.key(spread) == space.key(grouped)
    turned = space.matrices(grouped)[:, :, ::-1]
    assert space.made(turned) == grouped
    other = {**by_layer, LAYERS[1]: selection_maps([0, 1], 8)}
    outside = space.candidate_of(other)
    assert len(outside.kept) == 6 and space.key(outside) != space.key(grouped)
    assert space.encode(outside).shape == (6, 16) and space.encode(grouped).shape == (4, 16)


def test_every_number_of_a_merged_candidate_counts_in_its_name() -> None:
    """Also which matrix it stands in, and the neurons' order; the two zeros are one."""
    space, row = ExpertMapSpace(LAYERS[:2], 4, 2), (0.5, 0.0, 0.25, 1.0)
    a, b = (row, row[::-1]), (row[::-1], row)
    one = ExpertMaps((), (a, b), (b, a))
    others = [ExpertMaps((), (b, a), (a, b)), ExpertMaps((), (a, b), (b, a), "m_smoe"), ExpertMaps((), (a, a), (b, a))]
    for place in range(4):
        changed = (*row[:place], row[place] + 1e-6, *row[place + 1 :])
        others.append(ExpertMaps((), ((changed, a[1]), b), (b, a)))
    assert len({space.key(each) for each in (one, *others)}) == 1 + len(others)
    assert len(space.key(one)) == 16
    assert space.key(ExpertMaps((), (((0.5, -0.0, 0.25, 1.0), a[1]), b), (b, a))) == space.key(one)
    assert space.key(ExpertMaps((), tuple(map(tuple, (a, b))), (b, a))) == space.key(one)


def test_an_archive_with_names_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Names of merged candidates were of their text once: what is measured would be measured again."""
    space, plan = SPACES["alone"], ExpertPlan().plan(SPACES["alone"], 300)
    before = json.loads(space.fingerprint())
    assert before.pop("version") == 2
    opened = functools.partial(open_archive, tmp_path, strategy=plan.strategy, fingerprint={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertMapSpace, "fingerprint", lambda _: json.dumps(before, sort_keys=True))
        opened(problem=Problem(space))
    with pytest.raises(UserError, match=r"belongs to another search: .*space is .*use another folder"):
        opened(problem=Problem(space))


def test_the_file_of_a_large_merge_is_read(tmp_path: Path) -> None:
    """48 layers of 128 experts, 64 of which are left."""
    row = (0.25,) * 128
    maps = (((row,) * 64),) * 48
    content = {
        "kind": "expert_maps", "version": 1, "num_experts": [128, 64], "num_experts_per_tok": 8,
        "router_mapping": "logits", "chosen": "EEP merge",
        "candidates": {"EEP merge": dataclasses.asdict(ExpertMaps((), maps, maps))},
    }  # fmt: skip
    (tmp_path / "expert_maps.json").write_text(json.dumps(content))
    assert read_expert_maps(tmp_path / "expert_maps.json").candidates["EEP merge"] == ExpertMaps((), maps, maps)


def test_layers_belong_to_groups_by_depth_and_parents_come_into_them() -> None:
    space = ExpertMapSpace([f"l.{n}." for n in range(32)], 4, 2, groups=4)
    assert [space.group_of(n) for n in (0, 7, 8, 15, 16, 23, 24, 31)] == [0, 0, 1, 1, 2, 2, 3, 3]
    kept = [(0, 1)] * 5 + [(2, 3)] * 3 + [(1, 2)] * 24
    assert space.kept(ExpertMaps(tuple(kept))) == ((0, 1), (1, 2), (1, 2), (1, 2))
    with pytest.raises(ValueError, match="fits neither 4 groups nor 32"):
        space.layer_maps(ExpertMaps(((0, 1),) * 5))


def test_a_merged_baseline_becomes_the_experts_that_count_most() -> None:
    rows = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.1, 0.9]])
    space = ExpertMapSpace(["l.0."], 4, 2)
    candidate = space.candidate_of({"l.0.": LayerMaps(rows, rows)})
    assert space.kept(candidate) == ((0, 3),)


def test_costs_are_counted() -> None:
    space = ExpertMapSpace(["l.0.", "l.1."], 8, 4, num_experts_per_tok=2, expert_parameters=[10, 30])
    cost = space.cost(ExpertMaps(((0, 1, 2, 3),) * 2))
    assert cost == {"expert_parameters": 160.0, "expert_bytes": 640.0, "active_expert_parameters": 80.0}


@dataclasses.dataclass
class Target:
    """A module that offers its experts."""

    editor: ExpertEditor

    def expert_editor(self) -> ExpertEditor:
        return self.editor


def test_applied_candidates_are_what_the_editor_does() -> None:
    """One after the other and back; the alignment of a baseline goes on to its children."""
    model = tiny_model("mixtral")
    target, own = Target(ExpertEditor(model)), logits(model)
    with RoutingStatistics(target.editor) as statistics:
        logits(model)
    maps = baseline("m_smoe", target.editor, statistics.results(), 4)
    orders = {name: one.neuron_orders for name, one in maps.items()}
    space = ExpertMapSpace(tuple(target.editor.layers), 8, 4, neuron_orders={"m_smoe": orders})
    merged, pruned = space.candidate_of(maps, "m_smoe"), ExpertMaps(((0, 1, 2, 3), (4, 5, 6, 7)))
    target.editor.apply(maps)
    expected = logits(model)
    space.apply(target, pruned)
    first = logits(model)
    space.apply(target, merged)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    space.apply(target, pruned)
    assert torch.equal(logits(model), first) and not torch.equal(first, own)
    space.restore(target)
    assert torch.equal(logits(model), own)
    child = merging(space).mutate(merged, np.random.default_rng(0))
    assert child.neuron_orders == "m_smoe"
    assert space.fingerprint() != dataclasses.replace(space, neuron_orders={}).fingerprint()
    with pytest.raises(UserError, match="ReadableExperts"):
        space.apply(object(), pruned)


class Distance:
    """How many experts are not those of a hidden set; for matrices the squared distance to it."""

    def __init__(self, space: ExpertMapSpace, wanted: ExpertMaps) -> None:
        self.space, self.wanted = space, space.matrices(wanted)

    def evaluate(self, candidate: ExpertMaps, fidelity: int) -> Evaluation:
        difference = self.space.matrices(candidate) - self.wanted
        return Evaluation(float((difference.sum(axis=2) ** 2).sum()))


def found(tmp_path: Any, plan: ExpertPlan, evaluations: int, initial: tuple[ExpertMaps, ...] = ()) -> Any:
    space = ExpertMapSpace(LAYERS[:3], 6, 2)
    objective = Distance(space, ExpertMaps(((0, 4), (1, 2), (3, 5))))
    made, problem = plan.plan(space, evaluations, initial), Problem(space, seed=1)
    archive = open_archive(tmp_path, problem, made.strategy, made.initial, fingerprint={})
    search = Search(problem, made.strategy, archive, one_by_one(objective), made.initial)
    return search.run(made.budget), made, problem


def test_a_search_finds_the_hidden_set_and_then_merges(tmp_path: Any) -> None:
    start = ExpertMaps(((0, 1), (0, 1), (0, 1)))
    result, made, problem = found(tmp_path, ExpertPlan(prune_evaluations=150), 170, (start, start))
    assert len(result.records) == 171 and made.initial == (start,)
    prunes = [record.candidate.prunes for record in result.records]
    assert prunes == [True] * 151 + [False] * 20
    assert result.best.score == 0.0 and result.best.candidate.prunes
    assert len({record.key for record in result.records}) == 171
    # what is asked for is a function of what was measured
    history = History(result.records[:111])
    fresh = ExpertPlan(prune_evaluations=150).plan(problem.space, 170, (start,)).strategy
    asked = [proposal.candidate for proposal in fresh.ask(problem, history)]
    assert asked == [proposal.candidate for proposal in made.strategy.ask(problem, history)]


def test_the_paper_s_search_begins_at_random(tmp_path: Any) -> None:
    near = NearTheBest(margin=2.0, crossover_probability=0.3, crossover_margin=1.0, least=4)
    plan = ExpertPlan(prune_evaluations=60, prune=NearTheBest(margin=2.0), merge=near, warm_start=False, random=20)
    result, made, _ = found(tmp_path, plan, 80, (ExpertMaps(((0, 1),) * 3),))
    sources = [record.source for record in result.records]
    assert made.initial == () and len(sources) == 80
    assert sources[:20] == ["random"] * 20 and set(sources[20:60]) == {"mutation"}
    assert set(sources[60:]) == {"mutation", "crossover"}


def test_a_small_space_is_exhausted_before_merging(tmp_path: Any) -> None:
    space = ExpertMapSpace(LAYERS[:1], 4, 2)
    wanted = ExpertMaps(((1, 3),))
    made, problem = ExpertPlan(prune_evaluations=50).plan(space, 60), Problem(space)
    archive = open_archive(tmp_path, problem, made.strategy, fingerprint={})
    result = Search(problem, made.strategy, archive, one_by_one(Distance(space, wanted))).run(made.budget)
    kept = {record.candidate.kept[0] for record in result.records if record.candidate.prunes}
    assert kept == set(itertools.combinations(range(4), 2))
    assert sum(not record.candidate.prunes for record in result.records) == 54


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_kept": 9}, "num_experts = 9"),
        ({"num_kept": 3, "routing_groups": 2}, "multiple of its 2 groups"),
        ({"groups": 7}, "groups = 7"),
        ({"sigma": 0.0}, "sigma"),
        ({"row_probability": 0.0}, "row_probability"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ExpertMapSpace(LAYERS, 8, **{"num_kept": 2, **values})


def test_plans_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"search\.budget"):
        ExpertPlan().plan(SPACES["alone"], 0)
    with pytest.raises(ValueError, match="random"):
        ExpertPlan(prune_evaluations=5, random=5).plan(SPACES["alone"], 10)
    with pytest.raises(ValueError, match="crossover_probability"):
        NearTheBest(crossover_probability=2.0)
