"""What the pictures made with matplotlib share: colours, a figure of 800 pixels width, and how it is written.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), told apart with any colour vision; markers or words
say the same again.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genlight.io import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ORANGE, BLUE, GREEN, PINK, YELLOW, SKY, BLACK = COLOURS = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8A8A8A"
WIDTH, DPI = 7.28, 110
# values that spread over more than this factor are drawn on a logarithmic axis
_WIDE = 20.0


def new_figure(height: float) -> Figure:
    """An empty figure 800 pixels wide and `height` inches high, without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def finish_axes(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    """Labels, a faint grid, no frame."""
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8, which="both")
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def log_axis(axes: Axes, which: str, values: Sequence[float], factor: float = _WIDE) -> None:
    """Make the axis "x" or "y" logarithmic if the values are positive and spread over `factor` at least.

    Its ticks are numbers like 20, not powers of ten, where the values spread over less than three decades.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if not values or min(values) <= 0 or max(values) < factor * min(values):
        return
    getattr(axes, f"set_{which}scale")("log")
    if max(values) < 1000 * min(values):
        axis = axes.xaxis if which == "x" else axes.yaxis
        few = max(values) < 10 * min(values)
        axis.set_major_locator(MaxNLocator(6) if few else LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes, values: Sequence[float]) -> None:
    """Ticks of the x axis at whole numbers only, if all values are."""
    from matplotlib.ticker import MaxNLocator

    if axes.get_xscale() == "linear" and all(float(value).is_integer() for value in values):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def save_figure(figure: Figure, path: str | Path) -> Figure:
    """Write the figure as PNG and give it back."""
    data = io.BytesIO()
    # without the software entry equal data give equal bytes on any version
    figure.savefig(data, format="png", metadata={"Software": None})
    atomic_write_bytes(path, data.getvalue())
    return figure
