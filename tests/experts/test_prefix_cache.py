"""States kept between candidates: equal logits, layers that do not run, memory that stays within its limit."""

from typing import Any

import pytest
import torch
from experts.tiny_models import NAMES, logits, random_maps, tiny_model, tokens

from genlight.experts.editor import ExpertEditor
from genlight.experts.maps import LayerMaps, selection_maps
from genlight.experts.prefix_cache import PrefixCache

KEPT = [0, 2, 5, 7]


def candidates(editor: ExpertEditor) -> list[dict[str, LayerMaps]]:
    """Edits that differ in the last layer, in the first, in both, and none."""
    first, last = next(iter(editor.layers)), list(editor.layers)[-1]
    one, other = selection_maps(KEPT, 8), selection_maps([1, 3, 4, 6], 8)
    return [
        {},
        {first: one, last: one},
        {first: one, last: other},
        {first: other, last: other},
        {first: one, last: random_maps(1)},
        {last: one},
    ]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same_bit_for_bit(name: str) -> None:
    model = tiny_model(name, num_hidden_layers=4)
    editor, plain = ExpertEditor(model), []
    batches = [tokens(), tokens(3, 9)]
    masked = torch.ones_like(batches[1])
    masked[0, :4] = 0

    def outputs() -> list[Any]:
        return [
            logits(model, batches[0], use_cache=False),
            logits(model, batches[1], use_cache=False),
            logits(model, batches[1], attention_mask=masked, use_cache=False),
        ]

    for maps in candidates(editor):
        editor.apply(maps)
        plain.append(outputs())
    cache = PrefixCache(editor, 1 << 24)
    for _ in range(2):
        for maps, expected in zip(candidates(editor), plain, strict=True):
            editor.apply(maps)
            with cache.running():
                found = outputs()
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert cache.passed_over > 0.5 * cache.layers_seen
    # outside nothing is left of it
    editor.restore()
    assert all(torch.equal(a, b) for a, b in zip(outputs(), plain[0], strict=True))


def test_layers_before_the_first_change_do_not_run() -> None:
    model = tiny_model("mixtral", num_hidden_layers=4)
    editor = ExpertEditor(model)
    ran: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    cache, last = PrefixCache(editor, 1 << 24), list(editor.layers)[2]
    for maps, expected in (
        ({}, [0, 1, 2, 3]),
        ({last: selection_maps(KEPT, 8)}, [2, 3]),
        ({last: selection_maps([0, 1], 8)}, [2, 3]),
        ({next(iter(editor.layers)): selection_maps(KEPT, 8)}, [0, 1, 2, 3]),
    ):
        editor.apply(maps)
        ran.clear()
        with cache.running():
            logits(model, use_cache=False)
        assert ran == expected


def test_memory_stays_within_the_limit() -> None:
    model = tiny_model("mixtral", num_hidden_layers=4)
    editor = ExpertEditor(model)
    state = 4 * 12 * 32 * 4  # tokens of `tokens()` × H × bytes
    cache = PrefixCache(editor, 2 * state)
    for shift in range(3):
        with cache.running():
            logits(model, (tokens() + shift) % 64, use_cache=False)
        assert cache.bytes <= cache.limit
    assert cache.bytes == 2 * state
    cache.clear()
    assert cache.bytes == 0
    nothing = PrefixCache(editor, 0)
    with nothing.running():
        logits(model, use_cache=False)
    assert nothing.bytes == 0
    with pytest.raises(ValueError, match="limit"):
        PrefixCache(editor, -1)
