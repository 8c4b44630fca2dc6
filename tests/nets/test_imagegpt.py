"""ImageGPT as an autoregressive model, against plain transformers, and its student."""

import pytest
import torch
from modules.tiny_imagegpt import COLOURS, tiny_colours, tiny_imagegpt
from nets.test_teachers import randomised
from transformers import ImageGPTConfig, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from genlight.nets.autoregressive import SamplingSettings, decode, filter_logits, multinomial, parallel_probabilities
from genlight.nets.dd_student import ImageGPTStudent, student_of, take_from
from genlight.nets.imagegpt import ColourClusters, ImageGPT, imagegpt_options
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer
from genlight.nets.vq import VectorQuantizer

N = 16


def model() -> ImageGPT:
    return ImageGPT(tiny_imagegpt(), ColourClusters(tiny_colours()))


def tokens_of(count: int = 3) -> torch.Tensor:
    return torch.randint(0, COLOURS, (count, N), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_logits_are_those_of_plain_transformers() -> None:
    """Position by position from the start token on, without a cache and without any of this code."""
    made, tokens = model(), tokens_of()
    plain = tiny_imagegpt()
    expected = []
    for place in range(N):
        read = torch.cat((torch.full((3, 1), COLOURS), tokens[:, :place]), dim=1)
        expected.append(plain(read).logits[:, -1])
    wanted = torch.stack(expected, dim=1)
    condition = torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(made.logits(tokens, condition), wanted, atol=1e-5, rtol=1e-5)
    assert wanted.shape == (3, N, COLOURS) and wanted.std() > 0.1
    # the cached ones, from a prefix and from nothing
    for begun in (0, 5):
        logits, state = made.begin(condition, tokens[:, :begun] if begun else None)
        for place in range(begun, N - 1):
            torch.testing.assert_close(logits[:, 0], wanted[:, place], atol=1e-5, rtol=1e-5)
            logits = made.extend(state, tokens[:, place : place + 1])
        torch.testing.assert_close(logits[:, 0], wanted[:, -1], atol=1e-5, rtol=1e-5)


def test_filters_are_those_that_transformers_samples_with() -> None:
    scores = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    wanted = LogitsProcessorList([TopKLogitsWarper(20), TopPLogitsWarper(0.8)])(torch.zeros(20, 1).long(), scores)
    assert torch.equal(filter_logits(scores, 20, 0.8, ImageGPT.nucleus), wanted)


@torch.no_grad()
def test_it_cannot_be_guided_and_says_so() -> None:
    made, condition = model(), torch.zeros(2, dtype=torch.long)
    tokens = decode(made, condition, SamplingSettings(top_k=4), multinomial(torch.Generator().manual_seed(0)))
    chances = parallel_probabilities(made, tokens, condition, SamplingSettings(top_k=4))
    assert (chances.gather(-1, tokens[..., None]) > 0).all()
    with pytest.raises(ValueError, match="guidance_scale must be 1"):
        decode(made, condition, SamplingSettings(guidance_scale=2.0), multinomial())
    with pytest.raises(ValueError, match="guidance_range must be null"):
        student_of(made, (1.0, 2.0))


def test_colours_are_tokens_and_tokens_are_colours() -> None:
    clusters, tokens = ColourClusters(tiny_colours()), tokens_of()
    images = clusters.decode(tokens)
    assert images.shape == (3, 3, 4, 4)
    assert torch.equal(images[1, :, 2, 3], tiny_colours()[tokens[1, 4 * 2 + 3]])
    noisy = images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clusters.encode(noisy), tokens)
    for wrong in (torch.zeros(4, 2), torch.zeros(0, 3), 128 * torch.ones(4, 3), torch.full((4, 3), torch.nan)):
        with pytest.raises(ValueError, match="clusters"):
            ColourClusters(wrong)


def test_networks_of_another_kind_are_named() -> None:
    for name, value in (("activation_function", "gelu"), ("scale_attn_weights", False), ("n_positions", 15)):
        with pytest.raises(ValueError, match=name):
            imagegpt_options(ImageGPTConfig(**{"n_positions": 16, name: value}))


def student() -> ImageGPTStudent:
    made = student_of(model())
    assert isinstance(made, ImageGPTStudent)
    return made.eval()


def test_a_place_of_the_student_sees_itself_and_those_before() -> None:
    network = student()
    randomised(network)
    vectors = torch.randn(1, N, 3, requires_grad=True)
    for output in network(vectors, torch.zeros(1, N, dtype=torch.bool), torch.tensor([0])):
        for place in range(N):
            (gradient,) = torch.autograd.grad(output[0, place].square().sum(), vectors, retain_graph=True)
            assert torch.equal(gradient[0].abs().sum(-1) > 0, torch.arange(N) <= place)


@torch.no_grad()
def test_a_student_takes_all_weights_of_its_teacher() -> None:
    """Four colours: a linear layer can say all of their embeddings."""
    config = ImageGPTConfig(vocab_size=5, n_positions=9, n_embd=16, n_layer=2, n_head=2)
    network = type(tiny_imagegpt())(config)
    randomised(network)
    teacher = ImageGPT(network.eval(), ColourClusters(tiny_colours()[:4]))
    made = student_of(teacher)
    take_from(made, teacher)
    assert isinstance(made, ImageGPTStudent)
    own, given = made.backbone.state_dict(), network.state_dict()
    for name, value in given.items():
        if name == "transformer.wpe.weight":
            assert torch.equal(own[name][:9], value) and torch.equal(own[name][9], value[8])
        elif name != "transformer.wte.weight":
            assert torch.equal(own[name], value), name
    embeddings = given["transformer.wte.weight"]
    torch.testing.assert_close(made.backbone.transformer.wte(teacher.codebook), embeddings[:4], atol=1e-4, rtol=1e-4)
    assert torch.equal(made.start_embedding, embeddings[4])
    other = LlamaGen(LlamaGenTransformer(5, 3, 16, 2, 2, multiple_of=8), VectorQuantizer(5, 3))
    with pytest.raises(ValueError, match="cannot begin as"):
        take_from(made, other)


def test_all_parameters_of_the_student_learn() -> None:
    made = student().train()
    logits, vectors = made(torch.randn(2, N, 3), torch.arange(N).expand(2, N) < 5, torch.zeros(2, dtype=torch.long))
    assert logits.shape == (2, N, COLOURS) and vectors.shape == (2, N, 3)
    (logits.square().sum() + vectors.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
