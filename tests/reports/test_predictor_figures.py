"""What the pictures of predictors show."""

from pathlib import Path

import numpy as np
import pytest

from genlight.reports.predictor_figures import gate_weights, regret_curves, tau_over_labels


def test_each_predictor_is_a_line_of_means(tmp_path: Path) -> None:
    values = {f"p{number}": {24: [0.4, 0.6], 93: [0.7, 0.9]} for number in range(9)}
    figure = tau_over_labels(values, tmp_path / "tau.png")
    (axes,) = figure.axes
    lines = axes.get_lines()
    assert len(lines) == 9 and all(line.get_ydata() == pytest.approx([0.5, 0.8]) for line in lines)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == 9 and (tmp_path / "tau.png").is_file()
    with pytest.raises(ValueError, match="one predictor"):
        tau_over_labels({}, tmp_path / "none.png")


def test_regret_begins_where_it_is_told_and_where_all_have_begun(tmp_path: Path) -> None:
    curves = {"random": [[3.0, 2.0, 1.0], [5.0, 2.0, 1.0]], "dele": [[4.0, 1.0, 0.0]]}
    (axes,) = regret_curves(curves, tmp_path / "regret.png", 2).axes
    first, second = axes.get_lines()
    assert list(first.get_xdata()) == [2, 3] and first.get_ydata() == pytest.approx([2.0, 1.0])
    assert second.get_ydata() == pytest.approx([1.0, 0.0])
    (axes,) = regret_curves(curves, tmp_path / "regret.png", 20).axes
    assert list(axes.get_lines()[0].get_xdata()) == [3]


def test_gate_weights_are_sorted_by_their_mean(tmp_path: Path) -> None:
    weights = np.array([[0.2, 0.2], [0.5, 0.7], [0.3, 0.1]])
    (axes,) = gate_weights(["a", "b", "c"], weights, tmp_path / "gate.png").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.2, 0.2, 0.6])
    with pytest.raises(ValueError, match="weights"):
        gate_weights(["a"], weights, tmp_path / "gate.png")
