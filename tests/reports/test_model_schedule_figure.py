"""Pictures of model schedules hold what they were given: points, envelopes, bars in the colour of their member."""

from itertools import pairwise

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from genlight.diffusion.model_schedule import ModelSchedule
from genlight.diffusion.noise_schedules import VPSchedule
from genlight.reports.drawing import COLOURS
from genlight.reports.model_schedule_figure import pareto_figure, strips_figure

VP = VPSchedule()
MIXED = ModelSchedule("singlestep", (("a",), ("a", "b"), ("a", "a", "b")))
GRID = ModelSchedule("ddim", (("b",), ("a",)), slots=(70, 20))
STEPS = ModelSchedule("multistep", (("a",), ("b",), ("c",)), orders=(1, 2, 3))


def test_pictures_are_800_pixels_wide_and_the_same_again(tmp_path):
    made = {
        "pareto": lambda path: pareto_figure({"search": [(1, 3.0)]}, path, baselines={"rule": [(1, 4.0)]}, budgets=[1]),
        "strips": lambda path: strips_figure([("one", MIXED, 2.0)], VP, path),
    }
    for name, draw in made.items():
        for again in ("", "-again"):
            draw(tmp_path / f"{name}{again}.png")
        assert Image.open(tmp_path / f"{name}.png").width == 800, name
        assert (tmp_path / f"{name}.png").read_bytes() == (tmp_path / f"{name}-again.png").read_bytes(), name


def test_methods_are_points_and_baselines_their_lower_envelope(tmp_path):
    rule = [(1.0, 9.0), (2.0, 10.0), (2.0, 8.0), (4.0, 8.5), (8.0, 5.0)]
    figure = pareto_figure(
        {"search": [(8.0, 3.0), (1.0, 6.0)]}, tmp_path / "p.png", baselines={"rule": rule}, budgets=[1.0, 8.0]
    )
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["search"].get_xdata()) == [1.0, 8.0] and list(lines["search"].get_ydata()) == [6.0, 3.0]
    assert list(lines["rule"].get_ydata()) == [9.0, 8.0, 5.0, 5.0]
    assert [text.get_text() for text in axes.texts] == ["1", "8"]
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_where_more_is_better_the_envelope_rises_on_a_linear_axis(tmp_path):
    rule = [(1.0, 20.0), (2.0, 19.0), (2.0, 24.0), (4.0, -1.0)]
    figure = pareto_figure({"search": [(1.0, 21.0)]}, tmp_path / "p.png", baselines={"rule": rule}, mode="max")
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["rule"].get_ydata()) == [20.0, 24.0, 24.0]
    assert axes.get_xscale() == "log" and axes.get_yscale() == "linear"


def test_pictures_of_nothing_are_refused(tmp_path):
    for methods in ({}, {"search": [(1.0, float("nan"))]}):
        with pytest.raises(ValueError, match="finite"):
            pareto_figure(methods, tmp_path / "p.png")
    with pytest.raises(ValueError, match="at least one"):
        strips_figure([], VP, tmp_path / "s.png")
    with pytest.raises(ValueError, match="b not among a"):
        strips_figure([("one", MIXED, 1.0)], VP, tmp_path / "s.png", members=["a"])


def test_bars_fill_the_axis_in_the_colours_of_their_members(tmp_path):
    zoo = ["a", "b", "c"]
    named = [("mixed", MIXED, 2.0), ("grid", GRID, 1.0), ("steps", STEPS, 3.0)]
    figure = strips_figure(named, VP, tmp_path / "s.png", members=zoo, slots=100)
    axes = figure.axes[0]
    place = 0
    for row, (_, schedule, _) in enumerate(named):
        bars = axes.patches[place : place + schedule.nfe]
        place += schedule.nfe
        assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [
            COLOURS[zoo.index(name)] for name in schedule.members
        ]
        for left, right in pairwise(bars):
            assert left.get_x() + left.get_width() == pytest.approx(right.get_x())
        assert all(row < bar.get_y() and bar.get_y() + bar.get_height() < row + 1 for bar in bars)
        if schedule.kind == "singlestep":
            assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(VP.half_log_snr(VP.t_min))
            assert bars[5].get_height() == pytest.approx(3 * bars[0].get_height())
    assert place == len(axes.patches)
    assert {"mixed", "2, 6 NFE"} <= {text.get_text() for text in axes.texts}


def test_more_members_than_colours_are_hatched(tmp_path):
    names = [f"m{i}" for i in range(9)]
    schedule = ModelSchedule("singlestep", tuple((name,) for name in names))
    figure = strips_figure([("all", schedule, 1.0)], VP, tmp_path / "s.png", members=names)
    bars = figure.axes[0].patches
    assert bars[0].get_facecolor() == bars[7].get_facecolor() and bars[0].get_hatch() != bars[7].get_hatch()
