"""Disk and memory that callbacks will take: refused before the training where they do not fit, all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from lightning.pytorch import Trainer

from genlight.checkpoints.mixing import free_bytes as free_memory
from genlight.checkpoints.writer import existing, free_bytes, stored_bytes
from genlight.errors import UserError
from genlight.reports.report import size


class KeepsWeights(Protocol):
    """A callback that keeps weights.

    Attributes:
        dirpath: folder of its files.
        disk_limit: most room for them, in GiB; None: what is free.
        reserved: bytes that it will still take, by place.
    """

    dirpath: Path
    disk_limit: float | None
    reserved: dict[str, int]


def float32_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Room of one copy of the weights."""
    return sum(4 * torch.Size(shape).numel() for shape in shapes.values())


def reserve_disk(
    trainer: Trainer, callback: KeepsWeights, key: str, count: int, peak: int, each: int, way_out: str
) -> None:
    """UserError if `peak` files of so many bytes do not fit on the disk, or `count` in the callback's limit.

    Args:
        trainer: whose other callbacks take room too.
        callback: that will write.
        key: its name in the config.
        count, peak: files at the end, and most of them at once.
        each: bytes.
        way_out: what to do.
    """
    folder, limit = callback.dirpath, callback.disk_limit
    place = f"disk {existing(folder).stat().st_dev}"
    free, there, others = free_bytes(folder), stored_bytes(folder), _reserved(trainer, callback, place)
    callback.reserved[place] = max(0, peak * each - there)
    if peak * each > free + there - others:
        where = f"{size(free + there)} are free{_beside(others)}"
    elif limit is not None and count * each > limit * 2**30:
        where = f"callbacks.{key}.disk_limit={limit:g} allows {size(int(limit * 2**30))}"
    else:
        return
    raise UserError(
        f"callbacks.{key} will keep {count} times {size(each)}, {size(count * each)}, in {folder}, where {where}: "
        f"use {way_out}"
    )


def reserve_memory(
    trainer: Trainer, callback: KeepsWeights, device: torch.device, needed: int, what: str, way_out: str
) -> None:
    """UserError if so many more bytes do not fit into the memory of a device.

    Args:
        trainer: whose other callbacks take memory too.
        callback: that will take it.
        device: devices that do not tell what they have left are passed over.
        needed: bytes.
        what: is kept in them, in words.
        way_out: what to do.
    """
    if device.type not in ("cpu", "cuda"):
        return
    free, others = free_memory(device), _reserved(trainer, callback, str(device))
    callback.reserved[str(device)] = needed
    if needed > free - others:
        raise UserError(
            f"{what} take {size(needed)} of memory on {device}, where {size(free)} are free{_beside(others)}: {way_out}"
        )


def _reserved(trainer: Trainer, callback: KeepsWeights, place: str) -> int:
    """Bytes that other callbacks will take."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return sum(getattr(other, "reserved", {}).get(place, 0) for other in callbacks if other is not callback)


def _beside(others: int) -> str:
    return f" and other callbacks will take {size(others)} of them" if others else ""
