"""Guidance, filters and sampling of any autoregressive model."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from genlight.nets.autoregressive import (
    AutoregressiveModel,
    Nucleus,
    SamplingSettings,
    decode,
    filter_logits,
    group_guidance,
    guide,
    multinomial,
    parallel_probabilities,
)


def kept_by_hand(logits: list[float], top_k: int, top_p: float, nucleus: Nucleus) -> set[int]:
    """Codes that may be drawn, by the words of the definition."""
    kept = set(range(len(logits)))
    if top_k:
        kth = sorted(logits, reverse=True)[top_k - 1]
        kept = {code for code in kept if logits[code] >= kth}
    weights = torch.tensor(logits, dtype=torch.float64).exp()
    total = sum(weights[code].item() for code in kept)
    ordered = sorted(kept, key=lambda code: -logits[code])
    for place, code in enumerate(ordered[1:], start=1) if top_p < 1 else ():
        likelier = sum(weights[other].item() for other in ordered[:place]) / total
        if likelier > top_p or (nucleus == "tail" and likelier >= top_p):
            kept.discard(code)
    return kept


@pytest.mark.parametrize("nucleus", ["head", "tail"])
@pytest.mark.parametrize(("top_k", "top_p"), itertools.product((0, 1, 3, 12), (0.05, 0.6, 0.95, 1.0)))
def test_filters_keep_what_the_definition_says(top_k: int, top_p: float, nucleus: Nucleus) -> None:
    logits = 2 * torch.randn(20, 3, 12)
    filtered = filter_logits(logits, top_k, top_p, nucleus)
    for row, result in zip(logits.flatten(0, 1), filtered.flatten(0, 1), strict=True):
        assert set(torch.isfinite(result).nonzero().flatten().tolist()) == kept_by_hand(
            row.tolist(), top_k, top_p, nucleus
        )
        assert torch.equal(result[torch.isfinite(result)], row[torch.isfinite(result)])


def test_the_two_readings_of_top_p_differ_by_the_code_at_which_it_is_reached() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert torch.isfinite(filter_logits(logits, top_p=0.5, nucleus="head")).tolist() == [True, True, False, False]
    assert torch.isfinite(filter_logits(logits, top_p=0.5, nucleus="tail")).tolist() == [True, False, False, False]


def test_top_k_keeps_all_that_are_as_likely_as_the_last() -> None:
    assert torch.isfinite(filter_logits(torch.tensor([1.0, 2.0, 1.0, 0.0]), top_k=2)).tolist() == [True] * 3 + [False]


@dataclass
class Bigram:
    """Each token depends on the last one of the group before and on the class; null is class 0."""

    table: Tensor
    group_sizes: tuple[int, ...] = (1, 2, 1, 3)
    nucleus: Nucleus = "head"
    guidance_ramp: bool = False

    @property
    def codebook(self) -> Tensor:
        return torch.eye(self.table.shape[-1])

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def _next(self, condition: Tensor, last: Tensor, size: int) -> Tensor:
        return self.table[condition, last][:, None].expand(-1, size, -1)

    def begin(self, condition: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, dict]:
        length = 0 if prefix is None else prefix.shape[1]
        index = [0, *itertools.accumulate(self.group_sizes)].index(length)
        last = torch.zeros_like(condition) if prefix is None else prefix[:, -1]
        return self._next(condition, last, self.group_sizes[index]), {"condition": condition, "index": index}

    def extend(self, state: dict, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] == self.group_sizes[state["index"]]
        state["index"] += 1
        return self._next(state["condition"], tokens[:, -1], self.group_sizes[state["index"]])

    def logits(self, tokens: Tensor, condition: Tensor) -> Tensor:
        out, last, start = [], torch.zeros_like(condition), 0
        for size in self.group_sizes:
            out.append(self._next(condition, last, size))
            start += size
            last = tokens[:, start - 1]
        return torch.cat(out, 1)


@pytest.fixture
def model() -> Bigram:
    return Bigram(2 * torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0)))


SETTINGS = [
    SamplingSettings(),
    SamplingSettings(guidance_scale=2.5),
    SamplingSettings(guidance_scale=2.5, temperature=0.7, top_k=4, top_p=0.9),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("ramp", [False, True])
def test_parallel_probabilities_are_those_that_decoding_saw(
    model: Bigram, settings: SamplingSettings, ramp: bool
) -> None:
    model.guidance_ramp = ramp
    protocol: AutoregressiveModel = model
    seen: list[Tensor] = []
    draw = multinomial(torch.Generator().manual_seed(0))

    def choose(probabilities: Tensor, group: int) -> Tensor:
        assert group == len(seen)
        seen.append(probabilities)
        return draw(probabilities, group)

    condition = torch.tensor([1, 2, 2, 1])
    tokens = decode(protocol, condition, settings, choose)
    torch.testing.assert_close(parallel_probabilities(protocol, tokens, condition, settings), torch.cat(seen, 1))
    # and they are these, by hand, for the first token
    scale = 1.0 if ramp else settings.guidance_scale
    first = model.table[0, 0] + scale * (model.table[condition, 0] - model.table[0, 0])
    first = filter_logits(first / settings.temperature, settings.top_k, settings.top_p).softmax(-1)
    torch.testing.assert_close(seen[0][:, 0], first)


def test_guidance_grows_from_none_or_is_the_same_and_scale_1_is_none(model: Bigram) -> None:
    assert group_guidance(model, 4.0) == (4.0,) * 4
    model.guidance_ramp = True
    assert group_guidance(model, 4.0) == (1.0, 2.0, 3.0, 4.0)
    # the published form of VAR: (1 + a)·cond - a·uncond with a from 0 to cfg
    conditional, unconditional = torch.randn(2, 5, 7)
    torch.testing.assert_close(guide(conditional, unconditional, 1 + 1.5), 2.5 * conditional - 1.5 * unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)


@pytest.mark.parametrize("ramp", [False, True])
def test_a_scale_of_each_row_is_the_scale_of_all_where_the_row_is_alone(model: Bigram, ramp: bool) -> None:
    model.guidance_ramp = ramp
    condition, scales = torch.tensor([1, 2, 1, 2]), torch.tensor([1.0, 1.5, 4.0, 8.0])
    seen: list[Tensor] = []

    def likeliest(probabilities: Tensor, group: int) -> Tensor:
        seen.append(probabilities)
        return probabilities.argmax(-1)

    tokens = decode(model, condition, SamplingSettings(guidance_scale=2.0), likeliest, guidance=scales)
    together = seen.copy()
    for row, scale in enumerate(scales.tolist()):
        seen.clear()
        alone = decode(model, condition[row : row + 1], SamplingSettings(guidance_scale=scale), likeliest)
        assert torch.equal(alone[0], tokens[row])
        for mine, its in zip(seen, together, strict=True):
            torch.testing.assert_close(mine[0], its[row])


def test_scale_1_asks_only_for_the_condition(model: Bigram) -> None:
    model.table[0] = torch.nan
    tokens = decode(model, torch.tensor([1, 2]), SamplingSettings(), multinomial())
    assert tokens.shape == (2, 7)
    with pytest.raises(ValueError, match="group 0"):
        decode(model, torch.tensor([1, 2]), SamplingSettings(guidance_scale=2), multinomial())


@pytest.mark.parametrize("settings", SETTINGS)
def test_decoding_goes_on_from_a_prefix_and_may_stop_early(model: Bigram, settings: SamplingSettings) -> None:
    def greedy(probabilities: Tensor, group: int) -> Tensor:
        return probabilities.argmax(-1)

    condition = torch.tensor([1, 2])
    whole = decode(model, condition, settings, greedy)
    assert torch.equal(decode(model, condition, settings, greedy, num_groups=2), whole[:, :3])
    for length in (1, 3, 4):
        assert torch.equal(decode(model, condition, settings, greedy, prefix=whole[:, :length]), whole)
    for length in (2, 5, 7):
        with pytest.raises(ValueError, match=r"prefix|num_groups"):
            decode(model, condition, settings, greedy, prefix=whole[:, :length])
    for num_groups in (0, 1, 5):
        with pytest.raises(ValueError, match=f"num_groups = {num_groups}"):
            decode(model, condition, settings, greedy, prefix=whole[:, :1], num_groups=num_groups)


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(20_000, 2, 4)
    drawn = multinomial(torch.Generator().manual_seed(0))(probabilities, 0)
    shares = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    torch.testing.assert_close(shares, probabilities[0, 0], atol=0.01, rtol=0)
    assert drawn.shape == (20_000, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", 0.5),
        ("guidance_scale", torch.inf),
        ("temperature", 0.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_wrong_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingSettings(**{name: value})  # type: ignore[arg-type]


def test_more_codes_than_there_are_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="top_k = 5"):
        filter_logits(torch.zeros(4), top_k=5)
