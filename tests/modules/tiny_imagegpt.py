"""Folders of ImageGPT as transformers writes them, small enough for a second."""

from __future__ import annotations

from pathlib import Path

import torch
from nets.test_teachers import randomised
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

COLOURS = 9


def tiny_imagegpt(size: int = 4) -> ImageGPTForCausalImageModeling:
    """Of images of size × size pixels in 9 colours; far from uniform, with places and pixels that count."""
    config = ImageGPTConfig(vocab_size=COLOURS + 1, n_positions=size * size, n_embd=16, n_layer=2, n_head=2)
    network = ImageGPTForCausalImageModeling(config)
    randomised(network)
    return network.eval()


def tiny_colours() -> torch.Tensor:
    return torch.rand(COLOURS, 3, generator=torch.Generator().manual_seed(5)) * 2 - 1


def saved_imagegpt(folder: Path, size: int = 4) -> Path:
    """The folder, with network and image processor."""
    tiny_imagegpt(size).save_pretrained(folder)
    ImageGPTImageProcessorPil(clusters=tiny_colours().tolist(), size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return folder
