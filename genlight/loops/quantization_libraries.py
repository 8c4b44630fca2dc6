"""What other libraries make of the same layers, measured like all that is made here, where they are installed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from genlight.loops.cost import timed
from genlight.loops.evaluation import in_turn, noise_of
from genlight.loops.model_costs import reason_of
from genlight.loops.quantization_work import QuantizationWork
from genlight.quantization.libraries import LIBRARIES, LibraryFormat, library_layers
from genlight.quantization.trajectory import Reference
from genlight.reports.cost import Phase

OTHERS = "other libraries"  # in the account of time
_MEASURED = 3


def library_rows(work: QuantizationWork) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the table, and what the report has to say of them.

    A library that is absent has no rows, and neither has a format that fails on this network or this machine, for
    which the run does not end: the report tells of both.
    """
    forms = [form for library in LIBRARIES if library.installed for form in library.formats]
    found = in_turn(work.evaluations, [partial(_tried, work, form) for form in forms])
    rows = [row for row, _ in found if row is not None]
    notes = [note for _, note in found if note is not None]
    notes += [f"{library.name} is not installed" for library in LIBRARIES if not library.installed]
    if rows:
        notes.insert(0, "rows of other libraries are what their own functions make of copies of the same layers")
    return rows, notes


def library_phases(work: QuantizationWork, each: float, sample: float) -> list[Phase]:
    """What these rows will cost: none for libraries that are absent, and for formats that refuse the first layers.

    Args:
        work: of the run, with nothing quantized.
        each: seconds of the measurements of one row.
        sample: seconds of one sample of a quantized network.
    """
    plain = work.calibrated.layers
    # linear ones first, which all formats take
    names = sorted(plain, key=lambda name: not isinstance(plain[name], nn.Linear))
    few = {name: plain[name] for name in names[:_MEASURED]}
    seconds = []
    for form in (form for library in LIBRARIES if library.installed for form in library.formats):

        def make(form: LibraryFormat = form) -> Mapping[str, nn.Module]:
            return library_layers(form, few, lambda _: None)

        try:
            (making,) = timed([make, make])
        except Exception:  # it will have a note in place of a row
            continue
        observing = sample * work.method.samples if form.observes else 0.0
        seconds.append(each + making * len(plain) / len(few) + observing)
    return [Phase(OTHERS, tuple(seconds), work.evaluations.rounds(len(seconds)))] if seconds else []


def _tried(work: QuantizationWork, form: LibraryFormat) -> tuple[dict[str, Any] | None, str | None]:
    """The row of a format, if there is one, and what has to be said of it."""
    try:
        row = _row(work, form)
    except Exception as error:  # a library of others raises what it likes
        return None, f"{form.name} is left out: {reason_of(error)}"
    if not form.observes:
        return row, None
    return row, (
        f"{form.name} has one range for each input of a linear layer, from {work.method.samples} samples of the search "
        "draw, and rounds no inputs of convolutions"
    )


def _row(work: QuantizationWork, form: LibraryFormat) -> dict[str, Any]:
    plain = work.calibrated.layers

    def observe(layers: Mapping[str, nn.Module]) -> None:
        noise, conditions = noise_of(work.datamodule, "search", work.method.samples)
        with work.replaced(layers):
            work.images(Reference(noise, conditions.get("label"), [], torch.empty(0)))

    layers = library_layers(form, plain, observe)
    row, _ = work.measure(layers, {name: form.bits(plain[name]) for name in layers})
    return {"variant": form.name + _left(plain, layers), **row}


def _left(plain: Mapping[str, nn.Module], made: Mapping[str, nn.Module]) -> str:
    """What the name of a row says of layers that stay in floating point."""
    left = plain.keys() - made.keys()
    if not left:
        return ""
    kind = "convolutions" if all(isinstance(plain[name], nn.Conv2d) for name in left) else "others"
    return f" ({len(made)} of {len(plain)} layers, {kind} in floating point)"
