"""Baselines against brute force, planted experts, and the constraints of groups."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from experts.tiny_models import GROUPED, NAMES, block_inputs, logits, state, tiny_model, tokens
from torch import Tensor

from genlight.experts.baselines import BASELINES, SCORES, baseline, best_experts, clusters_of, reconstruction_losses
from genlight.experts.editor import ExpertEditor
from genlight.experts.maps import chosen_rows, is_identity
from genlight.experts.statistics import RoutingStatistics


def measured(name: str, ids: Tensor | None = None, mapping: Any = "logits") -> tuple[ExpertEditor, dict[str, Any]]:
    editor = ExpertEditor(tiny_model(name), router_mapping=mapping)
    with RoutingStatistics(editor) as statistics:
        logits(editor.model, ids)
    return editor, statistics.results()


def kept(maps: Any) -> list[int]:
    rows = chosen_rows(maps.router_map)
    assert rows is not None and torch.equal(maps.expert_map, maps.router_map)
    return rows.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_every_baseline_fits_every_family(name: str) -> None:
    editor, statistics = measured(name)
    held = state(editor.model)
    for method in BASELINES:
        maps = baseline(method, editor, statistics, 4, max_subsets=20)
        assert list(maps) == list(editor.layers)
        for one in maps.values():
            torch.testing.assert_close(one.expert_map.sum(1), torch.ones(4))
            assert ("smoe" in method) == (chosen_rows(one.expert_map) is None)
            if name in GROUPED:
                groups = editor.own_routing.n_group
                blocks = one.router_map.unflatten(1, (groups, -1)).sum(2).argmax(1)
                assert torch.equal(blocks, torch.arange(4) // (4 // groups))
        editor.apply(maps)
        assert bool(torch.isfinite(logits(editor.model)).all())
        editor.restore()
        everything = baseline(method, editor, statistics, 8, max_subsets=20)
        assert all(is_identity(one) for one in everything.values())
    assert state(editor.model) == held


@pytest.mark.parametrize("method", SCORES)
def test_scores_keep_the_largest(method: str) -> None:
    editor, statistics = measured("mixtral")
    for name, maps in baseline(method, editor, statistics, 3).items():
        scores = SCORES[method](statistics[name])
        assert kept(maps) == sorted(sorted(range(8), key=lambda e: (-float(scores[e]), e))[:3])


def test_best_experts_by_hand() -> None:
    assert best_experts(torch.tensor([1.0, 3, 3, 0]), 2) == [1, 2]
    assert best_experts(torch.tensor([5, 5, 5, 5]), 3) == [0, 1, 2]
    assert best_experts(torch.tensor([4.0, 3, 2, 1]), 2, groups=2) == [0, 2]


def test_random_sets_differ_by_seed_and_layer_and_are_drawn_again() -> None:
    editor, statistics = measured("mixtral")
    sets = [[kept(m) for m in baseline("random", editor, statistics, 4, seed=s).values()] for s in (0, 1, 0)]
    assert sets[0] == sets[2] != sets[1] and sets[0][0] != sets[0][1]


@pytest.mark.parametrize("name", NAMES)
def test_reconstruction_losses_equal_the_outputs_of_pruned_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genlight.experts.baselines._CHUNK_BYTES", 20_000)
    model = tiny_model(name)
    editor = ExpertEditor(model)
    layer_name, layer = next(iter(editor.layers.items()))
    block, x = model.get_submodule(layer_name), block_inputs(model, editor)[layer_name]
    sets = [[0, 2, 5, 7], [1, 2, 4, 6]]

    def output() -> Tensor:
        with torch.no_grad():
            out = block(x[None])
        return out[0] if isinstance(out, tuple) else out

    full, losses = output(), reconstruction_losses(editor, layer, x, sets)
    for number, one in enumerate(sets):
        editor.prune(layer_name, one)
        assert float(losses[number]) == pytest.approx(float((output() - full).square().sum()), rel=1e-4)
        editor.restore()


def test_naee_is_the_best_of_all_sets() -> None:
    editor, statistics = measured("qwen3_moe")
    maps = baseline("naee", editor, statistics, 3)
    sets = [list(one) for one in itertools.combinations(range(8), 3)]
    for name, layer in editor.layers.items():
        losses = reconstruction_losses(editor, layer, statistics[name].inputs, sets)
        assert kept(maps[name]) == sets[int(losses.argmin())]
        sampled = baseline("naee", editor, statistics, 3, max_subsets=10)[name]
        assert losses[sets.index(kept(sampled))] >= losses.min()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_nobody_uses_go_first(name: str) -> None:
    """One token uses two of eight experts a layer; without the six others the model is the full one."""
    ids = tokens(1, 1)
    editor, statistics = measured(name, ids)
    before = logits(editor.model, ids)
    for method in ("frequency", "ean", "reap", "naee", "soft_activation"):
        maps = baseline(method, editor, statistics, 2)
        for layer_name, one in statistics.items():
            used = one.frequency.nonzero().flatten().tolist()
            assert len(used) == 2 and kept(maps[layer_name]) == used
            assert bool((one.reap[one.frequency == 0] == 0).all())
        editor.apply(maps)
        torch.testing.assert_close(logits(editor.model, ids), before, rtol=1e-5, atol=1e-5)
        editor.restore()
    layer_name, layer = next(iter(editor.layers.items()))
    dropped = next(e for e in range(8) if statistics[layer_name].frequency[e] == 0)
    loss = reconstruction_losses(editor, layer, statistics[layer_name].inputs, [[e for e in range(8) if e != dropped]])
    assert float(loss[0]) < 1e-9


def test_active_experts_and_groups_that_are_on_count() -> None:
    editor, statistics = measured("deepseek_v3")
    editor.route(num_experts_per_tok=1, ungroup=True)
    expected = logits(editor.model)
    for method in BASELINES:
        assert {one.num_experts for one in baseline(method, editor, statistics, 3, max_subsets=5).values()} == {3}
    assert torch.equal(logits(editor.model), expected)


def test_average_linkage_equals_merging_the_nearest_pair_again_and_again() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(9, 3))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    for number in range(1, 10):
        clusters = [[i] for i in range(9)]
        while len(clusters) > number:
            pairs = itertools.combinations(range(len(clusters)), 2)
            a, b = min(pairs, key=lambda p: distances[np.ix_(clusters[p[0]], clusters[p[1]])].mean())
            clusters[a] += clusters.pop(b)
        labels = clusters_of(distances, number)
        found = [[i for i in range(9) if labels[i] == label] for label in set(labels)]
        assert sorted(found) == sorted(sorted(c) for c in clusters)


@pytest.mark.parametrize("method", ["m_smoe", "hc_smoe"])
def test_equal_experts_are_merged_into_themselves(method: str) -> None:
    """Experts 1, 3, 5, 7 are copies of 0, 2, 4, 6, neurons shuffled; merging the pairs keeps what experts compute."""
    model = tiny_model("mixtral")
    editor = ExpertEditor(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in editor.layers.values():
            for e in range(0, 8, 2):
                order = torch.randperm(48, generator=generator) if method == "m_smoe" else torch.arange(48)
                layer.experts.gate_up_proj[e + 1] = layer.experts.gate_up_proj[e][torch.cat([order, order + 48])]
                layer.experts.down_proj[e + 1] = layer.experts.down_proj[e][:, order]
                layer.router.weight[e + 1] = layer.router.weight[e]
    with RoutingStatistics(editor) as statistics:
        logits(model)
    maps = baseline(method, editor, statistics.results(), 4)
    inputs = block_inputs(model, editor)
    for name, layer in editor.layers.items():
        # of two experts with equal scores only the first may be used; the most used ones need not be of all pairs
        rows = [sorted(row.nonzero().flatten().tolist()) for row in maps[name].expert_map]
        if method == "hc_smoe":
            assert [sorted({e // 2 for e in row}) for row in rows] == [[0], [1], [2], [3]]
        before = [layer.expert_output(e, inputs[name]) for e in range(8)]
        editor.apply({name: maps[name]})
        merged = editor.read(name)
        editor.restore()
        for j, row in enumerate(rows):
            if len({e // 2 for e in row}) == 1:
                for key, tensor in layer.weights().items():
                    tensor.data[0] = merged[key][j]
                torch.testing.assert_close(layer.expert_output(0, inputs[name]), before[row[0]], rtol=1e-4, atol=1e-4)


def test_merged_experts_are_means_by_frequency_and_routers_as_the_mapping_says() -> None:
    for mapping in ("logits", "post_softmax"):
        editor, statistics = measured("mixtral", mapping=mapping)
        for name, maps in baseline("hc_smoe", editor, statistics, 3).items():
            frequency = statistics[name].frequency.float()
            members = (maps.router_map > 0).float()
            assert torch.equal(members.sum(0), torch.ones(8))
            torch.testing.assert_close(maps.expert_map, members * frequency / (members @ frequency)[:, None])
            assert torch.equal(maps.router_map, maps.expert_map if mapping == "logits" else members)


def test_what_baselines_cannot_do_is_refused() -> None:
    editor, statistics = measured("deepseek_v3")
    for name, count, given, message in [
        ("best", 4, statistics, "baseline = 'best' must be one of random, frequency"),
        ("reap", 9, statistics, "at most 8"),
        ("reap", 5, statistics, "multiple of n_group"),
        ("reap", 4, {}, "no statistics of model.layers.1.mlp"),
    ]:
        with pytest.raises(ValueError, match=message):
            baseline(name, editor, given, count)
    with RoutingStatistics(editor, input_bytes=0) as without:
        logits(editor.model)
    for name in ("naee", "m_smoe", "hc_smoe"):
        with pytest.raises(ValueError, match="needs inputs"):
            baseline(name, editor, without.results(), 4)
    editor.prune(next(iter(editor.layers)), [0, 1, 4, 5])
    with pytest.raises(ValueError, match=r"restore\(\)"):
        baseline("reap", editor, statistics, 4)
