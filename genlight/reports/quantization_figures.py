"""Pictures of a quantized network: how sensitive its layers are, the bits they got, their inputs before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from genlight.reports.drawing import BLUE, ORANGE, finish_axes, log_axis, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# more names than this beside an axis cannot be read
_MOST_NAMES = 60
_MOST_LETTERS = 24  # of the name of a group
_LIGHT = "#E4E4E4"


def sensitivity_map(
    sqnr: Mapping[str, Mapping[int, float]],
    path: str | Path,
    *,
    groups: Mapping[str, str] | None = None,
    title: str = "",
) -> Figure:
    """Draws a row for each layer and a column for each number of bits, coloured by the SQNR in dB.

    Args:
        sqnr: of the network with that layer alone in that many bits, by layer and bits; what a layer lacks is grey.
        path: of the picture.
        groups: name of the group of each layer; with two or more, layers are drawn group by group.
        title: above it.

    Raises:
        ValueError: no layer, or a layer without any bits.
    """
    if not sqnr or not all(sqnr.values()):
        raise ValueError("sqnr: at least one layer is needed, and each with some bits")
    groups = groups or dict.fromkeys(sqnr, "")
    order = list(dict.fromkeys(groups[name] for name in sqnr))
    names = sorted(sqnr, key=lambda name: order.index(groups[name]))
    columns = sorted(set().union(*sqnr.values()))
    values = [[sqnr[name].get(bits, math.nan) for bits in columns] for name in names]
    figure = new_figure(max(3.0, 0.16 * min(len(names), _MOST_NAMES) + 1.0))
    axes = figure.add_subplot()
    axes.set_facecolor(_LIGHT)  # cells that are no numbers are not painted
    picture = axes.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_xticks(range(len(columns)), [str(bits) for bits in columns])
    _name_rows(axes, names)
    figure.colorbar(picture, ax=axes, label="SQNR of the predictions, dB", pad=0.08 if len(order) > 1 else 0.05)
    missing = " (grey: not among its choices)" if any(len(row) < len(columns) for row in sqnr.values()) else ""
    finish_axes(axes, f"bits of the weight of this layer alone{missing}", "", title)
    axes.grid(visible=False)
    if len(order) > 1:
        _name_groups(axes, [groups[name] for name in names])
    return save_figure(figure, path)


def bits_by_layer(bits: Mapping[str, int], path: str | Path, *, title: str = "") -> Figure:
    """Draws a bar for each layer.

    Raises:
        ValueError: no layer.
    """
    if not bits:
        raise ValueError("bits: at least one layer is needed")
    figure = new_figure(max(3.0, 0.16 * min(len(bits), _MOST_NAMES) + 1.0))
    axes = figure.add_subplot()
    axes.barh(range(len(bits)), list(bits.values()), color=BLUE, height=0.8)
    axes.invert_yaxis()
    _name_rows(axes, list(bits))
    finish_axes(axes, "bits a weight", "", title)
    return save_figure(figure, path)


def channel_ranges(before: Sequence[float], after: Sequence[float], path: str | Path, *, title: str = "") -> Figure:
    """Draws the largest magnitude of every channel of an input, as it comes and balanced.

    Raises:
        ValueError: no channels, or different numbers of them.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"before and after: {len(before)} and {len(after)} channels; equally many are needed")
    figure = new_figure(3.4)
    for place, (values, word, colour) in enumerate(((before, "as it comes", ORANGE), (after, "balanced", BLUE))):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.bar(range(len(values)), values, width=1.0, color=colour)
        log_axis(axes, "y", [value for value in values if value > 0])
        mean = sum(values) / len(values)
        ratio = max(values) / mean if mean > 0 else 0.0
        finish_axes(axes, "channel", "largest magnitude", f"{word}: largest / mean = {ratio:.3g}")
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, path)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // _MOST_NAMES)
    axes.set_yticks(range(0, len(names), every), names[::every])


def _name_groups(axes: Axes, groups: Sequence[str]) -> None:
    """A line between neighbouring rows of different groups, and the names of groups on the right."""
    beside, start = axes.secondary_yaxis("right"), 0
    places, names = [], []
    for name, rows in groupby(groups):
        end = start + len(list(rows))
        places.append((start + end - 1) / 2)
        names.append(name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…")
        if start:
            axes.axhline(start - 0.5, color="white", linewidth=2)
        start = end
    beside.set_yticks(places, names, rotation=90, va="center")
    beside.tick_params(labelsize=8, length=0)
