"""Editing live models of every family: identities, equalities with loops, exact restoring, and what is refused."""

import copy
import gc
from typing import Any

import pytest
import torch
from experts.tiny_models import (
    GROUPED,
    KEPT,
    NAMES,
    UNGROUPED,
    block_inputs,
    logits,
    random_maps,
    state,
    tiny_model,
    tokens,
)
from torch import nn

import genlight.experts.editor as editing
from genlight.experts.baselines import best_experts
from genlight.experts.editor import ExpertEditor
from genlight.experts.layer import ExpertLayer, mapped_routing
from genlight.experts.maps import LayerMaps, selection_maps
from genlight.experts.statistics import RoutingStatistics
from genlight.search.protocols import ReadableExperts

RENORMALISING = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def deleted(model: Any, kept: list[int]) -> Any:
    """A copy of the model with all other experts cut out by hand."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name in (*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))):
            tensor = getattr(module, name)
            if type(module).__name__.endswith(("Experts", "Router")):
                setattr(module, name, nn.Parameter(tensor[kept]) if isinstance(tensor, nn.Parameter) else tensor[kept])
        if type(module).__name__.endswith(("Experts", "Router")):
            module.num_experts = len(kept)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mapping", ["logits", "post_softmax"])
def test_identity_leaves_logits_bit_equal(name: str, mapping: Any) -> None:
    model = tiny_model(name)
    before, held = logits(model), state(model)
    editor = ExpertEditor(model, router_mapping=mapping)
    for layer in editor.layers:
        editor.merge(layer, torch.eye(8), torch.eye(8))
    assert not editor.edited and torch.equal(logits(model), before)
    assert state(model) == held


@pytest.mark.parametrize("name", NAMES)
def test_pruning_equals_cutting_experts_out(name: str) -> None:
    model = tiny_model(name)
    full, expected = logits(model), logits(deleted(model, KEPT))
    editor = ExpertEditor(model)
    for layer in editor.layers:
        editor.prune(layer, KEPT)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (expected - full).abs().max() > 0.1
    assert {key: len(value) for key, value in editor.read(layer).items()} == dict.fromkeys(editor.read(layer), 4)


@pytest.mark.parametrize("name", RENORMALISING)
def test_pruning_experts_that_nobody_is_routed_to_changes_nothing(name: str) -> None:
    """One token uses two experts a layer. Without renormalising, even unused experts share in the softmax."""
    model, ids = tiny_model(name), tokens(1, 1)
    editor = ExpertEditor(model)
    with RoutingStatistics(editor) as statistics:
        before = logits(model, ids)
    for layer, one in statistics.results().items():
        kept = best_experts(one.frequency, 4, editor.routing.n_group)
        assert one.frequency[kept].sum() == 2
        editor.prune(layer, kept)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(tiny_model(name)), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_one_hot_merging_equals_pruning_bit_for_bit(name: str) -> None:
    model = tiny_model(name)
    editor = ExpertEditor(model)
    editor.apply({layer: selection_maps(KEPT, 8) for layer in editor.layers})
    pruned = logits(model)
    editor.restore()
    for layer in editor.layers:
        editor.merge(layer, torch.eye(8)[KEPT], torch.eye(8)[KEPT])
    assert torch.equal(logits(model), pruned)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep_merged", [False, True])
def test_merging_equals_a_loop_over_experts(name: str, keep_merged: bool) -> None:
    """Weights, biases and router rows, summed expert by expert, in a model cut by hand."""
    model = tiny_model(name)
    editor = ExpertEditor(model, keep_merged=keep_merged)
    maps = {layer: random_maps(number) for number, layer in enumerate(editor.layers)}
    by_hand = deleted(model, KEPT)
    for layer_name, one in maps.items():
        layer, target = editor.layers[layer_name], by_hand.get_submodule(layer_name)
        parts = [(layer.weights(), target.experts, one.expert_map)]
        router = target.router if name == "gpt_oss" else target.gate
        parts.append((layer.router_rows(), router, one.router_map))
        for tensors, module, matrix in parts:
            for key, tensor in tensors.items():
                rows = [sum(float(matrix[j, i]) * tensor[i].double() for i in range(8)) for j in range(4)]
                getattr(module, key).data = torch.stack(rows).float()
    editor.apply(maps)
    for _ in range(2):
        torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", UNGROUPED)
def test_order_of_experts_does_not_matter(name: str) -> None:
    model = tiny_model(name)
    before = logits(model)
    editor = ExpertEditor(model)
    rows = torch.eye(8)[[3, 1, 7, 0, 2, 6, 5, 4]]
    editor.apply({layer: LayerMaps(rows, rows) for layer in editor.layers})
    assert editor.edited
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UNGROUPED)
def test_the_mean_of_equal_experts_is_that_expert(name: str) -> None:
    model = tiny_model(name)
    editor = ExpertEditor(model)
    with torch.no_grad():
        for layer in editor.layers.values():
            for tensor in layer.weights().values():
                tensor.copy_(tensor[:1].expand_as(tensor))
    before = logits(model)
    mean, rows = torch.full((8, 8), 1 / 8), torch.eye(8)
    editor.apply({layer: LayerMaps(mean, rows) for layer in editor.layers})
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_candidates_in_any_order_give_the_same_bits_and_restore_is_exact(name: str) -> None:
    model = tiny_model(name)
    before, held = logits(model), state(model)
    editor = ExpertEditor(model)
    parameters = {key: id(value) for key, value in model.named_parameters()}
    candidates = [{layer: random_maps(7 * seed + n) for n, layer in enumerate(editor.layers)} for seed in (1, 2)]
    results = []
    for candidate in (candidates[0], candidates[1], candidates[0]):
        editor.apply(candidate)
        with torch.inference_mode():
            results.append(model(input_ids=tokens()).logits.clone())
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
    editor.restore()
    assert torch.equal(logits(model), before) and state(model) == held
    assert {key: id(value) for key, value in model.named_parameters()} == parameters
    assert not any(m._forward_pre_hooks for layer in editor.layers.values() for m in (layer.router, layer.experts))


def test_only_layers_that_differ_are_touched() -> None:
    editor = ExpertEditor(tiny_model("mixtral", num_hidden_layers=4))
    names = list(editor.layers)
    one = {name: random_maps(n) for n, name in enumerate(names)}
    assert editor.apply(one) == names
    assert editor.apply({name: random_maps(n) for n, name in enumerate(names)}) == []
    assert editor.apply({**one, names[2]: random_maps(9)}) == [names[2]]
    assert editor.apply({name: one[name] for name in names[:2]}) == names[2:]
    assert editor.apply({}, num_experts_per_tok=1) == names
    assert editor.apply({}) == names and not editor.edited


def test_weights_are_given_back_when_a_pass_fails() -> None:
    model = tiny_model("mixtral")
    held = state(model)
    editor = ExpertEditor(model)
    editor.apply({layer: random_maps(0) for layer in editor.layers})
    with pytest.raises(RuntimeError):
        next(iter(editor.layers.values())).router(torch.zeros(3, 5))
    with pytest.raises((RuntimeError, IndexError)):
        next(iter(editor.layers.values())).experts(torch.zeros(3, 5), torch.zeros(3, 2).long(), torch.zeros(3, 2))
    assert state(model) == held
    assert next(iter(editor.layers.values())).router.num_experts == 8


@pytest.mark.parametrize("name", NAMES)
def test_fewer_active_experts_equal_a_model_built_that_way(name: str) -> None:
    model, other = tiny_model(name), tiny_model(name, num_experts_per_tok=1)
    before = logits(model)
    editor = ExpertEditor(model)
    editor.route(num_experts_per_tok=1)
    assert torch.equal(logits(model), logits(other)) and not torch.equal(before, logits(model))
    editor.route()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", GROUPED)
def test_routing_without_groups_equals_a_model_built_that_way(name: str) -> None:
    model, other = tiny_model(name), tiny_model(name, n_group=1, topk_group=1)
    editor = ExpertEditor(model)
    assert not torch.equal(logits(model), logits(other))
    editor.route(ungroup=True)
    assert torch.equal(logits(model), logits(other))
    editor.prune(next(iter(editor.layers)), [0, 1, 2])


@pytest.mark.parametrize("name", UNGROUPED)
def test_layers_may_have_different_numbers_of_experts(name: str) -> None:
    model = tiny_model(name, num_hidden_layers=3)
    editor = ExpertEditor(model)
    first, second = list(editor.layers)[:2]
    editor.prune(first, [1, 2, 4])
    only_first = logits(model)
    editor.merge(second, random_maps(3, 5).expert_map, random_maps(3, 5).router_map)
    assert list(editor.experts_left().values())[:2] == [3, 5]
    assert not torch.equal(logits(model), only_first)
    editor.restore(second)
    assert torch.equal(logits(model), only_first)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_load_balancing_loss_runs_on_edited_models(name: str) -> None:
    model = tiny_model(name)
    model(input_ids=tokens(), output_router_logits=True)  # installs the recorders of transformers before the edits
    editor = ExpertEditor(model)
    editor.prune(next(iter(editor.layers)), KEPT)
    out = model(input_ids=tokens(), labels=tokens(), output_router_logits=True)
    assert all(one.shape[-1] == 8 for one in out.router_logits) and torch.isfinite(out.loss)
    assert bool((out.router_logits[0][:, 4:] == -torch.inf).all())


def test_mixed_probabilities_by_hand() -> None:
    """P = [.5, .3, .2] through [[1, 0, 0], [0, .5, .5]] is [.5, .25], so two experts get 2/3 and 1/3."""
    router_map = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    weights, index = mapped_routing(scores, router_map, 2, True)
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 1 / 3]]))
    assert index.tolist() == [[0, 1]]
    torch.testing.assert_close(mapped_routing(scores, router_map, 1, False)[0], torch.tensor([[0.5]]))
    negative = mapped_routing(scores, -router_map, 2, True)[0]
    assert bool(torch.isfinite(negative).all())


def test_mixed_probabilities_in_a_model_equal_the_formula() -> None:
    model = tiny_model("qwen2_moe")
    editor = ExpertEditor(model, router_mapping="post_softmax")
    name, layer = next(iter(editor.layers.items()))
    inputs = block_inputs(model, editor)[name]
    maps = random_maps(4)
    editor.apply({name: maps})
    _, weights, index = layer.router(inputs)
    probabilities = (inputs @ layer.router.weight.T).softmax(1) @ maps.router_map.T
    torch.testing.assert_close(weights, probabilities.sort(descending=True)[0][:, :2])
    assert torch.equal(index, probabilities.topk(2)[1])


@pytest.mark.parametrize("name", NAMES)
def test_one_hot_maps_mean_the_same_in_both_ways_if_weights_are_renormalised(name: str) -> None:
    model = tiny_model(name)
    results = []
    for mapping in ("logits", "post_softmax"):
        editor = ExpertEditor(model, router_mapping=mapping)  # type: ignore[arg-type]
        maps = {layer: selection_maps(KEPT, 8) for layer in editor.layers}
        if name == "deepseek_v2_groups" and mapping == "post_softmax":
            with pytest.raises(ValueError, match="not defined for deepseek_v2"):
                editor.apply(maps)
            return
        editor.apply(maps)
        results.append(logits(model))
        editor.restore()
    difference = float((results[0] - results[1]).abs().max())
    assert difference < 1e-5 if name in RENORMALISING else difference > 0.1


def test_maps_that_do_not_fit_leave_the_model_as_it_was() -> None:
    editor = ExpertEditor(tiny_model("mixtral"))
    first = next(iter(editor.layers))
    editor.prune(first, KEPT)
    held = editor.maps
    for maps, message in [
        ({"model.layers.9.mlp": selection_maps([0, 1], 8)}, "no layer with experts; there are model.layers.0.mlp"),
        ({first: selection_maps([0, 1], 6)}, "maps are of 6 experts, the layer has 8"),
        ({first: selection_maps([3], 8)}, r"model.layers.0.mlp: num_experts = 1 must be at least"),
        ({first: LayerMaps(torch.eye(8), torch.eye(8), torch.arange(5).repeat(8, 1))}, "5 columns, experts 48"),
    ]:
        with pytest.raises(ValueError, match=message):
            editor.apply(maps)
        assert editor.maps.keys() == held.keys() and editor.maps[first] is held[first]
    with pytest.raises(ValueError, match="at least num_experts_per_tok = 5"):
        editor.route(num_experts_per_tok=5)
    with pytest.raises(ValueError, match="num_experts_per_tok = 0"):
        editor.route(num_experts_per_tok=0)
    with pytest.raises(ValueError, match="router_mapping = 'mean'"):
        ExpertEditor(editor.model, router_mapping="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GROUPED)
def test_groups_must_keep_as_many_experts_each(name: str) -> None:
    editor = ExpertEditor(tiny_model(name))
    layer = next(iter(editor.layers))
    with pytest.raises(ValueError, match="experts are kept of the"):
        editor.prune(layer, [0, 1, 2, 7])
    with pytest.raises(ValueError, match="multiple of n_group"):
        editor.prune(layer, [0, 1, 2, 3, 7])


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_mixed_probabilities_are_refused_where_there_is_no_full_softmax(name: str) -> None:
    editor = ExpertEditor(tiny_model(name), router_mapping="post_softmax")
    with pytest.raises(ValueError, match="not defined"):
        editor.apply({next(iter(editor.layers)): random_maps(0)})


def test_a_module_that_hands_out_its_editor_is_readable() -> None:
    class Module:
        def expert_editor(self) -> ExpertEditor:
            return ExpertEditor(tiny_model("mixtral"))

    assert isinstance(Module(), ReadableExperts)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_of_running_experts_sees_the_edits(implementation: str) -> None:
    model = tiny_model("mixtral")
    editor = ExpertEditor(model)
    layers = list(editor.layers)
    editor.apply({layers[0]: random_maps(0), layers[1]: selection_maps(KEPT, 8)})
    expected = logits(model)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("keep_merged", "held"), [(False, 0), (True, 3)])
def test_memory_holds_the_merged_experts_of_one_layer_unless_all_are_kept(
    keep_merged: bool, held: int, request: pytest.FixtureRequest
) -> None:
    editor = ExpertEditor(tiny_model("mixtral", num_hidden_layers=3), keep_merged=keep_merged)
    gc.collect()  # of other tests
    gc.freeze()  # and what is left of them is not looked through
    request.addfinalizer(gc.unfreeze)
    counts = []

    def merged(*_: Any) -> int:
        return sum(isinstance(one, nn.Parameter) and tuple(one.shape) == (4, 32, 48) for one in gc.get_objects())

    for layer in editor.layers.values():
        layer.experts.act_fn.register_forward_hook(lambda *_: counts.append(merged()))
    editor.model.set_experts_implementation("eager")
    editor.apply({name: random_maps(n) for n, name in enumerate(editor.layers)})
    logits(editor.model)
    assert set(counts) == {1}
    own = [layer._merged for layer in editor.layers.values() if layer._merged is not None]
    assert len(own) == held and merged() == 0


def test_many_passes_merge_once_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = ExpertEditor(tiny_model("mixtral"))
    editor.apply({name: random_maps(n) for n, name in enumerate(editor.layers)})
    expected, merged = logits(editor.model), []
    own = ExpertLayer.edited_weights

    def merges(free: int | None = None) -> int:
        merged.clear()
        if free is not None:
            monkeypatch.setattr(editing, "free_bytes", lambda _: free)
        with editor.keeping_merged():
            assert all(torch.equal(logits(editor.model), expected) for _ in range(3))
        return len(merged)

    monkeypatch.setattr(ExpertLayer, "edited_weights", lambda layer: merged.append(layer) or own(layer))
    needed = 2 * 4 * (3 * 32 * 48) * 4  # layers, experts, numbers of one, bytes
    assert sum(layer.merged_bytes for layer in editor.layers.values()) == needed
    assert (merges(), merges(2 * needed), merges(2 * needed - 1)) == (2, 2, 6)
    assert all(layer._merged is None and not layer.keep_merged for layer in editor.layers.values())
    editor.prune(next(iter(editor.layers)), KEPT)
    assert sum(layer.merged_bytes for layer in editor.layers.values()) == needed // 2


@pytest.mark.parametrize("name", NAMES)
def test_models_of_16_bits_are_edited_in_their_type(name: str) -> None:
    model = tiny_model(name).bfloat16()
    before, held = logits(model), {key: (tensor.dtype, tensor.clone()) for key, tensor in model.state_dict().items()}
    editor = ExpertEditor(model)
    editor.apply({layer: random_maps(n) for n, layer in enumerate(editor.layers)})
    assert logits(model).dtype == torch.bfloat16 and bool(torch.isfinite(logits(model)).all())
    read = editor.read(next(iter(editor.layers)))
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}
    editor.restore()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, held[key][1]) for key, tensor in model.state_dict().items())
