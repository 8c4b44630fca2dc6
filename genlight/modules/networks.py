"""What the module must know about a diffusers network: classes, channels, configuration, weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from genlight.errors import UserError
from genlight.modules.exported_pipeline import Network, network_shape, network_style


def label_rows(network: Network) -> int | None:
    """Rows of the network's class embedding, the null class among them; None without one."""
    if network_style(network) == "dit":
        return int(network.config.num_embeds_ada_norm) + 1
    rows = network.config.num_class_embeds
    return None if rows is None else int(rows)


def prepare_network(network: Network, num_classes: int | None) -> Network:
    """The network, checked and ready for labels 0 … num_classes - 1 and the null class num_classes.

    A UNet without class embedding is built anew with num_classes + 1 rows, so that one switch makes a configured
    network class-conditional. A DiT drops labels by itself in training, in each block on its own: that is turned off,
    the module drops them once for the whole network.

    Raises:
        TypeError: not a network of diffusers that :func:`network_style` knows.
        ValueError: channels or class rows that do not fit, or a UNet with several widths of cross-attention.
    """
    style = network_style(network)
    channels, outputs = network.config.in_channels, network.config.out_channels or network.config.in_channels
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"module.network.out_channels = {outputs}; it must equal in_channels = {channels}, or twice that for a "
            "learned variance"
        )
    network_shape(network)
    if style == "unet2d_condition" and not isinstance(network.config.cross_attention_dim, int | None):
        raise ValueError("module.network.cross_attention_dim must be one number: there is no text to attend to")
    if num_classes is not None and label_rows(network) is None:
        arguments = {key: value for key, value in network.config.items() if not key.startswith("_")}
        network = type(network)(**{**arguments, "num_class_embeds": num_classes + 1})
    check_label_rows(network, num_classes)
    if style == "dit":
        for block in network.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        network.register_to_config(out_channels=outputs)  # DiTPipeline cannot read null
    return network


def check_label_rows(network: Network, num_classes: int | None) -> None:
    """ValueError when the class embedding does not hold ``num_classes`` classes, with or without a null class."""
    rows, style = label_rows(network), network_style(network)
    key = "num_embeds_ada_norm" if style == "dit" else "num_class_embeds"
    if num_classes is None:
        if rows is not None and style != "dit":
            raise ValueError(
                f"module.network.{key} = {rows}, but module.class_conditional is false: set it to true, "
                f"or {key} to null"
            )
    elif rows not in (num_classes, num_classes + 1) or (style == "dit" and rows == num_classes):
        found = network.config[key]
        wanted = num_classes if style == "dit" else f"{num_classes + 1} (the last row is the null class)"
        raise ValueError(
            f"module.network.{key} = {found} does not fit module.num_classes = {num_classes}: it should be {wanted}"
        )


def plain_config(network: Network) -> dict[str, Any]:
    """Constructor arguments of a diffusers network as JSON has them: no private keys, lists for tuples."""
    public = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    # how a network is quantized is an object of its own
    result: dict[str, Any] = json.loads(json.dumps(public, sort_keys=True, default=lambda part: part.to_dict()))
    return result


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """'key: ... found, ... expected' for each entry of two nested mappings that differs, in the order of the keys."""
    for key in ("class", "family"):  # of other kinds: what else differs follows from that
        if found.get(key) != wanted.get(key):
            return [f"{prefix}{key}: {found.get(key)!r} found, {wanted.get(key)!r} expected"]
    result: list[str] = []
    for key in sorted(set(found) | set(wanted)):
        one, two = found.get(key), wanted.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            result += differences(one, two, f"{prefix}{key}.")
        elif one != two:
            result.append(f"{prefix}{key}: {one!r} found, {two!r} expected")
    return result


def first_of(items: Iterable[str], limit: int = 3) -> str:
    """The first items joined by "; ", and how many more there are."""
    items = list(items)
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more


def check_state_dict(found: Mapping[str, Any], wanted: Mapping[str, Tensor], where: str) -> None:
    """UserError naming the first keys of a state dict that are missing, unexpected or of another shape."""
    problems = [f"missing {key}" for key in wanted if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in wanted]
    for key in wanted:
        value = found.get(key)
        # an empty tensor is a ZeRO-3 parameter whose values lie on other ranks: its shape says nothing
        if isinstance(value, Tensor) and value.shape != wanted[key].shape and wanted[key].numel() > 0:
            problems.append(f"{key} has shape {list(value.shape)}, the network has {list(wanted[key].shape)}")
    if problems:
        raise UserError(f"{where} is of another architecture than the module: {first_of(problems)}")


def noise_seeded_generators(noise: Tensor) -> list[torch.Generator]:
    """One CPU generator per sample, seeded by the sample's own noise [B, ...].

    Samplers that draw more noise so give a sample the same numbers in any batch, on any number of devices.
    """
    import hashlib

    rows = noise.detach().float().cpu().flatten(1).contiguous().numpy()
    digests = (hashlib.sha256(row.tobytes()).digest() for row in rows)
    return [torch.Generator().manual_seed(int.from_bytes(digest[:8], "little")) for digest in digests]
