"""Pictures: grids of samples, before and after, and training curves. Grids need Pillow only."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from genlight.io import atomic_write_bytes
from genlight.reports.drawing import log_axis

if TYPE_CHECKING:
    from PIL import Image

# small images are enlarged by whole factors until a cell has about this many pixels
CELL_PIXELS = 64
_GAP = 4
_LINE = 14
_SPACE = 12
_BACKGROUND = (214, 214, 214)
_INK = (40, 40, 40)
_COLUMNS_OF_CSV = ("epoch", "step")


def sample_grid(
    images: Tensor,
    path: str | Path,
    rows: int | None = None,
    *,
    labels: Sequence[str | int] | None = None,
    title: str = "",
) -> None:
    """Writes images side by side as one PNG, enlarged without smoothing so that 8×8 digits can be seen.

    Args:
        images: [N, C, H, W] in [-1, 1], 1 or 3 channels; values beyond are clipped.
        path: the PNG file.
        rows: rows of the grid; None for about as many as columns.
        labels: a word under each image.
        title: a line above the grid.

    Raises:
        ValueError: no image, another shape, or another number of labels.
    """
    _write_png(_grid(images, rows, labels, title), path)


def comparison_grid(
    before: Tensor,
    after: Tensor,
    path: str | Path,
    rows: int | None = None,
    *,
    titles: tuple[str, str] = ("before", "after"),
) -> None:
    """Writes two grids of the same size beside each other: image i left and image i right have the same noise.

    Raises:
        ValueError: the two batches differ in shape.
    """
    from PIL import Image

    if before.shape != after.shape:
        raise ValueError(f"a comparison needs equal shapes, got {list(before.shape)} and {list(after.shape)}")
    left, right = (_grid(images, rows, None, title) for images, title in zip((before, after), titles, strict=True))
    both = Image.new("RGB", (left.width + right.width + _SPACE, left.height), _BACKGROUND)
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _SPACE, 0))
    _write_png(both, path)


def curves(csv_path: str | Path, path: str | Path, *, columns: Sequence[str] | None = None) -> list[str]:
    """Draws every column of a Lightning ``metrics.csv`` over the step, one panel each, as one PNG.

    Args:
        csv_path: the CSV of a CSVLogger; empty cells are steps at which a value was not logged.
        path: the PNG file.
        columns: which columns; None for all with at least two finite values.

    Returns:
        The columns drawn; nothing is written if there are none.

    Raises:
        ValueError: the file has no column "step", or lacks one that was asked for.
    """
    series = _read_series(Path(csv_path))
    if columns is None:
        names = [name for name, points in series.items() if len(points) >= 2]
    elif missing := [name for name in columns if name not in series]:
        raise ValueError(f"{csv_path} has no columns {missing}; it has {sorted(series)}")
    else:
        names = [name for name in columns if series[name]]
    if not names:
        return []
    from matplotlib.figure import Figure

    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(4.2 * across, 2.8 * down), layout="constrained")
    for position, name in enumerate(names):
        axes = figure.add_subplot(down, across, position + 1)
        steps, values = zip(*series[name], strict=True)
        axes.plot(steps, values, linewidth=1.2, marker="o" if len(steps) < 20 else "", markersize=3)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        # losses and distances fall over orders of magnitude
        log_axis(axes, "y", values, 20.0)
        if position // across == down - 1:
            axes.set_xlabel("step", fontsize=8)
    data = io.BytesIO()
    # without the software entry equal data give equal bytes on any version
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    atomic_write_bytes(path, data.getvalue())
    return names


def _grid(images: Tensor, rows: int | None, labels: Sequence[str | int] | None, title: str) -> Image.Image:
    from PIL import Image, ImageDraw

    pixels = _to_bytes(images)
    count, height, width, _ = pixels.shape
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images")
    if rows is not None and rows < 1:
        raise ValueError(f"a grid needs at least one row, got {rows}")
    down = min(count, rows or math.ceil(math.sqrt(count)))
    across = math.ceil(count / down)
    factor = max(1, round(CELL_PIXELS / max(height, width)))
    line = _LINE if labels is not None else 0
    top = _LINE + _GAP if title else 0
    step_x, step_y = width * factor + _GAP, height * factor + _GAP + line
    canvas = Image.new("RGB", (across * step_x + _GAP, top + down * step_y + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((_GAP, _GAP), title, fill=_INK)
    for position in range(count):
        cell = Image.fromarray(pixels[position].repeat(factor, axis=0).repeat(factor, axis=1))
        left = _GAP + position % across * step_x
        upper = top + _GAP + position // across * step_y
        canvas.paste(cell, (left, upper))
        if labels is not None:
            draw.text((left + 1, upper + height * factor + 1), str(labels[position]), fill=_INK)
    return canvas


def _to_bytes(images: Tensor) -> np.ndarray:
    """[N, C, H, W] in [-1, 1] to uint8 [N, H, W, 3]; what is not finite becomes black."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid needs images [N, 1 or 3, H, W], got {list(images.shape)}")
    levels = ((images.detach().cpu().double() + 1) * 127.5).nan_to_num(0.0).round().clamp(0, 255)
    return levels.byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def _write_png(image: Image.Image, path: str | Path) -> None:
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    atomic_write_bytes(path, data.getvalue())


def _read_series(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Finite points (step, value) of each column."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or [] if name not in _COLUMNS_OF_CSV]
        if "step" not in (reader.fieldnames or []):
            raise ValueError(f'{path} has no column "step": it is not a metrics.csv of the CSV logger')
        series: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for row in reader:
            for name in names:
                step, value = _number(row["step"]), _number(row[name])
                if step is not None and value is not None:
                    series[name].append((step, value))
    return series


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
