"""LlamaGen and VAR as autoregressive models: what each position may know, with and without a cache."""

import itertools

import pytest
import torch
from torch import Tensor

from genlight.nets.autoregressive import AutoregressiveModel, SamplingSettings, decode, multinomial
from genlight.nets.kv_cache import KeyValueCache
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer, rotary_table, rotate
from genlight.nets.residual_vq import ResidualQuantizer
from genlight.nets.var import VAR, VARTransformer
from genlight.nets.vq import VectorQuantizer

TEXT_LENGTH, TEXT_DIM, CODES, CLASSES = 5, 6, 17, 4
NAMES = ("var", "var-shared", "llamagen", "llamagen-text")


def randomised(module: torch.nn.Module) -> None:
    """A new network is nearly uniform and its branches nearly closed; here everything must count."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / fan**0.5))


def make(name: str) -> AutoregressiveModel:
    torch.manual_seed(0)
    model: AutoregressiveModel
    if name.startswith("var"):
        quantizer = ResidualQuantizer(CODES, 6, (1, 2, 3, 4))
        shared = name == "var-shared"
        transformer = VARTransformer(CODES, 6, (1, 2, 3, 4), 16, 2, 2, num_classes=CLASSES, shared_modulation=shared)
        randomised(quantizer)
        model = VAR(transformer.eval(), quantizer)
    else:
        options = {"text_dim": TEXT_DIM, "text_length": TEXT_LENGTH} if name == "llamagen-text" else {}
        model = LlamaGen(
            LlamaGenTransformer(CODES, 3, 16, 2, 2, num_classes=CLASSES, multiple_of=8, **options).eval(),
            VectorQuantizer(CODES, 6),
        )
    randomised(model.transformer)
    return model


def condition_of(name: str, batch: int = 3) -> Tensor:
    if name != "llamagen-text":
        return torch.arange(batch) % CLASSES
    features = torch.randn(batch, TEXT_LENGTH, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    for row in range(batch):
        features[row, : row % TEXT_LENGTH] = 0
    return features


def random_tokens(model: AutoregressiveModel, batch: int = 3) -> Tensor:
    return torch.randint(0, CODES, (batch, sum(model.group_sizes)), generator=torch.Generator().manual_seed(2))


def by_group(model: AutoregressiveModel, x: Tensor) -> tuple[Tensor, ...]:
    return x.split(model.group_sizes, dim=1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones_at_every_step(name: str) -> None:
    model, condition = make(name), condition_of(name)
    tokens = random_tokens(model)
    expected = by_group(model, model.logits(tokens, condition))
    parts = by_group(model, tokens)
    logits, state = model.begin(condition)
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-5)
    for index in range(1, len(parts)):
        logits = model.extend(state, parts[index - 1])
        torch.testing.assert_close(logits, expected[index], atol=1e-5, rtol=1e-5)
    assert expected[-1].std() > 0.1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_prefix_read_at_once_is_a_prefix_read_step_by_step(name: str) -> None:
    model, condition = make(name), condition_of(name)
    tokens = random_tokens(model)
    expected, parts = by_group(model, model.logits(tokens, condition)), by_group(model, tokens)
    for count in range(1, len(parts) - 1):
        logits, state = model.begin(condition, torch.cat(parts[:count], 1))
        torch.testing.assert_close(logits, expected[count], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.extend(state, parts[count]), expected[count + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llamagen", "llamagen-text"])
@torch.no_grad()
def test_a_cache_takes_several_tokens_at_once(name: str) -> None:
    network, condition = make(name).transformer, condition_of(name)
    tokens = random_tokens(make(name))
    embeddings, is_text = network.embed_condition(condition)
    embeddings = torch.cat((embeddings, network.token_embedding(tokens)), 1)
    cache = network.new_cache()
    parts = [network(part, is_text, cache) for part in embeddings.split((6, 3, embeddings.shape[1] - 9), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), network(embeddings, is_text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tokens_change_the_logits_of_later_groups_only(name: str) -> None:
    model, condition = make(name), condition_of(name)
    tokens = random_tokens(model)
    before = by_group(model, model.logits(tokens, condition))
    ends = [0, *itertools.accumulate(model.group_sizes)]
    for index, (start, end) in enumerate(itertools.pairwise(ends)):
        changed = tokens.clone()
        changed[:, start:end] = (changed[:, start:end] + 1) % CODES
        after = by_group(model, model.logits(changed, condition))
        for group, (old, new) in enumerate(zip(before, after, strict=True)):
            if group <= index:
                assert torch.equal(old, new)
            elif group == index + 1:
                # each row, and each of its positions, sees what came before
                assert (old != new).any(-1).all()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_null_and_condition_differ_and_the_first_scale_of_var_is_not_guided(name: str) -> None:
    model, condition = make(name), condition_of(name)
    null = model.null_condition(condition)
    assert null.shape == condition.shape and null.dtype == condition.dtype
    assert (model.begin(condition)[0] - model.begin(null)[0]).abs().max() > 0.01
    seen: dict[float, Tensor] = {}

    def first(scale: float) -> Tensor:
        def choose(probabilities: Tensor, group: int) -> Tensor:
            seen[scale] = probabilities
            return probabilities.argmax(-1)

        decode(model, condition, SamplingSettings(guidance_scale=scale), choose, num_groups=1)
        return seen[scale]

    plain, strong = first(1.0), first(5.0)
    if name.startswith("var"):
        torch.testing.assert_close(strong, plain)
    else:
        assert (strong - plain).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_depend_on_how_rows_are_batched(name: str) -> None:
    model, condition = make(name), condition_of(name)
    settings = SamplingSettings(guidance_scale=2.0, top_k=5)

    def greedy(probabilities: Tensor, group: int) -> Tensor:
        return probabilities.argmax(-1)

    whole = decode(model, condition, settings, greedy)
    one = torch.cat([decode(model, condition[row : row + 1], settings, greedy) for row in range(3)])
    assert torch.equal(whole, one)
    drawn = decode(model, condition, settings, multinomial(torch.Generator().manual_seed(0)))
    assert drawn.shape == whole.shape and drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() < CODES


@torch.no_grad()
def test_padding_of_a_text_tells_nothing() -> None:
    """The same text in a network that was padded more: only rows of zeros are added at its left."""
    long = make("llamagen-text")
    short = LlamaGenTransformer(CODES, 3, 16, 2, 2, multiple_of=8, text_dim=TEXT_DIM, text_length=2).eval()
    state = long.transformer.state_dict()
    short.load_state_dict(state | {"null_text": state["null_text"][-2:]})
    text, tokens = torch.randn(2, 2, TEXT_DIM), random_tokens(long, 2)
    padded = torch.cat((torch.zeros(2, TEXT_LENGTH - 2, TEXT_DIM), text), 1)
    expected = LlamaGen(short, long.quantizer)
    torch.testing.assert_close(long.logits(tokens, padded), expected.logits(tokens, text))
    null = (long.null_condition(padded), expected.null_condition(text))
    torch.testing.assert_close(long.logits(tokens, null[0]), expected.logits(tokens, null[1]))
    with pytest.raises(ValueError, match="5 text features"):
        long.logits(tokens, text)


def test_rotations_of_a_grid_know_differences_of_rows_and_columns_only() -> None:
    table = rotary_table(4, 12, condition_length=2)
    assert table.shape == (18, 6, 2) and not table[:2].any()
    query, key = torch.randn(2, 1, 1, 1, 12)
    grid = table[2:].unflatten(0, (4, 4))

    def product(first: tuple[int, int], second: tuple[int, int]) -> Tensor:
        return (rotate(query, grid[first][None]) * rotate(key, grid[second][None])).sum()

    torch.testing.assert_close(product((0, 1), (1, 3)), product((2, 0), (3, 2)))
    torch.testing.assert_close(rotate(query, grid[3, 2][None]).norm(), query.norm())
    assert not torch.isclose(product((0, 1), (1, 3)), product((0, 1), (2, 3)))
    # the first half of the pairs turns with the row only
    assert torch.equal(grid[2, 0, :3], grid[2, 3, :3]) and torch.equal(grid[0, 3, 3:], grid[2, 3, 3:])
    # the condition neither asks nor answers
    assert not rotate(query, table[:1]).any()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_lower_precision_changes_logits_a_little_and_the_cache_not_more(name: str) -> None:
    model, condition = make(name), condition_of(name)
    tokens = random_tokens(model)
    exact = model.logits(tokens, condition)
    length = model.group_sizes[0]

    def check(condition: Tensor) -> None:
        whole = model.logits(tokens, condition)
        first, state = model.begin(condition)
        second = model.extend(state, tokens[:, :length])
        stepped = torch.cat((first, second), 1)
        for found in (whole[:, : stepped.shape[1]], stepped):
            assert found.dtype == torch.float32
            assert (found - exact[:, : stepped.shape[1]]).norm() < 0.05 * exact[:, : stepped.shape[1]].norm()

    with torch.autocast("cpu", torch.bfloat16):
        check(condition)
    model.transformer.bfloat16()
    model.quantizer.bfloat16()
    check(condition.bfloat16() if condition.is_floating_point() else condition)


def test_new_networks_are_nearly_uniform() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0, CLASSES])
    for model in (
        VAR(VARTransformer(CODES, 6, (1, 2), 16, 2, 2, CLASSES), ResidualQuantizer(CODES, 6, (1, 2))),
        LlamaGen(LlamaGenTransformer(CODES, 2, 16, 2, 2, CLASSES), VectorQuantizer(CODES, 6)),
    ):
        spread = model.logits(random_tokens(model, 2), labels).softmax(-1) * CODES - 1
        assert spread.abs().max() < 0.1


def test_gradients_reach_every_parameter() -> None:
    for name in NAMES:
        model = make(name)
        model.transformer.zero_grad()
        model.logits(random_tokens(model), condition_of(name)).square().sum().backward()
        missing = [key for key, value in model.transformer.named_parameters() if value.grad is None]
        assert not missing, missing


def test_dropped_branches_leave_a_sample_as_it_is_and_keep_the_mean() -> None:
    torch.manual_seed(0)
    network = VARTransformer(CODES, 6, (1, 2), 16, 3, 2, CLASSES, drop_path=0.5)
    assert [block.drop_path for block in network.blocks] == [0.0, 0.25, 0.5]
    kept = network.blocks[2].train()._drop(torch.ones(4000, 2, 3))
    assert set(kept.unique().tolist()) == {0.0, 2.0} and (kept == kept[:, :1, :1]).all()
    assert abs(kept.mean() - 1) < 0.1
    assert torch.equal(network.blocks[2].eval()._drop(torch.ones(4, 2, 3)), torch.ones(4, 2, 3))


def test_a_cache_gives_back_all_it_was_given_and_no_more_than_it_has_room_for() -> None:
    cache = KeyValueCache(2, 5)
    given = [torch.randn(2, 1, 3, size, 4) for size in (2, 1, 2)]
    for step, (keys, values) in enumerate(given):
        for layer in range(2):
            held = cache.append(layer, keys + layer, values + layer)
            for kind in range(2):
                expected = torch.cat([pair[kind] for pair in given[: step + 1]], 2) + layer
                assert torch.equal(held[kind], expected)
        assert cache.length == sum(pair.shape[3] for pair in given[: step + 1])
    with pytest.raises(ValueError, match="max_length = 5"):
        cache.append(0, *given[0])


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="width = 20"):
        LlamaGenTransformer(4, 2, 20, 1, 2)
    with pytest.raises(ValueError, match="dropout = 1"):
        LlamaGenTransformer(4, 2, 16, 1, 2, dropout=1.0)
    with pytest.raises(ValueError, match="num_layers = 0"):
        VARTransformer(4, 4, (1,), 8, 0, 2)
    with pytest.raises(ValueError, match="width = 9"):
        VARTransformer(4, 4, (1,), 9, 1, 2)
    with pytest.raises(ValueError, match=r"min\(scales\)"):
        VARTransformer(4, 4, (), 8, 1, 2)
    with pytest.raises(ValueError, match="must end at 5"):
        VARTransformer(4, 4, (1, 2), 8, 1, 2)(torch.zeros(1, 5, 4), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="must end at 5"):
        LlamaGenTransformer(4, 2, 8, 1, 2)(torch.zeros(1, 6, 8))
