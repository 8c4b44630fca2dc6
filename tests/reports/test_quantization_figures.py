"""Cells of a picture of sensitivities are where and what they should be, also where groups of layers differ in bits."""

from pathlib import Path

import numpy as np
import pytest

from genlight.reports.quantization_figures import sensitivity_map

SQNR = {"a": {8: 40.0, 4: 20.0}, "b": {8: 44.0}, "c": {4: 21.0, 8: 41.0}, "d": {2: 9.0, 8: 45.0}}


def test_layers_stand_by_group_and_what_was_not_measured_is_empty(tmp_path: Path) -> None:
    figure = sensitivity_map(SQNR, tmp_path / "s.png", groups={"a": "one", "b": "two", "c": "one", "d": "long" * 9})
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b", "d"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "8"]
    cells = np.ma.filled(axes.images[0].get_array(), np.nan)
    none = np.nan
    np.testing.assert_equal(cells, [[none, 20, 40], [none, 21, 41], [none, none, 44], [9, none, 45]])
    assert "grey" in axes.get_xlabel() and [line.get_ydata()[0] for line in axes.lines] == [1.5, 2.5]
    (beside,) = axes.child_axes
    assert beside.get_yticks().tolist() == [0.5, 2, 3]
    assert [label.get_text() for label in beside.get_yticklabels()] == ["one", "two", "longlonglonglonglonglon…"]
    assert (tmp_path / "s.png").stat().st_size


def test_one_group_has_no_name(tmp_path: Path) -> None:
    whole = {name: row for name, row in SQNR.items() if name in "ac"}
    (axes, _) = sensitivity_map(whole, tmp_path / "s.png", groups=dict.fromkeys(whole, "one")).axes
    assert not axes.child_axes and not axes.lines and "grey" not in axes.get_xlabel()


@pytest.mark.parametrize("sqnr", [{}, {"a": {8: 1.0}, "b": {}}])
def test_nothing_is_no_picture(sqnr: dict[str, dict[int, float]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        sensitivity_map(sqnr, tmp_path / "s.png")
