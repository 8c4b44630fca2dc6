"""Pictures hold what they were given: lines, dots, orders and names, counted on the figures themselves."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.solver.decisions import Corrector, LinearScale, SolverSchedule, StepDecision
from genlight.diffusion.solver.levels import levels_of
from genlight.diffusion.solver.presets import named_schedule
from genlight.reports.drawing import GREY
from genlight.reports.schedule_figure import PREDICTION_COLOURS
from genlight.reports.search_figures import (
    pareto_picture,
    predictor_scatter,
    quality_against_nfe,
    sampler_comparison,
    schedule_drawing,
    search_curve,
)

VP = VPSchedule("scaled_linear", beta_start=0.00085, beta_end=0.012)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def lines_of(figure):
    """Lines of the first panel by label, without the unnamed ones."""
    return {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}


def rows_of(samplers, numbers=(4, 5, 6)):
    return [{"nfe": n, "sampler": name, "rmse": level / n} for n in numbers for name, level in samplers.items()]


def test_every_picture_is_800_pixels_wide_and_the_same_again(tmp_path):
    made = {
        "quality": lambda path: quality_against_nfe(rows_of({"a": 1.0, "b": 2.0}), path, "distance"),
        "schedule": lambda path: schedule_drawing(named_schedule("unipc_2_bh2", VP, 4), VP, path),
        "search": lambda path: search_curve([(0, 1.0, "initial", 8), (1, None, "random", 8)], path),
        "pareto": lambda path: pareto_picture([(1, 2.0)], [(1, 2.0)], path, "cost", "distance"),
        "predictor": lambda path: predictor_scatter([1.0, 2.0], [0.1, 0.2], path, 1.0),
    }
    for name, draw in made.items():
        for again in ("", "-again"):
            draw(tmp_path / f"{name}{again}.png")
        assert Image.open(tmp_path / f"{name}.png").width == 800, name
        assert (tmp_path / f"{name}.png").read_bytes() == (tmp_path / f"{name}-again.png").read_bytes(), name


def test_a_line_for_each_sampler_with_its_values(tmp_path):
    figure = quality_against_nfe(rows_of({"hand-made": 3.0, "S³": 1.0}, (4, 10, 6)), tmp_path / "q.png", "distance")
    lines = lines_of(figure)
    assert list(lines["S³"].get_xdata()) == [4, 6, 10]
    assert list(lines["S³"].get_ydata()) == [1 / 4, 1 / 6, 1 / 10]
    assert set(lines) == set(texts(figure.axes[0])) == {"hand-made", "S³"}
    assert figure.axes[0].get_yscale() == "log"
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["4", "6", "10"]


def test_seeds_become_a_median_with_a_bar(tmp_path):
    rows = [{"nfe": 4, "sampler": "a", "rmse": value} for value in (5.0, 1.0, 2.0)]
    rows += [{"nfe": 5, "sampler": "a", "rmse": 1.0, "low": 0.5, "high": 3.0}, {"nfe": 6, "sampler": "a"}]
    figure = quality_against_nfe(rows, tmp_path / "q.png", "distance")
    assert list(lines_of(figure)["a"].get_ydata()) == [2.0, 1.0]
    (bars,) = figure.axes[0].collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[1.0, 5.0], [0.5, 3.0]]


def test_grey_lines_are_those_named_or_all_but_the_best_seven(tmp_path):
    samplers = {f"solver {i}": float(i) for i in range(1, 11)}
    figure = quality_against_nfe(rows_of(samplers), tmp_path / "q.png", "distance")
    grey = {name for name, line in lines_of(figure).items() if line.get_color() == GREY}
    assert grey == {"solver 8", "solver 9", "solver 10"}
    figure = quality_against_nfe(rows_of(samplers), tmp_path / "q.png", "distance", thin=["solver 1"])
    lines = lines_of(figure)
    assert [name for name, line in lines.items() if line.get_color() == GREY] == ["solver 1"]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines.values()}
    assert len(looks) == 10


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0.9, 1.1), min_size=2, max_size=12))
def test_names_never_overlap(tmp_path_factory, levels):
    samplers = {f"solver {i}": level for i, level in enumerate(levels)}
    figure = quality_against_nfe(rows_of(samplers), tmp_path_factory.mktemp("q") / "q.png", "distance")
    figure.canvas.draw()
    # of the words alone: an annotation's own extent includes the way to its line
    boxes = sorted((Text.get_window_extent(text) for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert boxes[0].y0 >= 0 and boxes[-1].y1 <= figure.bbox.height


def test_scores_below_zero_are_drawn_on_a_plain_axis(tmp_path):
    figure = quality_against_nfe(rows_of({"a": -1.0, "b": 2.0}), tmp_path / "q.png", "kernel distance")
    assert figure.axes[0].get_yscale() == "linear"
    with pytest.raises(ValueError, match="none of them has a finite 'fd'"):
        quality_against_nfe(rows_of({"a": 1.0}), tmp_path / "none.png", "", value="fd")
    assert not (tmp_path / "none.png").exists()


def all_kinds():
    """Both predictions, a singlestep step, low-order estimation, all kinds of scales, both correctors."""
    steps = (
        StepDecision("data", corrector=Corrector(scales=("bh2",))),
        StepDecision("noise", 2, points=((-2,),), scales=(0.83,), corrector=Corrector("implicit")),
        StepDecision("data", 3, points=((-2,), (-2, -3)), scales=("exp", LinearScale(-0.35))),
        StepDecision("data", 2, source=-2, points=((-1,),), weights=(1.25, -0.25)),
        StepDecision("data", 2, points=((-2,),), variable="sigma"),
    )
    return SolverSchedule((999.0, 870.0, 640.0, 371.0, 140.0, None), steps, time_domain="time")


def test_every_decision_of_a_step_is_in_its_column(tmp_path):
    figure = schedule_drawing([("searched", all_kinds())], VP, tmp_path / "s.png", title="digits")
    (axes,) = figure.axes
    columns = [[] for _ in range(5)]
    for text in axes.texts:
        x = text.get_position()[0]
        if 0 < x < 1 and abs(x * 5 % 1 - 0.5) < 1e-6 and text.get_color() != GREY:
            columns[int(x * 5)].append(text.get_text())
    assert columns == [
        ["1", "PEC 2", "bh2"],
        ["2", "0.83", "PECE 3"],
        ["3", "exp", "1−0.35h"],
        ["2", "w 1.25", "w −0.25"],
        ["2σ"],
    ]
    assert {"999", "870", "640", "371", "140", "clean", "searched"} <= set(texts(axes))
    # squares are where steps start: the latest evaluation, in the fourth step the one before
    squares = [line for line in axes.lines if line.get_marker() == "s"]
    heights = [float(line.get_ydata()[0]) for line in squares]
    assert heights[0] == heights[1] == heights[2] == heights[4] < heights[3]
    rings = [line for line in axes.lines if line.get_marker() == "o" and line.get_markerfacecolor() == "white"]
    assert [int(float(line.get_xdata()[0]) * 5) for line in rings] == [2]
    legend = figure.legends[0]
    assert "in some derivatives only" in [text.get_text() for text in legend.get_texts()]
    assert "PECE" in legend.get_title().get_text() and "polynomial in σ" in legend.get_title().get_text()


@pytest.mark.parametrize("noise_schedule", [VP, EDMSchedule(), FlowSchedule()], ids=lambda s: s.family)
def test_the_axis_is_linear_in_lambda_and_coloured_by_prediction(tmp_path, noise_schedule):
    schedules = [named_schedule(name, noise_schedule, n) for name, n in (("dpmpp_2m", 5), ("dpm_2m", 8))]
    figure = schedule_drawing([(str(len(s.steps)), s) for s in schedules], noise_schedule, tmp_path / "s.png")
    pairs = []
    for axes, schedule in zip(figure.axes, schedules, strict=True):
        (ticks,) = [line for line in axes.lines if line.get_marker() == "|"]
        levels = [float(level.half_log_snr) for level in levels_of(schedule, noise_schedule)]
        pairs += [(x, y) for x, y in zip(levels, ticks.get_xdata(), strict=True) if math.isfinite(x)]
        wide = [line.get_color() for line in axes.lines if line.get_linewidth() == 4]
        assert wide == [PREDICTION_COLOURS[step.prediction] for step in schedule.steps]
        places = list(ticks.get_xdata())
        assert places == sorted(places) and places[0] >= 0 and places[-1] <= 1
        if not math.isfinite(levels[0]):
            assert places[0] == 0.0 and "−∞" in texts(axes)
    (x0, y0), (x1, y1) = min(pairs), max(pairs)
    for x, y in pairs:
        assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=1e-9)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3s", "unipc_3_bh2", "plms", "pndm", "heun", "sa_solver", "deis_tab_3"])
def test_known_solvers_have_one_order_for_each_step(tmp_path, name):
    nfe = next(n for n in range(9, 30) if _possible(name, n))
    schedule = named_schedule(name, VP, nfe)
    figure = schedule_drawing(schedule, VP, tmp_path / "s.png")
    orders = [text.get_text() for text in figure.axes[0].texts if text.get_color() == "white"]
    assert orders == [str(step.order) for step in schedule.steps]
    correctors = [text for text in texts(figure.axes[0]) if text.startswith("PEC")]
    assert len(correctors) == sum(step.corrector is not None for step in schedule.steps)


def _possible(name, nfe):
    try:
        return bool(named_schedule(name, VP, nfe))
    except ValueError:
        return False


def test_close_times_get_the_digits_that_tell_them_apart(tmp_path):
    times = (999.0, 998.6, 998.2, 500.0, 0.25)
    schedule = SolverSchedule(times, (StepDecision(),) * 4, time_domain="time")
    figure = schedule_drawing(schedule, VP, tmp_path / "s.png")
    assert {"999", "998.6", "998.2", "500", "0.25"} <= set(texts(figure.axes[0]))


def test_drawings_that_cannot_be_made_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a drawing needs at least one"):
        schedule_drawing([], VP, tmp_path / "s.png")
    with pytest.raises(ValueError):
        schedule_drawing(all_kinds(), EDMSchedule(), tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


def test_each_candidate_is_a_dot_of_its_source_and_failures_are_ticks(tmp_path):
    records = [(0, 4.0, "initial", 8), (1, 5.0, "initial", 8), (2, None, "mutation", 8), (3, 3.0, "mutation", 8)]
    records += [(4, 6.0, "promotion", 64), (5, None, "random", 64), (6, 2.0, "homemade", 64), (7, 9.0, "guided", 64)]
    figure = search_curve(reversed(records), tmp_path / "c.png", "distance", title="5 evaluations")
    (axes,) = figure.axes
    dots = {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    assert dots == {
        "guided (1)": [[7, 9.0]],
        "mutation (1)": [[3, 3.0]],
        "promotion (1)": [[4, 6.0]],
        "initial (2)": [[0, 4.0], [1, 5.0]],
        "homemade (1)": [[6, 2.0]],
    }
    lines = lines_of(figure)
    assert list(lines["failed (2)"].get_xdata()) == [2, 5]
    assert list(lines["best so far, 8 samples"].get_ydata()) == [4.0, 3.0, 3.0]
    assert list(lines["best so far, 64 samples"].get_xdata()) == [4, 6, 7]
    assert axes.get_yscale() == "log"


@settings(max_examples=10, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(-5, 1e6)), min_size=1, max_size=20))
def test_best_so_far_never_rises(tmp_path_factory, scores):
    records = [(index, score, "random", 4) for index, score in enumerate(scores)]
    figure = search_curve(records, tmp_path_factory.mktemp("c") / "c.png")
    known = [score for score in scores if score is not None]
    lines = lines_of(figure)
    if known:
        curve = list(lines["best so far"].get_ydata())
        assert curve == sorted(curve, reverse=True) and curve[-1] == min(known)
        assert lines["best so far"].get_xdata()[-1] == len(scores) - 1
    assert ("best so far" in lines) == bool(known)
    failed = lines.get(f"failed ({len(scores) - len(known)})")
    assert (failed is not None) == (len(known) < len(scores))


def test_a_search_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs at least one"):
        search_curve([], tmp_path / "c.png")


def test_no_measured_point_lies_below_the_front(tmp_path):
    points = [(4, 3.0), (5, 2.0), (5, 4.0), (8, 2.5), (10, 0.1), (12, 0.4)]
    front = [(10, 0.1), (4, 3.0), (5, 2.0)]
    figure = pareto_picture(points, front, tmp_path / "p.png", "evaluations", "distance", labels=["c", "a", "b"])
    (axes,) = figure.axes
    steps = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    x, y = list(steps.get_xdata()), list(steps.get_ydata())
    assert x[:-1] == [4, 5, 10] and x[-1] > 12 and y == [3.0, 2.0, 0.1, 0.1]
    for cost, quality in points:
        assert quality >= next(level for at, level in reversed(list(zip(x, y))) if at <= cost)
    assert {text.get_text(): text.xy for text in axes.texts} == {"c": (10, 0.1), "a": (4, 3.0), "b": (5, 2.0)}
    assert axes.get_yscale() == "log" and axes.get_xscale() == "linear"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    for front, labels in (([], None), ([(1, 1.0)], ["a", "b"])):
        with pytest.raises(ValueError, match="front: "):
            pareto_picture(points, front, tmp_path / "no.png", "", "", labels=labels)
    assert not (tmp_path / "no.png").exists()


def test_the_scatter_marks_the_best_by_either(tmp_path):
    figure = predictor_scatter([3.0, 1.0, 2.0], [0.9, 0.02, 0.01], tmp_path / "t.png", 0.333)
    (axes,) = figure.axes
    every, measured, predicted = axes.collections
    assert len(every.get_offsets()) == 3
    assert measured.get_offsets().tolist() == [[0.01, 2.0]] and predicted.get_offsets().tolist() == [[0.02, 1.0]]
    assert axes.get_title() == "Kendall's tau = 0.33, 3 candidates" and axes.get_xscale() == "log"
    with pytest.raises(ValueError, match="1 and 2 values"):
        predictor_scatter([1.0], [1.0, 2.0], tmp_path / "no.png", 0.0)


def test_one_row_for_each_sampler_on_the_same_noise(tmp_path):
    names = ("teacher", "hand-made", "S³")
    samples = {name: torch.full((10, 1, 8, 8), level) for name, level in zip(names, (-1.0, 0.0, 1.0))}
    sampler_comparison(samples, tmp_path / "c.png", count=5)
    picture = Image.open(tmp_path / "c.png").convert("L")
    width, height = picture.size
    assert width == 5 * 68 + 4
    # the middle of the first and of the last image of each row
    for row, level in enumerate((0, 128, 255)):
        y = int((row + 0.4) * height / 3)
        assert picture.getpixel((36, y)) == picture.getpixel((width - 36, y)) == level
    samples["S³"] = samples["S³"][:3]
    with pytest.raises(ValueError, match="one shape is needed"):
        sampler_comparison(samples, tmp_path / "no.png")
    with pytest.raises(ValueError, match="one shape is needed"):
        sampler_comparison({}, tmp_path / "no.png")
