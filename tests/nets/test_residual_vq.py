"""Multi-scale residual quantisation: what each scale adds, and what the transformer is given of it."""

import itertools

import pytest
import torch
from torch.nn import functional

from genlight.nets.residual_vq import ResidualQuantizer, _phi_of_scale

SCALES = (1, 2, 3, 5)


def quantizer(num_codes: int = 32, scales=SCALES, num_phi: int = 4) -> ResidualQuantizer:
    torch.manual_seed(0)
    made = ResidualQuantizer(num_codes, 6, scales, num_phi)
    torch.nn.init.normal_(made.embedding.weight)
    return made


def by_hand(made: ResidualQuantizer, vectors: torch.Tensor) -> list[torch.Tensor]:
    """The features after each scale, by algorithm 2 of the paper."""
    features, start, after = torch.zeros(len(vectors), 6, 5, 5), 0, []
    for index, scale in enumerate(SCALES):
        grid = torch.empty(len(vectors), 6, scale, scale)
        for row in range(scale):
            for column in range(scale):
                grid[:, :, row, column] = vectors[:, start + row * scale + column]
        large = functional.interpolate(grid, size=(5, 5), mode="bicubic")
        phi = made.phi[made.phi_of_scale[index]]
        features = features + 0.5 * large + 0.5 * functional.conv2d(large, phi.weight, phi.bias, padding=1)
        after.append(features)
        start += scale * scale
    return after


@torch.no_grad()
def test_features_are_the_sum_over_scales_and_inputs_their_area_means() -> None:
    made, vectors = quantizer(), torch.randn(3, 39, 6)
    after = by_hand(made, vectors)
    for count, length in ((1, 1), (2, 5), (3, 14), (4, 39)):
        torch.testing.assert_close(made.features_of(vectors[:, :length]), after[count - 1])
    inputs = made.next_scale_inputs(vectors)
    assert inputs.shape == (3, 38, 6)
    for index, start, end in ((1, 0, 4), (2, 4, 13), (3, 13, 38)):
        area = functional.adaptive_avg_pool2d(after[index - 1], SCALES[index]).flatten(2).transpose(1, 2)
        torch.testing.assert_close(inputs[:, start:end], area)
    torch.testing.assert_close(made.next_scale_inputs(vectors[:, :5]), inputs[:, :13])


@torch.no_grad()
def test_inputs_of_a_scale_know_nothing_of_that_scale_or_later_ones() -> None:
    made, vectors = quantizer(), torch.randn(2, 39, 6)
    changed = vectors.clone()
    changed[:, 5:] += 1
    before, after = made.next_scale_inputs(vectors), made.next_scale_inputs(changed)
    assert torch.equal(before[:, :13], after[:, :13])
    assert (before[:, 13:] != after[:, 13:]).any(1).all()


@torch.no_grad()
def test_tokens_are_nearest_to_what_the_scales_before_leave_over() -> None:
    made, features = quantizer(), torch.randn(2, 6, 5, 5)
    found = made(features)
    after = [torch.zeros_like(features), *by_hand(made, made.lookup(found.tokens))]
    start = 0
    for index, scale in enumerate(SCALES):
        left = functional.adaptive_avg_pool2d(features - after[index], scale).flatten(2).transpose(1, 2)
        nearest = torch.cdist(left, made.codebook.expand(2, -1, -1)).argmin(-1)
        assert torch.equal(found.tokens[:, start : start + scale * scale], nearest)
        start += scale * scale
    torch.testing.assert_close(found.features, after[-1])
    expected = sum(1.25 * functional.mse_loss(part, features) for part in after[1:]) / 4
    torch.testing.assert_close(found.loss, expected)


def test_more_scales_reconstruct_better_once_trained() -> None:
    """Training by the loss alone: with each further scale the sum comes nearer to the features."""
    made = quantizer(num_codes=64)
    generator = torch.Generator().manual_seed(1)
    smooth = functional.interpolate(torch.randn(64, 6, 3, 3, generator=generator), size=(5, 5), mode="bicubic")
    optimizer = torch.optim.Adam(made.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        made(smooth).loss.backward()
        optimizer.step()
    with torch.no_grad():
        vectors = made.lookup(made(smooth).tokens)
        errors = [functional.mse_loss(made.features_of(vectors[:, :n]), smooth).item() for n in (0, 1, 5, 14, 39)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.25 * errors[0]


def test_gradients_reach_codebook_and_phi_and_pass_features_straight_through() -> None:
    made, features = quantizer(), torch.randn(2, 6, 5, 5, requires_grad=True)
    found = made(features)
    weight = torch.randn_like(features)
    (passed,) = torch.autograd.grad((found.features * weight).sum(), features, retain_graph=True)
    torch.testing.assert_close(passed, weight)
    after = by_hand(made, made.lookup(found.tokens))
    towards = sum(0.25 * 2 * (features - part) for part in after) / features.numel() / 4
    plain = sum(functional.mse_loss(part, features.detach()) for part in after) / 4
    (expected,) = torch.autograd.grad(plain, made.embedding.weight)
    found.loss.backward()
    torch.testing.assert_close(features.grad, towards)
    torch.testing.assert_close(made.embedding.weight.grad, expected)
    assert made.embedding.weight.grad is not None and made.embedding.weight.grad.any()
    assert all(phi.weight.grad is not None and phi.weight.grad.any() for phi in (made.phi[0], made.phi[3]))
    assert features.grad is not None and features.grad.any()


def test_a_phi_that_no_scale_uses_is_not_trained() -> None:
    made = ResidualQuantizer(8, 6, (1, 2, 4))
    assert made.phi_of_scale == (0, 2, 3)
    made(torch.randn(2, 6, 4, 4)).loss.backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in made.phi.parameters())


def test_the_phi_of_the_published_scales() -> None:
    """Places 2/9 and 7/9 are half-way between two ticks of 1/12, 13/36, 23/36, 11/12; float64 decides."""
    assert _phi_of_scale(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert _phi_of_scale(4, 4) == (0, 1, 2, 3)
    assert _phi_of_scale(7, 1) == (0,) * 7
    assert _phi_of_scale(1, 4) == (0,)
    assert _phi_of_scale(10, 10) == tuple(range(10))


def test_wrong_arguments_are_named() -> None:
    for scales in ((), (0, 1), (1, 1), (2, 1)):
        with pytest.raises(ValueError, match="scales"):
            ResidualQuantizer(4, 4, scales)
    with pytest.raises(ValueError, match="num_phi = 0"):
        ResidualQuantizer(4, 4, (1,), num_phi=0)
    with pytest.raises(ValueError, match="phi_ratio = 2"):
        ResidualQuantizer(4, 4, (1,), phi_ratio=2)
    made = quantizer()
    for length in (2, 4, 6, 40):
        with pytest.raises(ValueError, match=f"{length} tokens"):
            made.features_of(torch.zeros(1, length, 6))
    with pytest.raises(ValueError, match="last scale, 5"):
        made(torch.zeros(1, 6, 4, 4))
