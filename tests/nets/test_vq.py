"""Vector quantisation: nearest rows, gradients, and the loss."""

import pytest
import torch
from torch.nn import functional

from genlight.nets.vq import VectorQuantizer, nearest_codes, to_grid, to_rows


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nearest_codes_in_chunks_are_the_nearest_of_all(chunk_size: int, dtype: torch.dtype) -> None:
    vectors, codebook = torch.randn(50, 5).to(dtype), torch.randn(301, 5).to(dtype)
    distances = torch.cdist(vectors.double(), codebook.double())
    assert torch.equal(nearest_codes(vectors, codebook, chunk_size), distances.argmin(1))


def test_of_equally_near_codes_the_first_is_taken() -> None:
    codebook = torch.tensor([[3.0], [1.0], [-1.0], [1.0]])
    for chunk_size in (1, 2, 3, 4):
        assert nearest_codes(torch.tensor([[0.0], [1.0]]), codebook, chunk_size).tolist() == [1, 1]


def test_autocast_does_not_change_the_codes() -> None:
    vectors, codebook = torch.randn(500, 8), torch.randn(200, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_codes(vectors, codebook)
    assert torch.equal(found, nearest_codes(vectors, codebook))


def test_memory_grows_with_the_chunk_and_not_with_the_codebook() -> None:
    peaks = []
    for num_codes in (1000, 100_000):
        sizes: list[int] = []

        class Record(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, sizes=sizes):
                out = func(*args, **(kwargs or {}))
                sizes.extend(o.numel() for o in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(o))
                return out

        vectors, codebook = torch.randn(200, 2), torch.randn(num_codes, 2)
        with Record():
            nearest_codes(vectors, codebook, chunk_size=500)
        # a view of the codebook is no new memory
        peaks.append(max(size for size in sizes if size != codebook.numel()))
    assert peaks == [200 * 500] * 2


def test_features_of_length_one_go_to_codes_of_length_one() -> None:
    quantizer = VectorQuantizer(16, 4)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(quantizer.embedding.weight.norm(dim=1), torch.ones(16))
    features = torch.randn(3, 4, 2, 2)
    found = quantizer(features)
    cosine = torch.einsum("bcn,vc->bnv", features.flatten(2), quantizer.codebook)
    assert torch.equal(found.tokens, cosine.argmax(-1))
    torch.testing.assert_close(found.features, quantizer.features_of(quantizer.lookup(found.tokens)))
    # the length of features tells nothing
    assert torch.equal(quantizer(7 * features).tokens, found.tokens)


def test_gradients_pass_straight_through_and_the_loss_moves_codes_to_features() -> None:
    quantizer = VectorQuantizer(5, 3, normalize=False, commitment_weight=0.25)
    torch.nn.init.normal_(quantizer.embedding.weight)
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    found = quantizer(features)
    weight = torch.randn_like(features)
    (passed,) = torch.autograd.grad((found.features * weight).sum(), features, retain_graph=True)
    torch.testing.assert_close(passed, weight)
    codes = to_grid(quantizer.lookup(found.tokens))
    error = functional.mse_loss(codes, features)
    torch.testing.assert_close(found.loss, 1.25 * error)
    to_features, to_codes = torch.autograd.grad(found.loss, (features, quantizer.embedding.weight))
    torch.testing.assert_close(to_features, 0.25 * 2 * (features - codes) / features.numel())
    expected = torch.zeros(5, 3).index_add_(
        0, found.tokens.flatten(), to_rows(2 * (codes - features) / features.numel()).flatten(0, 1)
    )
    torch.testing.assert_close(to_codes, expected)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_codes = 0"):
        VectorQuantizer(0, 4)
    with pytest.raises(ValueError, match="commitment_weight = -1"):
        VectorQuantizer(4, 4, commitment_weight=-1)
    with pytest.raises(ValueError, match="chunk_size = 0"):
        nearest_codes(torch.zeros(1, 2), torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match="codebook"):
        nearest_codes(torch.zeros(1, 2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="5 tokens"):
        to_grid(torch.zeros(1, 5, 2))
