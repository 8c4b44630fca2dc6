"""Pictures of a quantized network: how sensitive its layers are, the bits they got, their inputs before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genlight.reports.drawing import BLUE, ORANGE, finish_axes, log_axis, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# more names than this beside an axis cannot be read
_MOST_NAMES = 60


def sensitivity_map(sqnr: Mapping[str, Mapping[int, float]], path: str | Path, *, title: str = "") -> Figure:
    """Draws a row for each layer and a column for each number of bits, coloured by the SQNR in dB.

    Args:
        sqnr: of the network with that layer alone in that many bits, by layer and bits; each with the same bits.

    Raises:
        ValueError: no layer, or layers with other bits.
    """
    columns = [sorted(row) for row in sqnr.values()]
    if not columns or any(bits != columns[0] for bits in columns):
        raise ValueError(f"sqnr: every layer needs the same bits, and there are {columns[:2]}")
    figure = new_figure(max(3.0, 0.16 * min(len(sqnr), _MOST_NAMES) + 1.0))
    axes = figure.add_subplot()
    values = [[row[bits] for bits in columns[0]] for row in sqnr.values()]
    picture = axes.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.set_xticks(range(len(columns[0])), [str(bits) for bits in columns[0]])
    _name_rows(axes, list(sqnr))
    figure.colorbar(picture, ax=axes, label="SQNR of the predictions, dB")
    finish_axes(axes, "bits of the weight of this layer alone", "", title)
    axes.grid(visible=False)
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
