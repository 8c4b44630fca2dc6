"""Images to tokens and back: a convolutional encoder and decoder around a quantiser (VQGAN, arXiv 2012.09841)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from genlight.nets.configuration import constructor_arguments
from genlight.nets.vq import Quantized, VectorQuantizer


class VQTokenizer(nn.Module):
    """The tokenizer of LlamaGen, with one code for each position, or of VAR, with codes on several scales.

    Encoder and decoder are diffusers'; self-attention stands at the coarsest of the resolutions. diffusers' own
    `VQModel` knows neither codes of length one nor scales.

    Args:
        quantizer: a `VectorQuantizer` (LlamaGen) or `ResidualQuantizer` (VAR).
        channels: of each resolution, from the image inward; each step after the first halves height and width.
        latent_channels: what the encoder ends with and the decoder begins with.
        quant_conv_size: kernel of the convolutions on both sides of the quantiser: 1 in LlamaGen, 3 in VAR.
        image_channels: 3 for colour.
        layers_per_block: residual blocks at each resolution; the decoder has one more.
        norm_num_groups: groups of the normalisations; divides each of `channels`.

    Raises:
        ValueError: no channels, channels that the groups do not divide, or an even kernel.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        channels: Sequence[int],
        latent_channels: int,
        quant_conv_size: int = 1,
        image_channels: int = 3,
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.config = constructor_arguments(locals())
        channels = tuple(int(width) for width in channels)
        if not channels or any(width < 1 or width % norm_num_groups for width in channels):
            raise ValueError(f"channels = {list(channels)} must be multiples of norm_num_groups = {norm_num_groups}")
        if quant_conv_size % 2 == 0:
            raise ValueError(f"quant_conv_size = {quant_conv_size} must be odd")
        plain = len(channels) - 1
        self.downsampling = 2**plain
        self.encoder = Encoder(
            image_channels,
            latent_channels,
            ("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
            channels,
            layers_per_block,
            norm_num_groups,
            double_z=False,
        )
        self.decoder = Decoder(
            latent_channels,
            image_channels,
            ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
            channels,
            layers_per_block,
            norm_num_groups,
        )
        padding = quant_conv_size // 2
        self.quant_conv = nn.Conv2d(latent_channels, quantizer.code_dim, quant_conv_size, padding=padding)
        self.post_quant_conv = nn.Conv2d(quantizer.code_dim, latent_channels, quant_conv_size, padding=padding)
        self.quantizer = quantizer

    def quantize(self, images: Tensor) -> Quantized:
        """The quantised features of images [B, image_channels, H, W] in [-1, 1]."""
        quantized: Quantized = self.quantizer(self.quant_conv(self.encoder(images)))
        return quantized

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images in [-1, 1]: [B, image_channels, H, W] to [B, N] int64."""
        return self.quantize(images).tokens

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Images of vectors in the space of the codes: [B, N, C] to [B, image_channels, H, W].

        They may lie a little outside [-1, 1], so that gradients pass everywhere. For VAR, N may be the tokens of the
        first scales only.

        Raises:
            ValueError: N does not fill a grid, or the first scales.
        """
        return self.decode_features(self.quantizer.features_of(vectors))

    def decode_features(self, features: Tensor) -> Tensor:
        """Images [B, image_channels, H, W], not clamped, of quantised features [B, C, S, S]."""
        images: Tensor = self.decoder(self.post_quant_conv(features))
        return images

    def decode(self, tokens: Tensor) -> Tensor:
        """Images in [-1, 1] of tokens: [B, N] to [B, image_channels, H, W]; ValueError as `decode_vectors`."""
        return self.decode_vectors(self.quantizer.lookup(tokens)).clamp(-1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction of images in [-1, 1], of the same shape and not clamped, and the loss of the quantiser."""
        quantized = self.quantize(images)
        return self.decode_features(quantized.features), quantized.loss
