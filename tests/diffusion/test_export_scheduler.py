"""Banks as schedulers and back, pipeline folders, and the stock schedulers that do the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusion.scheduler_runs import EDM, EPS, FLOW, VP, bank, close, model, noise, run

from genlight.diffusion.export_scheduler import (
    bank_of,
    scheduler_of,
    stock_form,
    why_no_stock_form,
    write_scheduler,
    write_stock_scheduler,
)
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule, StepDecision
from genlight.diffusion.solver.presets import preset
from genlight.diffusion.solver.sample import sample
from genlight.diffusion.solver.serialization import SolverBank, TableRecord
from genlight.diffusion.solver_schedule import SolverScheduleScheduler
from genlight.io import verify_folder, write_manifest


def test_timesteps_are_integers_where_all_are() -> None:
    fractions = scheduler_of(bank())
    assert fractions.timesteps.dtype == torch.float32
    with pytest.raises(ValueError, match=r"schedules\.5: timestep .* is not an integer"):
        scheduler_of(bank(), integer_timesteps=True)
    whole = SolverBank.of(EPS, {3: preset("ddim", VP, (999.0, 600.0, 200.0, None))})
    assert scheduler_of(whole, integer_timesteps=True).timesteps.tolist() == [999, 600, 200]
    assert scheduler_of(whole).timesteps.dtype == torch.int64


def _afs(kind: Any, prediction: Prediction) -> SolverBank:
    end, start = (0.0, 1.0) if prediction.schedule is FLOW else (0.0, 999.0)
    times = tuple(end + (start - end) * part for part in (1.0, 0.8, 0.5, 0.2, 0.0))
    steps = (StepDecision(), *[StepDecision(order=2, points=((-2,),))] * 2, StepDecision())
    return SolverBank.of(prediction, {3: SolverSchedule(times, steps, time_domain="time", afs=kind)})


def test_analytical_first_step_is_a_scale_of_the_noise() -> None:
    one = _afs("zero", EPS)
    scheduler, table = scheduler_of(one), compile_schedule(one.schedules[3], VP)
    close(run(scheduler, 3, noise()), sample(model, noise(), table, EPS))
    assert 0 < scheduler.init_noise_sigma < 0.99
    assert bank_of(scheduler) == one
    for other in (_afs("mean", EPS), _afs("zero", Prediction("flow", FLOW))):
        with pytest.raises(ValueError, match=r"schedules\.3\.afs: an analytical first step"):
            scheduler_of(other)


def test_table_and_decisions_must_agree() -> None:
    config = json.loads(scheduler_of(bank()).to_json_string())
    config["schedules"]["5"]["table"][4][3] += 1e-3
    changed = SolverScheduleScheduler.from_config(config)  # the table alone is what samples
    with pytest.raises(ValueError, match=r"schedules\.5: its table is not what its decisions compile to"):
        bank_of(changed)


def test_last_sigma() -> None:
    for prediction in (EPS, Prediction("flow", FLOW), Prediction("edm", EDM)):
        one = bank("dpmpp_2m", prediction)
        end = prediction.schedule.t_min
        expected = prediction.schedule.sigma(end) / (
            1 if prediction.schedule is FLOW else prediction.schedule.alpha(end)
        )
        assert scheduler_of(one).sigmas[-1].item() == pytest.approx(expected, rel=1e-5)
        for basis in ("data", "noise") if prediction.schedule is not FLOW else ("data",):
            table = compile_schedule(one.schedules[5], prediction.schedule, basis=basis)  # type: ignore[arg-type]
            tuned = replace(one, schedules={}, tables={5: TableRecord.of(table)})
            assert scheduler_of(tuned).sigmas[-1].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "name, end, expected",
    [
        ("ddim", "clean", ("DPMSolverMultistepScheduler", 1)),
        ("dpmpp_2m", "clean", ("DPMSolverMultistepScheduler", 2)),
        ("dpmpp_3m", "t_min", ("DPMSolverMultistepScheduler", 3)),
        ("dpmpp_3m_exact", "clean", None),
        ("unipc_2_bh2", "clean", None),
    ],
)
def test_stock_forms(name: str, end: str, expected: Any) -> None:
    times = (999.0, 700.0, 431.0, 250.0, 90.0, None if end == "clean" else 0.0)
    scheduler = scheduler_of(SolverBank.of(EPS, {5: preset(name, VP, times)}))
    form = stock_form(scheduler, 5)
    assert (form and (form.class_name, form.config["solver_order"])) == expected
    if form is None:
        assert "take others" in why_no_stock_form(scheduler, 5)
    else:
        assert form.call == {"timesteps": [999, 700, 431, 250, 90]}
        run(scheduler, 5, noise())
        other = form.build()
        x = noise()
        for t in other.timesteps:
            x = other.step(model(x, t.expand(len(x))), t, x, return_dict=False)[0]
        close(x, run(scheduler, 5, noise()))


def test_stock_form_of_ddim_and_flow() -> None:
    ddim = build_scheduler("DDIMScheduler", VP, "epsilon", timestep_spacing="trailing", clip_sample=False)
    ddim.set_timesteps(5)
    times = (*(float(t) for t in ddim.timesteps), None)
    form = stock_form(scheduler_of(SolverBank.of(EPS, {5: preset("ddim", VP, times)})), 5)
    assert form is not None and form.class_name == "DDIMScheduler" and form.call == {"num_inference_steps": 5}
    flow = Prediction("flow", FLOW)
    form = stock_form(scheduler_of(bank("flow_euler", flow)), 5)
    assert form is not None and form.class_name == "FlowMatchEulerDiscreteScheduler"
    # diffusers truncates the timesteps of its multistep flow schedulers to integers
    assert stock_form(scheduler_of(bank("dpmpp_2m", flow)), 5) is None


def _folder(path: Path, scheduler: Any) -> Path:
    scheduler.save_pretrained(path / "scheduler")
    (path / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", type(scheduler).__name__]}))
    return path


def test_a_folder_of_another_model_is_left_alone(tmp_path: Path) -> None:
    ours = scheduler_of(bank())
    with pytest.raises(ValueError, match="not a folder of a diffusers pipeline"):
        write_scheduler(ours, tmp_path)
    for number, (other, message) in enumerate(
        [
            (build_scheduler("DDIMScheduler", VP, "v_prediction"), "searched for prediction_type = 'epsilon', but the"),
            (DDIMScheduler(), r"searched for noise_schedule = .*0\.012.*, but the model has .*0\.02"),
            (FlowMatchEulerDiscreteScheduler(), "searched for family = 'vp', but the model has 'flow'"),
            (scheduler_of(bank("ddim", Prediction("sample", VP))), "searched for prediction_type = 'epsilon', but"),
        ]
    ):
        folder = _folder(tmp_path / str(number), other)
        before = (folder / "scheduler" / "scheduler_config.json").read_bytes()
        with pytest.raises(ValueError, match=message):
            write_scheduler(ours, folder)
        assert (folder / "scheduler" / "scheduler_config.json").read_bytes() == before


def test_a_folder_of_the_same_model(tmp_path: Path) -> None:
    """Written over a stock scheduler, then over itself; the shift of flow matching is not of the model."""
    folder = _folder(tmp_path, FlowMatchEulerDiscreteScheduler(shift=1.0))
    write_manifest(folder)
    for _ in range(2):
        write_scheduler(scheduler_of(bank("dpmpp_2m", Prediction("flow", FLOW))), folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["scheduler"] == ["solver_schedule", "SolverScheduleScheduler"]
        verify_folder(folder)
    own = scheduler_of(bank("unipc_2_bh2", Prediction("flow", FLOW)))
    with pytest.raises(ValueError, match="no single scheduler of diffusers follows the schedules for 5 evaluations"):
        write_stock_scheduler(own, folder)
    calls = write_stock_scheduler(scheduler_of(bank("flow_euler", Prediction("flow", FLOW))), folder)
    assert list(calls[5]) == ["sigmas"] and not (folder / "scheduler" / "solver_schedule.py").exists()
