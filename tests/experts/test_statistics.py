"""Routing statistics against a loop over tokens, without padding, batch size or order of batches in them."""

from typing import Any

import pytest
import torch
from experts.tiny_models import NAMES, block_inputs, logits, tiny_model, tokens
from torch import Tensor

from genlight.experts.editor import ExpertEditor
from genlight.experts.statistics import (
    LayerStatistics,
    RoutingStatistics,
    output_distances,
    router_similarity,
    routing_load,
)

SUMS = ("tokens", "frequency", "soft_activation", "output_norm", "gated_norm")


def collect(model: Any, batches: list[tuple[Tensor, Tensor | None]], **options: Any) -> dict[str, LayerStatistics]:
    with RoutingStatistics(ExpertEditor(model), **options) as statistics:
        for ids, mask in batches:
            logits(model, ids, attention_mask=mask)
    return statistics.results()


@pytest.mark.parametrize("name", NAMES)
def test_statistics_equal_a_loop_over_tokens(name: str) -> None:
    model = tiny_model(name)
    editor = ExpertEditor(model)
    results = collect(model, [(tokens(), None)])
    inputs = block_inputs(model, editor)
    for layer_name, layer in editor.layers.items():
        x = inputs[layer_name]
        scores, weights, index = layer.router(x)
        scores = scores.sigmoid() if name == "deepseek_v3" else scores.softmax(1)
        frequency, norm, gated = torch.zeros(8), torch.zeros(8), torch.zeros(8)
        for t in range(len(x)):
            for s in range(2):
                e = int(index[t, s])
                length = layer.expert_output(e, x[t : t + 1]).norm().detach()
                frequency[e] += 1
                norm[e] += length
                gated[e] += length * weights[t, s].detach()
        one = results[layer_name]
        assert torch.equal(one.frequency, frequency.long()) and int(one.frequency.sum()) == 2 * int(one.tokens)
        torch.testing.assert_close(one.output_norm.float(), norm)
        torch.testing.assert_close(one.gated_norm.float(), gated)
        torch.testing.assert_close(one.soft_activation.float(), scores.sum(0).detach())
        torch.testing.assert_close(one.reap.float(), torch.where(frequency > 0, gated / frequency, 0))
    assert torch.equal(logits(model), logits(tiny_model(name)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_size_do_not_count(side: str) -> None:
    model = tiny_model("mixtral")
    lengths = (5, 12, 9, 1)
    rows = [row[:n] for row, n in zip(tokens(), lengths, strict=True)]
    alone = collect(model, [(row[None], None) for row in rows])
    ids, mask = torch.zeros(4, 12, dtype=torch.int64), torch.zeros(4, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(12 - len(row), 12) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    batches = {"one": [(ids, mask)], "two": [(ids[:3], mask[:3]), (ids[3:], mask[3:])]}
    for batch in batches.values():
        padded = collect(model, batch)
        for name, one in alone.items():
            assert int(one.tokens) == sum(lengths)
            for key in (*SUMS, "inputs", "priorities"):
                torch.testing.assert_close(getattr(padded[name], key), getattr(one, key), rtol=1e-4, atol=1e-5)


def test_a_call_that_raises_counts_nowhere() -> None:
    """Memory that runs out in the second layer leaves nothing of the first, and the same tokens are sampled."""
    model = tiny_model("mixtral")
    expected, editor, full = collect(model, [(tokens(), None)]), ExpertEditor(model), [True]
    load = routing_load(editor, lambda: logits(model))

    def memory(*_: Any) -> None:
        if full.pop():
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    def halves() -> None:
        full[:] = [False, False, True]
        with pytest.raises(torch.OutOfMemoryError):
            logits(model)
        for part in tokens().split(2):
            logits(model, part)

    list(editor.layers.values())[1].experts.register_forward_pre_hook(memory)
    with RoutingStatistics(editor) as statistics:
        halves()
    for name, one in statistics.results().items():
        for key in (*SUMS, "inputs", "priorities"):
            torch.testing.assert_close(getattr(one, key), getattr(expected[name], key), rtol=1e-4, atol=1e-5)
    found = routing_load(editor, halves)
    assert all(torch.equal(found[name], load[name]) for name in load)


def test_a_mask_given_by_position_counts_too() -> None:
    model = tiny_model("mixtral")
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[:, 7:] = 0
    with RoutingStatistics(ExpertEditor(model)) as statistics, torch.no_grad():
        model(tokens(), mask)
    assert int(next(iter(statistics.results().values())).tokens) == 28


def test_generation_with_a_cache_counts_each_token_once() -> None:
    model = tiny_model("mixtral")
    with RoutingStatistics(ExpertEditor(model)) as statistics:
        model.generate(tokens(), attention_mask=torch.ones(4, 12), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert int(next(iter(statistics.results().values())).tokens) == 4 * (12 + 2)


def test_the_sample_keeps_its_limit_and_holds_the_same_tokens_in_all_layers() -> None:
    model = tiny_model("mixtral")
    everything = collect(model, [(tokens(), None)])
    limit = 2 * 10 * 32 * 4  # layers, tokens, hidden size, bytes
    batches = [(row[None], None) for row in tokens()]
    sampled = collect(model, batches, input_bytes=limit + 100)
    for name, one in sampled.items():
        assert one.inputs.shape == (10, 32) and torch.equal(one.priorities, one.priorities.sort()[0])
        assert torch.equal(one.priorities, everything[name].priorities[:10])
        torch.testing.assert_close(one.inputs, everything[name].inputs[:10], rtol=1e-4, atol=1e-5)
    assert len(next(iter(collect(model, batches, input_bytes=0).values())).inputs) == 0


def test_parts_add_up() -> None:
    model = tiny_model("olmoe")
    whole = collect(model, [(tokens(), None)])
    parts = [collect(model, [(tokens()[i : i + 2], None)], seed=i) for i in (0, 2)]
    total = {name: one.plus(parts[1][name], 20) for name, one in parts[0].items()}
    for name, one in whole.items():
        for key in SUMS:
            torch.testing.assert_close(getattr(total[name], key), getattr(one, key), rtol=1e-5, atol=1e-5)
        assert total[name].inputs.shape == (20, 32)


def test_similarities_equal_pairs_computed_one_by_one() -> None:
    model = tiny_model("qwen2_moe")
    editor = ExpertEditor(model)
    name, layer = next(iter(editor.layers.items()))
    x = block_inputs(model, editor)[name]
    alike, distances = router_similarity(layer, x), output_distances(layer, x)
    scores = (x @ layer.router.weight.T).detach()
    for a in range(8):
        for b in range(8):
            cosine = float(scores[:, a] @ scores[:, b] / (scores[:, a].norm() * scores[:, b].norm()))
            assert float(alike[a, b]) == pytest.approx(cosine, abs=1e-5)
            means = [layer.expert_output(e, x).detach().mean(0) for e in (a, b)]
            assert float(distances[a, b]) == pytest.approx(float((means[0] - means[1]).norm()), rel=1e-4, abs=1e-6)


def test_what_cannot_be_counted_is_refused() -> None:
    editor = ExpertEditor(tiny_model("mixtral"))
    with pytest.raises(ValueError, match="no token was seen"), RoutingStatistics(editor) as statistics:
        statistics.results()
    with pytest.raises(ValueError, match="input_bytes = -1"):
        RoutingStatistics(editor, input_bytes=-1)
    with pytest.raises(ValueError, match="must be"), RoutingStatistics(editor):
        logits(editor.model, attention_mask=torch.ones(4, 1, 12, 12))
    editor.prune(next(iter(editor.layers)), [0, 1])
    with pytest.raises(ValueError, match=r"restore\(\)"):
        RoutingStatistics(editor)
