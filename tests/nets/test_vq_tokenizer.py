"""The tokenizer as a whole: shapes, training, and decoding from less than all."""

import pytest
import torch
from torch.nn import functional

from genlight.nets.residual_vq import ResidualQuantizer
from genlight.nets.vq import VectorQuantizer
from genlight.nets.vq_tokenizer import VQTokenizer


def tokenizer(residual: bool, image_channels: int = 1) -> VQTokenizer:
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(16, 4, (1, 2, 4)) if residual else VectorQuantizer(16, 4)
    return VQTokenizer(quantizer, (8, 8), 6, image_channels=image_channels, layers_per_block=1, norm_num_groups=4)


@pytest.mark.parametrize("residual", [False, True])
def test_images_become_tokens_and_images_again(residual: bool) -> None:
    network = tokenizer(residual).eval()
    with torch.no_grad():
        network.decoder.conv_out.weight.mul_(20)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    tokens = network.encode(images)
    assert tokens.shape == (2, 21 if residual else 16) and not tokens.is_floating_point()
    assert network.downsampling == 2
    with torch.no_grad():
        # what the decoder sees in training is what it sees of tokens
        reconstruction, loss = network(images)
        decoded = network.decode_vectors(network.quantizer.lookup(tokens))
        torch.testing.assert_close(decoded, reconstruction, atol=1e-4, rtol=1e-4)
        assert decoded.abs().max() > 1
        assert torch.equal(network.decode(tokens), decoded.clamp(-1, 1))
        assert loss.ndim == 0
        if residual:
            assert network.decode(tokens[:, :5]).shape == images.shape
        else:
            with pytest.raises(ValueError, match="5 tokens"):
                network.decode(tokens[:, :5])


@pytest.mark.parametrize("residual", [False, True])
def test_training_reaches_every_parameter_and_reconstructs_better(residual: bool) -> None:
    network = tokenizer(residual)
    images = functional.interpolate(torch.randn(8, 1, 2, 2), size=(8, 8), mode="bilinear").clamp(-1, 1)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    errors = []
    for _ in range(40):
        reconstruction, loss = network(images)
        error = functional.mse_loss(reconstruction, images)
        optimizer.zero_grad()
        (error + loss).backward()
        errors.append(error.item())
        # of four convolutions for three scales one is never asked
        missing = [name for name, value in network.named_parameters() if value.grad is None]
        assert all("phi" in name for name in missing), missing
        optimizer.step()
    assert errors[-1] < 0.6 * errors[0], errors


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="norm_num_groups = 32"):
        VQTokenizer(VectorQuantizer(4, 4), (16,), 4)
    with pytest.raises(ValueError, match="channels = "):
        VQTokenizer(VectorQuantizer(4, 4), (), 4)
    with pytest.raises(ValueError, match="quant_conv_size = 2"):
        VQTokenizer(VectorQuantizer(4, 4), (32,), 4, quant_conv_size=2)
