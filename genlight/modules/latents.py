"""The frozen VAE of latent diffusion, kept outside the module's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genlight.modules.exported_pipeline import Network, decode_latents, latent_statistics


class FrozenVAE:
    """A diffusers VAE (AutoencoderKL, VQModel, AutoencoderTiny) that is used but neither trained nor saved.

    It is no submodule: so it stays out of the checkpoint, the optimizer, gradient synchronisation and sharding, and an
    averaged copy of the module shares it. Encoding and decoding run in the VAE's own precision, without autocast.

    Raises:
        TypeError: the network lacks encode, decode or a config.
    """

    def __init__(self, vae: Network) -> None:
        if not all(hasattr(vae, name) for name in ("encode", "decode", "config")):
            raise TypeError(
                f"module.vae is a {type(vae).__name__}; expected a diffusers autoencoder such as AutoencoderKL"
            )
        self.network: Network = vae.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenVAE:
        return self

    @property
    def downscale(self) -> int:
        """How many times smaller the latents are than the images, in height and width."""
        config = self.network.config
        widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        return 1 << (len(widths) - 1)

    @property
    def image_channels(self) -> int:
        return int(self.network.config.in_channels)

    @property
    def latent_channels(self) -> int:
        return int(self.network.config.latent_channels)

    @torch.no_grad()
    def encode(self, images: Tensor, *, mean: bool = False) -> Tensor:
        """Latents as the network sees them, from images in [-1, 1]: a sample of a Gaussian posterior, or its mean."""
        self.network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            encoded = self.network.encode(images.to(next(self.network.parameters()).dtype))
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode() if mean else encoded.latent_dist.sample()
        else:
            latents = encoded.latents
        shift, scale = (s.to(latents.device) if isinstance(s, Tensor) else s for s in latent_statistics(self.network))
        result: Tensor = (latents.float() - shift) * scale
        return result

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, nominally in [-1, 1], from samples of the network."""
        self.network.to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            return decode_latents(self.network, latents.float())
