"""Whether the data fits the network, asked before anything trains."""

from __future__ import annotations

from typing import Any

from genlight.errors import UserError


def check_data(module: Any, datamodule: Any) -> None:
    """UserError naming both config keys and both values if the data does not fit a diffusion module."""
    channels, height, width = module.image_shape
    vae = module.vae
    inner, size_key = "module.network.in_channels", "module.network.sample_size"
    if vae is not None:
        if vae.latent_channels != module.sample_shape[0]:
            raise UserError(
                f"{inner} = {module.sample_shape[0]}, but module.vae latent_channels = {vae.latent_channels}: "
                "set them equal"
            )
        inner, size_key = "module.vae in_channels", f"{size_key} x {vae.downscale} (of module.vae)"
    check_images(datamodule, (channels, height, width), inner, size_key)
    if module.class_conditional:
        hint = ", or module.class_conditional to false"
        check_classes(datamodule, module.num_classes, "module.num_classes", hint)


def check_images(datamodule: Any, shape: tuple[int, int, int], channels_key: str, size_key: str) -> None:
    """UserError if ``datamodule.image_shape`` is not ``shape`` (C, H, W)."""
    found = tuple(datamodule.image_shape)
    if found[0] != shape[0]:
        raise UserError(f"data.channels = {found[0]}, but {channels_key} = {shape[0]}: set them equal")
    if found[1:] != shape[1:]:
        raise UserError(f"data.image_size = {_size(*found[1:])}, but {size_key} = {_size(*shape[1:])}: set them equal")


def check_classes(datamodule: Any, num_classes: int | None, key: str, hint: str = "") -> None:
    """UserError if the data has another number of classes."""
    if datamodule.num_classes != num_classes:
        found = "null" if datamodule.num_classes is None else datamodule.num_classes
        raise UserError(f"data.num_classes = {found}, but {key} = {num_classes}: set them equal{hint}")


def _size(height: int, width: int) -> str:
    return str(height) if height == width else f"{height}x{width}"


def check_precision(trainer: Any, what: str) -> None:
    """UserError where the trainer holds all numbers in another type than float32, which would change `what`."""
    precision = str(trainer.precision)
    if precision.endswith("-true") and precision != "32-true":
        raise UserError(
            f"trainer.precision = {precision} changes {what}, which are float32: use 32-true or a mixed precision"
        )
