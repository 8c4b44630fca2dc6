"""Learning-rate schedules; those by steps are tested with the modules that use them."""

import math

import pytest
import torch

from genlight.modules import lr_schedules
from genlight.modules.lr_schedules import warmup_cosine


def rates(monkeypatch: pytest.MonkeyPatch, step_seconds: float, total_steps: int = 1000) -> list[float]:
    """Rates of a training of up to 100 s whose steps take so long."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    now = [7.0]
    monkeypatch.setattr(lr_schedules.time, "monotonic", lambda: now[0])
    schedule = warmup_cosine(optimizer, total_steps=total_steps, warmup_steps=2, seconds=100)
    found = []
    for _ in range(12):
        found.append(schedule.get_last_lr()[0])
        now[0] += step_seconds
        optimizer.step()
        schedule.step()
    return found


def test_a_training_of_limited_time_ends_at_its_lowest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(monkeypatch, step_seconds=10)
    assert found[:2] == [0.5, 1.0]
    # the clock starts with the first step: at step 6 half of the time is over
    assert found[6] == pytest.approx(0.5)
    assert found[11] == pytest.approx(0.0)


def test_steps_decide_where_they_are_further_than_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(monkeypatch, step_seconds=0.001, total_steps=12)
    assert found[7] == pytest.approx(0.5)
    assert found[11] == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)


def test_a_time_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds must be above 0"):
        warmup_cosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), total_steps=3, seconds=0)
