"""Published checkpoints: every key, every shape, every number of parameters, and the same outputs by other means."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from nets.published_layout import (
    TokenizerOracle,
    llamagen_layout,
    llamagen_logits,
    random_state,
    tokenizer_layout,
    var_layout,
    var_logits,
)

from genlight.errors import UserError
from genlight.nets import published
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer
from genlight.nets.published import load_published, load_published_tensors, published_shapes, published_sources
from genlight.nets.residual_vq import ResidualQuantizer
from genlight.nets.var import VARTransformer
from genlight.nets.vq import VectorQuantizer
from genlight.nets.vq_tokenizer import VQTokenizer

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
# of which nothing is read
DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV", "codebook_used")


def llamagen(size: str, width: int, depth: int, hidden: int, grid: int, text: bool) -> tuple:
    return (
        f"llamagen-{size}",
        lambda: published.llamagen_transformer(size, grid, text),
        llamagen_layout(depth, width, 16384, 1000, hidden, (120, 2048) if text else None),
    )


def var(depth: int) -> tuple:
    scales = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32) if depth == 36 else SCALES
    layout = var_layout(depth, 64 * depth, depth, 4096, 32, scales, 1000, shared=depth == 36)
    return f"var-d{depth}", lambda: published.var_transformer(depth), layout


CASES = [
    *((*var(depth), count) for depth, count in ((16, 310e6), (20, 600e6), (24, 1.0e9), (30, 2.0e9), (36, 2.3e9))),
    (*llamagen("B", 768, 12, 2048, 16, False), 111e6),
    (*llamagen("L", 1024, 24, 2816, 24, False), 343e6),
    (*llamagen("XL", 1280, 36, 3584, 24, False), 775e6),
    (*llamagen("XXL", 1536, 48, 4096, 24, False), 1.4e9),
    (*llamagen("3B", 3200, 24, 8704, 24, False), 3.1e9),
    (*llamagen("XL", 1280, 36, 3584, 32, True), 775e6),
    ("vae", published.var_tokenizer, tokenizer_layout((160, 160, 320, 320, 640), 32, 4096, 32, SCALES), None),
    ("vq-16", published.llamagen_tokenizer, tokenizer_layout((128, 128, 256, 256, 512), 256, 16384, 8), 72e6),
    (
        "vq-8",
        lambda: published.llamagen_tokenizer(8),
        tokenizer_layout((128, 256, 256, 512), 256, 16384, 8),
        70e6,
    ),
]


@pytest.mark.parametrize(("name", "build", "layout", "parameters"), CASES, ids=[case[0] for case in CASES])
def test_keys_shapes_and_parameter_counts_are_the_published_ones(name, build, layout, parameters) -> None:
    with torch.device("meta"):
        network = build()
    read = {key: shape for key, shape in layout.items() if not key.endswith(DERIVED)}
    assert published_shapes(network) == read
    sources = published_sources(network)
    assert set(sources) == set(network.state_dict())
    # one published tensor feeds one of ours, or its thirds three
    places = [(source.key, source.part) for source in sources.values()]
    assert len(set(places)) == len(places)
    held = sum(tensor.numel() for tensor in network.state_dict().values())
    stored = sum(torch.Size(shape).numel() for shape in read.values())
    assert held == stored
    if parameters is not None:
        count = sum(parameter.numel() for parameter in network.parameters())
        assert count == pytest.approx(parameters, rel=0.05 if parameters >= 1e9 else 0.01)


def small_var(shared: bool) -> tuple[VARTransformer, dict[str, torch.Tensor]]:
    network = VARTransformer(11, 8, (1, 2, 3), 24, 2, 3, num_classes=5, shared_modulation=shared)
    return network, random_state(var_layout(2, 24, 3, 11, 8, (1, 2, 3), 5, shared))


@pytest.mark.parametrize("shared", [False, True])
def test_var_computes_what_its_published_layout_means(shared: bool) -> None:
    network, state = small_var(shared)
    # one head beyond the limit of its factor, one at it, one below
    state["blocks.0.attn.scale_mul_1H11"] = torch.tensor([7.0, 4.60517, 1.0]).view(1, 3, 1, 1)
    load_published_tensors(network, state, "state")
    inputs, labels = torch.randn(4, 13, 8), torch.tensor([0, 5, 2, 4])
    expected = var_logits(state, 3, (1, 2, 3), inputs, labels)
    torch.testing.assert_close(network.eval()(inputs, labels), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("text", [None, (3, 7)])
def test_llamagen_computes_what_its_published_layout_means(text) -> None:
    text_options = {} if text is None else {"text_length": text[0], "text_dim": text[1]}
    network = LlamaGenTransformer(11, 3, 24, 2, 3, num_classes=5, multiple_of=32, **text_options)
    state = random_state(llamagen_layout(2, 24, 11, 5, 64, text))
    load_published_tensors(network, state, "state")
    tokens = torch.randint(0, 11, (4, 9))
    condition = torch.randn(4, *text) if text else torch.tensor([0, 5, 2, 4])
    model = LlamaGen(network.eval(), VectorQuantizer(11, 8))
    expected = llamagen_logits(state, 3, 3, tokens, condition)
    torch.testing.assert_close(model.logits(tokens, condition), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("scales", [None, (1, 2, 4)])
def test_tokenizers_compute_what_their_published_layout_means(scales) -> None:
    channels = (32, 64)
    quantizer = ResidualQuantizer(11, 8, scales) if scales else VectorQuantizer(11, 8)
    network = VQTokenizer(quantizer, channels, 16, quant_conv_size=3 if scales else 1)
    state = random_state(tokenizer_layout(channels, 16, 11, 8, scales))
    load_published_tensors(network, state, "state")
    oracle = TokenizerOracle(state, 2, scales is not None)
    images = torch.randn(2, 3, 8, 8)
    features = oracle.encode(images)
    torch.testing.assert_close(network.quant_conv(network.encoder(images)), features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        network.decoder(network.post_quant_conv(features)), oracle.decode(features), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(network.quantizer.embedding.weight, state["quantize.embedding.weight"])


def test_a_file_that_does_not_fit_says_how(tmp_path: Path) -> None:
    network, state = small_var(False)
    path = tmp_path / "var.safetensors"

    def error(changed: dict[str, torch.Tensor]) -> str:
        safetensors.torch.save_file(changed, path)
        with pytest.raises(UserError) as raised:
            load_published(network, path)
        return str(raised.value)

    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert "pos_start is missing" in error({k: v for k, v in state.items() if k != "pos_start"})
    assert "n_d_embed.weight is not known" in error(state | {"n_d_embed.weight": torch.zeros(2, 24)})
    assert "head.bias is of shape [12], not [11]" in error(state | {"head.bias": torch.zeros(12)})
    assert "and 1 more" in error({k: v for k, v in state.items() if not k.startswith("word_embed")})
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    safetensors.torch.save_file({k: v for k, v in state.items() if k != "lvl_1L"}, path)
    load_published(network, path)
    assert torch.equal(network.head.bias, state["head.bias"])


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    network, _ = small_var(False)
    with pytest.raises(UserError, match=r"tools/convert_weights\.py"):
        load_published(network, tmp_path / "var_d16.pth")
    with pytest.raises(UserError, match="cannot be read"):
        load_published(network, tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="cannot be read"):
        load_published(network, tmp_path / "broken.safetensors")


def test_only_published_networks_are_named() -> None:
    with pytest.raises(ValueError, match="depth = 12"):
        published.var_transformer(12)
    with pytest.raises(ValueError, match="size = 'XXXL'"):
        published.llamagen_transformer("XXXL", 16)
    with pytest.raises(ValueError, match="downsampling = 4"):
        published.llamagen_tokenizer(4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear"):
        published_sources(torch.nn.Linear(1, 1))
