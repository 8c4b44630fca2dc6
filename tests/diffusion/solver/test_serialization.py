"""JSON of schedules: exact, strict, versioned, tied to its noise schedule."""

import json

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import random_schedule

from genlight.diffusion.noise_schedules import FlowSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import Corrector, SolverSchedule, StepDecision
from genlight.diffusion.solver.levels import in_half_log_snr
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.serialization import (
    SolverBank,
    TableRecord,
    bank_from_json,
    canonical_key,
    fingerprint,
    schedule_from_json,
    schedule_to_json,
)

VP, SD, FLOW = VPSchedule(), VPSchedule("scaled_linear", 0.00085, 0.012), FlowSchedule()
EPSILON = Prediction("epsilon", VP)


def test_round_trip_of_random_schedules() -> None:
    rng = np.random.default_rng(0)
    for trial in range(100):
        schedule = random_schedule(rng, int(rng.integers(2, 8)), -3.0, 3.0, afs=("zero", None)[trial % 2])
        text = schedule_to_json(schedule)
        again = schedule_from_json(text)
        assert again == schedule and schedule_to_json(again) == text
        assert torch.equal(compile_schedule(again, VP).weights, compile_schedule(schedule, VP).weights)


def _broken(change) -> str:
    content = json.loads(schedule_to_json(named_schedule("unipc_2_bh2", VP, 4, end="clean")))
    change(content)
    return json.dumps(content)


BAD = {
    "unknown field": (lambda c: c.update(note="x"), "note"),
    "unknown field in a step": (lambda c: c["steps"][0].update(extra=1), r"steps\.0\.extra"),
    "text for a number": (lambda c: c["times"].__setitem__(0, "999"), r"times\.0"),
    "bad order": (lambda c: c["steps"][1].update(order=9), "order = 9"),
    "unknown scale": (lambda c: c["steps"][1].update(scales=["bh7"]), r"scales"),
    "corrector at the end": (lambda c: c["steps"][-1].update(corrector={"kind": "pseudo"}), "last step has none"),
    "missing times": (lambda c: c.pop("times"), "times"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_json_is_refused_in_one_line(name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        schedule_from_json(_broken(change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ['{"times": [NaN, 0.0], "steps": [{}]}', '{"times": [1e999, 0.0], "steps": [{}]}', "{", "[]"]
)
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(ValueError, match="solver schedule") as error:
        schedule_from_json(text)
    assert "\n" not in str(error.value)


def test_keys_find_duplicates() -> None:
    step = StepDecision("data", 2, points=((-2,),), scales=(1.0,))
    three = (StepDecision("data", 3, points=((-2, -3), (-3, -2))), StepDecision("data", 3, points=((-2, -3),) * 2))
    base = SolverSchedule((-3.0, 0.0, 1.0), (StepDecision(), step))
    key = canonical_key(base, VP)
    assert key == canonical_key(SolverSchedule((-3.0, 0.0003, 1.0), base.steps), VP)
    assert key == canonical_key(
        SolverSchedule(base.times, (StepDecision(), StepDecision(order=2, points=((-2,),)))), VP
    )
    in_time = SolverSchedule(tuple(VP.t_of_half_log_snr(t) for t in base.times), base.steps, time_domain="time")
    assert key == canonical_key(in_time, VP)
    assert in_half_log_snr(in_time, VP).times == pytest.approx(base.times)
    times = (-3.0, -1.0, 0.0, 1.0)
    a, b = (SolverSchedule(times, (StepDecision(), step, last)) for last in three)
    assert canonical_key(a, VP) == canonical_key(b, VP)
    derived = StepDecision(corrector=Corrector())
    written = StepDecision(corrector=Corrector(points=((),)))
    assert len({canonical_key(SolverSchedule(base.times, (s, step)), VP) for s in (derived, written)}) == 1
    others = [
        SolverSchedule((-3.0, 0.01, 1.0), base.steps),
        SolverSchedule(base.times, base.steps, afs="zero"),
        SolverSchedule(base.times, (StepDecision("noise"), step)),
        SolverSchedule(base.times, (derived, step)),
        SolverSchedule((-3.0, 0.0, None), (StepDecision(), StepDecision())),
    ]
    assert len({key, *(canonical_key(other, VP) for other in others)}) == 1 + len(others)
    flow = SolverSchedule((1.0, 0.5, 0.0), (StepDecision(),) * 2, time_domain="time")
    assert in_half_log_snr(flow, FLOW).times == (None, 0.0, None)
    assert canonical_key(flow, FLOW) == canonical_key(SolverSchedule((None, 0.0, None), (StepDecision(),) * 2), FLOW)


def test_bank_round_trip_and_lookup() -> None:
    schedules = {n: named_schedule("dpmpp_3m", VP, n) for n in (4, 5, 8)}
    bank = SolverBank.of(EPSILON, schedules)
    again = bank_from_json(bank.to_json())
    assert again == bank and again.to_json() == bank.to_json()
    assert again.schedule(5) == schedules[5]
    with pytest.raises(ValueError, match="num_inference_steps = 6: the bank has schedules for 4, 5, 8 only"):
        again.schedule(6)
    again.check(Prediction("epsilon", VPSchedule()))


@pytest.mark.parametrize(
    "other, message",
    [
        (Prediction("flow", FLOW), "made for family = 'vp', but the model has 'flow'"),
        (Prediction("v_prediction", VP), "prediction_type = 'epsilon', but the model has 'v_prediction'"),
        (Prediction("epsilon", SD), "noise_schedule = .*linear.*scaled_linear"),
    ],
)
def test_a_bank_of_another_model_is_refused(other: Prediction, message: str) -> None:
    assert fingerprint(other) != fingerprint(EPSILON)
    with pytest.raises(ValueError, match=message):
        SolverBank.of(EPSILON, {}).check(other)


def test_bank_of_another_version_or_content() -> None:
    content = json.loads(SolverBank.of(EPSILON, {4: named_schedule("ddim", VP, 4)}).to_json())
    with pytest.raises(ValueError, match="version = 2; this release reads version 1"):
        bank_from_json(json.dumps({**content, "version": 2}))
    with pytest.raises(ValueError, match="kind"):
        bank_from_json(json.dumps({**content, "kind": "genlight.report"}))
    with pytest.raises(ValueError, match=r"schedules\.5: this schedule makes 4 evaluations"):
        bank_from_json(json.dumps({**content, "schedules": {"5": content["schedules"]["4"]}}))


def test_tables_are_kept_to_the_bit() -> None:
    table = compile_schedule(named_schedule("unipc_3_bh1", VP, 6), VP)
    schedules = {6: named_schedule("ddim", VP, 6)}
    bank = SolverBank(**{**vars(SolverBank.of(EPSILON, schedules)), "tables": {6: TableRecord.of(table)}})
    again = bank_from_json(bank.to_json()).tables[6].table()
    assert torch.equal(again.weights, table.weights) and torch.equal(again.times, table.times)
    content = json.loads(bank.to_json())
    content["tables"]["6"]["weights"][0][3] = 1.0
    with pytest.raises(ValueError, match="lower-triangular"):
        bank_from_json(json.dumps(content))
