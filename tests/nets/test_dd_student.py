"""Students of Distilled Decoding: what each place may see, what they take from a teacher, and the published weights."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from nets.published_layout import linear, llamagen_layout, random_state, var_layout
from nets.test_teachers import CLASSES, CODES, condition_of, make, random_tokens, randomised
from torch import nn

from genlight.errors import UserError
from genlight.nets import published
from genlight.nets.dd_student import RasterStudent, ScaleStudent, Student, ToldStudent, student_of, take_from
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer
from genlight.nets.published import load_published, published_shapes
from genlight.nets.var import VAR
from genlight.nets.vq import VectorQuantizer

KINDS = ("llamagen", "var", "var-shared")


def student(kind: str) -> Student:
    made = student_of(make(kind)).eval()
    randomised(made)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_sees_itself_and_the_groups_before_its_own(kind: str) -> None:
    network = student(kind)
    group = torch.tensor([index for index, size in enumerate(network.group_sizes) for _ in range(size)])
    vectors = torch.randn(1, len(group), 6, requires_grad=True)
    outputs = network(vectors, torch.zeros(1, len(group), dtype=torch.bool), torch.tensor([1]))
    for output in outputs:
        for place in range(len(group)):
            (gradient,) = torch.autograd.grad(output[0, place].square().sum(), vectors, retain_graph=True)
            seen = gradient[0].abs().sum(-1) > 0
            expected = group < group[place]
            expected[place] = True
            assert torch.equal(seen, expected)


def test_every_place_sees_all_of_the_text_and_none_of_its_padding() -> None:
    network, texts = student("llamagen-text"), condition_of("llamagen-text").requires_grad_()
    vectors = torch.randn(3, 9, 6)
    flags = torch.zeros(3, 9, dtype=torch.bool)
    for output in network(vectors, flags, texts):
        for place in range(9):
            (gradient,) = torch.autograd.grad(output[:, place].square().sum(), texts, retain_graph=True)
            assert torch.equal(gradient.abs().sum(-1) > 0, (texts != 0).any(-1))
    told = ToldStudent(network, captions=texts.detach())
    numbers = torch.tensor([2, 0, 1])
    torch.testing.assert_close(told(vectors, flags, numbers)[0], network(vectors, flags, texts[numbers])[0])
    assert torch.equal(told(vectors, flags, texts)[0], network(vectors, flags, texts)[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_data_and_noise_are_told_apart_where_a_place_can_see_them(kind: str) -> None:
    network = student(kind)
    group = torch.tensor([index for index, size in enumerate(network.group_sizes) for _ in range(size)])
    vectors, label = torch.randn(1, len(group), 6), torch.tensor([1])
    flags = torch.zeros(1, len(group), dtype=torch.bool)
    before = network(vectors, flags, label)[0]
    changed = flags.clone()
    changed[0, 1] = True
    after = network(vectors, changed, label)[0]
    differs = (before != after).any(-1)[0]
    expected = group > group[1]
    expected[1] = True
    assert torch.equal(differs, expected)


@torch.no_grad()
def test_a_raster_student_reads_codes_as_its_teacher_reads_their_indices() -> None:
    """Where a linear layer can say all embeddings: no more codes than dimensions and one."""
    torch.manual_seed(0)
    teacher = LlamaGen(LlamaGenTransformer(7, 3, 16, 2, 2, num_classes=CLASSES), VectorQuantizer(7, 6))
    randomised(teacher.transformer)
    network = student_of(teacher)
    take_from(network, teacher)
    assert isinstance(network, RasterStudent)
    found = network.backbone.token_embedding(teacher.codebook)
    torch.testing.assert_close(found, teacher.transformer.token_embedding.weight, atol=1e-4, rtol=1e-4)
    kept = {name for name, value in teacher.transformer.state_dict().items() if not name.startswith("token_embedding")}
    for name in kept:
        assert torch.equal(network.backbone.state_dict()[name], teacher.transformer.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["var", "var-shared"])
def test_a_scale_student_keeps_the_classes_place_and_moves_the_others(kind: str) -> None:
    teacher = make(kind)
    network = student_of(teacher)
    take_from(network, teacher)
    assert isinstance(network, ScaleStudent) and isinstance(teacher, VAR)
    own, given = network.backbone.state_dict(), teacher.transformer.state_dict()
    for name, value in given.items():
        if name == "scale_embedding.weight":
            assert torch.equal(own[name][[0, 2, 3, 4]], value)
        elif name == "position_embedding":
            assert torch.equal(own[name][:, :1], value[:, :1]) and torch.equal(own[name][:, 2:], value[:, 1:])
        else:
            assert torch.equal(own[name], value), name


@pytest.mark.parametrize("kind", ["llamagen", "var"])
@torch.no_grad()
def test_a_student_that_is_told_a_scale_begins_as_one_that_is_not(kind: str) -> None:
    """Same weights, same outputs at any scale; once the embedding has learned, each scale has its own."""
    torch.manual_seed(0)
    plain = student_of(make(kind)).eval()
    torch.manual_seed(0)
    told = student_of(make(kind), (1.0, 4.0)).eval()
    vectors, label = torch.randn(3, sum(plain.group_sizes), 6), torch.tensor([0, 1, 2])
    inputs = vectors, torch.zeros(vectors.shape[:2], dtype=torch.bool), label
    scales = torch.tensor([1.0, 2.5, 4.0])
    for found, expected in zip(told(*inputs, scales), plain(*inputs), strict=True):
        assert torch.equal(found, expected)
    randomised(told)
    grid = torch.linspace(1, 4, 13)
    embedded = told.guidance_embedding(grid)
    assert torch.pdist(embedded).min() > 1e-3
    logits = told(*inputs, scales)[0]
    for row, scale in enumerate(scales):
        # a row hears its own scale, and reads the same one alone
        alone = ToldStudent(told, float(scale))(*(value[row : row + 1] for value in inputs))[0]
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-5)
    assert (told(*inputs, scales.flip(0))[0] - logits)[0].abs().max() > 1e-2
    for network, given in ((told, ()), (plain, (scales,))):
        with pytest.raises(ValueError, match="guidance_range"):
            network(*inputs, *given)
    with pytest.raises(ValueError, match="guidance_range"):
        student_of(make(kind), (0.0, 2.0))


def test_all_parameters_learn() -> None:
    for kind in KINDS:
        network = student(kind)
        tokens = random_tokens(make(kind))
        logits, vectors = network(torch.randn(*tokens.shape, 6), tokens > 3, torch.tensor([0, 1, 2]))
        assert logits.shape == (*tokens.shape, CODES) and vectors.shape == (*tokens.shape, 6)
        (logits.square().sum() + vectors.square().sum()).backward()
        missing = [name for name, value in network.named_parameters() if value.grad is None]
        assert not missing, missing


def test_students_of_what_is_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match="must begin with 1"):
        ScaleStudent(4, {"num_codes": 4, "code_dim": 4, "scales": [2], "width": 8, "num_layers": 1, "num_heads": 2})
    with pytest.raises(ValueError, match="cannot begin as"):
        take_from(student("var"), make("llamagen"))
    wide = LlamaGen(LlamaGenTransformer(CODES, 3, 32, 2, 2, CLASSES, multiple_of=8), VectorQuantizer(CODES, 6))
    with pytest.raises(ValueError, match="of the teacher is"):
        take_from(student("llamagen"), wide)


def extra(width: int, dim: int) -> dict[str, tuple[int, ...]]:
    head = linear("final_layer_conti.linear", dim, width)
    return {"n_d_embed.weight": (2, width), "final_layer_conti.scale_shift_table": (2, width), **head}


def scale_layout(depth: int, width: int, heads: int, codes: int, dim: int, scales, classes: int):
    layout = var_layout(depth, width, heads, codes, dim, (1, *scales), classes) | extra(width, dim)
    for layer in range(depth + 1):
        layout |= linear(f"layerwise_n_d_embed.{layer}", width, width)
    return layout


def raster_layout(depth: int, width: int, codes: int, dim: int, classes: int, hidden: int):
    return (
        llamagen_layout(depth, width, codes, classes, hidden) | linear("tok_embeddings", width, dim) | extra(width, dim)
    )


# millions of parameters as published
@pytest.mark.parametrize(("depth", "millions"), [(16, 327), (20, 635), (24, 1090)])
def test_published_students_of_var(depth: int, millions: float) -> None:
    with torch.device("meta"):
        network = published.var_student(depth)
    layout = scale_layout(depth, 64 * depth, depth, 4096, 32, published.VAR_SCALES, 1000)
    ignored = {key for key in layout if "lvl_1L" in key or "attn_bias" in key or "zero_k_bias" in key}
    assert published_shapes(network) == {key: shape for key, shape in layout.items() if key not in ignored}
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize(("size", "millions"), [("B", 98.3), ("L", 326)])
def test_published_students_of_llamagen(size: str, millions: float) -> None:
    layers, width, _ = published.LLAMAGEN_SIZES[size]
    with torch.device("meta"):
        network = published.llamagen_student(size)
    hidden = -(-(8 * width // 3) // 256) * 256
    assert published_shapes(network) == raster_layout(layers, width, 16384, 8, 1000, hidden)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


def small(kind: str) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    network = student_of(make(kind))
    if kind == "var":
        return network, scale_layout(2, 16, 2, CODES, 6, (1, 2, 3, 4), CLASSES)
    return network, raster_layout(2, 16, CODES, 6, CLASSES, 48)


@pytest.mark.parametrize("kind", ["var", "llamagen"])
def test_every_key_of_a_published_student_is_accounted_for(kind: str, tmp_path: Path) -> None:
    network, layout = small(kind)
    state, path = random_state(layout), tmp_path / "student.safetensors"
    safetensors.torch.save_file(state, path)
    load_published(network, path)
    own = network.state_dict()
    assert torch.equal(own["state_embedding.weight"], state["n_d_embed.weight"])
    assert torch.equal(own["vector_head.shift_scale"], state["final_layer_conti.scale_shift_table"])
    assert torch.equal(own["vector_head.linear.bias"], state["final_layer_conti.linear.bias"])
    if kind == "var":
        assert torch.equal(own["layer_state.2.weight"], state["layerwise_n_d_embed.2.weight"])
        assert torch.equal(own["backbone.position_embedding"], state["pos_1LC"])
    else:
        assert torch.equal(own["backbone.token_embedding.bias"], state["tok_embeddings.bias"])
    for broken, message in (
        ({k: v for k, v in state.items() if k != "n_d_embed.weight"}, "n_d_embed.weight is missing"),
        (state | {"cond_embed.weight": torch.zeros(2)}, "cond_embed.weight is not known"),
        (state | {"n_d_embed.weight": torch.zeros(3, 16)}, r"of shape \[3, 16\], not \[2, 16\]"),
    ):
        safetensors.torch.save_file(broken, path)
        with pytest.raises(UserError, match=message):
            load_published(network, path)


def test_only_published_students_are_named() -> None:
    with pytest.raises(ValueError, match="depth = 30"):
        published.var_student(30)
    with pytest.raises(ValueError, match="size = 'XL'"):
        published.llamagen_student("XL")
