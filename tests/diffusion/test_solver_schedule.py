"""The scheduler by itself: equal to genlight's own sampling, strict about what it is given, quick."""

import ast
import copy
import json
import pickle
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusion.scheduler_runs import EDM, EPS, FLOW, VP, ZERO_SNR, bank, close, model, noise, run

from genlight.diffusion import solver_schedule
from genlight.diffusion.export_scheduler import (
    bank_of,
    scheduler_of,
)
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.sample import sample
from genlight.diffusion.solver.serialization import SolverBank, TableRecord
from genlight.diffusion.solver_schedule import SolverScheduleScheduler

CASES = [
    *[Prediction(kind, VP) for kind in ("epsilon", "v_prediction", "sample")],
    *[Prediction(kind, ZERO_SNR) for kind in ("v_prediction", "sample")],
    *[Prediction(kind, EDM) for kind in ("edm", "epsilon")],
    *[Prediction(kind, FLOW) for kind in ("flow", "v_prediction", "sample")],
]
SOLVERS = ("ddim", "dpmpp_2m", "dpmpp_3m_exact", "dpmpp_3s", "unipc_3_bh2", "heun", "sa_solver", "plms", "deis_3")


@pytest.mark.parametrize("prediction", CASES, ids=lambda p: f"{p.schedule.family}-{p.prediction_type}")
def test_equals_genlights_own_sampling(prediction: Prediction) -> None:
    """Every prediction type and family; multistep, singlestep, correctors, repeated timesteps."""
    for name in SOLVERS:
        try:
            schedule = named_schedule(name, prediction.schedule, 9)
            table = compile_schedule(schedule, prediction.schedule)
        except ValueError:
            assert name in ("plms", "deis_3", "heun", "dpmpp_3s", "unipc_3_bh2")
            assert prediction.schedule.alpha(prediction.schedule.t_max) == 0
            continue
        one = SolverBank.of(prediction, {9: schedule})
        scheduler = scheduler_of(one)
        close(run(scheduler, 9, noise()), sample(model, noise(), table, prediction))
        assert len(scheduler.timesteps) == 9 and len(scheduler.sigmas) == 10 and scheduler.order == 1
        assert scheduler._history == {}
        assert bank_of(scheduler) == one


def test_any_rank_and_precision() -> None:
    scheduler = scheduler_of(bank())
    flat = run(scheduler, 5, noise(2, 24))
    for shape in ((2, 3, 8), (2, 3, 2, 4), (2, 3, 2, 2, 2)):
        assert torch.equal(run(scheduler, 5, noise(2, 24).reshape(shape)), flat.reshape(shape))
    wide = run(scheduler, 5, noise(2, 24).double())
    assert wide.dtype == torch.float64
    close(wide.float(), flat)
    for dtype in (torch.float16, torch.bfloat16):
        half = run(scheduler, 5, noise(2, 24).to(dtype))
        assert half.dtype == dtype
        close(half.float(), flat, 0.05)


def test_half_precision_sums_in_float32() -> None:
    """One step from float16: equal to the float32 sum, rounded once."""
    scheduler, x, output = scheduler_of(bank()), noise(2, 8).half(), noise(2, 8).flip(0).half()
    scheduler.set_timesteps(5)
    found = scheduler.step(output, scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(5)
    exact = scheduler.step(output.float(), scheduler.timesteps[0], x.float()).prev_sample
    assert torch.equal(found, exact.half())


def test_history_holds_no_more_than_the_solver_needs() -> None:
    scheduler = scheduler_of(bank("dpmpp_2m", counts=(12,)))
    scheduler.set_timesteps(12)
    x, held = noise(), []
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, return_dict=False)[0]
        held.append(len(scheduler._history))
    assert max(held) == 1 and held[-1] == 0


def test_step_is_not_slower_than_that_of_diffusers() -> None:
    stock = build_scheduler("DPMSolverMultistepScheduler", VP, "epsilon", solver_order=2)
    ours, x, best = scheduler_of(bank(counts=(20,))), noise(1, 4, 32, 32), {}
    for _ in range(8):
        for scheduler in (stock, ours):
            scheduler.set_timesteps(20)
            start = time.perf_counter()
            for t in scheduler.timesteps:
                scheduler.step(x, t, x, return_dict=False)
            best[scheduler] = min(best.get(scheduler, 9.0), time.perf_counter() - start)
    assert best[ours] <= best[stock]


def test_learned_variance_is_dropped() -> None:
    scheduler = scheduler_of(bank())
    expected = run(scheduler, 5, noise(2, 3, 4))
    found = run(scheduler, 5, noise(2, 3, 4), lambda x, t: torch.cat([model(x, t), torch.ones_like(x)], dim=1))
    assert torch.equal(found, expected)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 9, 4\), which does not fit \(2, 3, 4\)"):
        scheduler.step(noise(2, 9, 4), scheduler.timesteps[0], noise(2, 3, 4))


def test_gradients_pass() -> None:
    scheduler = scheduler_of(bank("unipc_2_bh2"))
    start = noise().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(scheduler, 5, x), [start])


def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path: Path) -> None:
    counts = (4, 6, 9)
    scheduler = scheduler_of(bank("unipc_3_bh2", counts=counts), scores={6: {"rmse": 0.1}}, setting={"guidance": 3})
    scheduler.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scheduler_config.json", "solver_schedule.py"]
    loaded = SolverScheduleScheduler.from_pretrained(tmp_path)
    public = [{k: v for k, v in each.config.items() if k[0] != "_"} for each in (scheduler, loaded)]
    assert public[0] == public[1]
    for other in (loaded, SolverScheduleScheduler.from_config(scheduler.config), copy.deepcopy(scheduler)):
        for steps in counts:
            assert torch.equal(run(other, steps, noise()), run(scheduler, steps, noise()))
    assert loaded.available_steps == list(counts)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("scheduler_config.json", "solver_schedule.py"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()
    json.loads((tmp_path / "scheduler_config.json").read_text(), parse_constant=pytest.fail)  # no Infinity, no NaN
    assert bank_of(loaded) == bank("unipc_3_bh2", counts=counts)
    with_state = pickle.loads(pickle.dumps(scheduler))  # noqa: S301 - made one line above
    assert torch.equal(run(with_state, 4, noise()), run(scheduler, 4, noise()))


def test_zero_terminal_snr_survives_json(tmp_path: Path) -> None:
    prediction = Prediction("v_prediction", ZERO_SNR)
    scheduler = scheduler_of(bank(prediction=prediction))
    scheduler.save_pretrained(tmp_path)
    loaded = SolverScheduleScheduler.from_pretrained(tmp_path)
    assert loaded.config.schedules["5"]["sigmas"][0] is None and loaded.sigmas[0] == float("inf")
    assert torch.equal(run(loaded, 5, noise()), run(scheduler, 5, noise()))
    ones = torch.ones(1, 3)
    assert torch.equal(loaded.add_noise(ones, 2 * ones, torch.tensor([999])), 2 * ones)


def _config(scheduler: SolverScheduleScheduler | None = None, **changes: Any) -> dict[str, Any]:
    config = json.loads((scheduler or scheduler_of(bank())).to_json_string())
    return {**config, **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prediction_type": "v_prediction"}, "searched for prediction_type = 'epsilon', but this config says 'v_pre"),
        ({"family": "edm"}, "searched for family = 'vp', but this config says 'edm'"),
        ({"beta_end": 0.02}, r"searched for noise_schedule = .*0.012.*, but this config says .*0.02"),
        ({"num_train_timesteps": 500}, "searched for noise_schedule"),
        ({"rescale_betas_zero_snr": True}, "searched for noise_schedule"),
        ({"fingerprint": None}, "searched for family = None"),
        ({"schedules": {}}, "schedules: this config holds none"),
        ({"schema_version": 2}, "schema_version = 2: this file reads version 1"),
        ({"prediction_type": "noise"}, "prediction_type = 'noise' is not known"),
    ],
)
def test_another_process_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SolverScheduleScheduler.from_config(_config(**changes))
    assert "\n" not in str(error.value)


def test_fingerprint_is_that_of_the_bank() -> None:
    for prediction in CASES:
        one = bank("ddim", prediction)
        scheduler = scheduler_of(one)
        assert scheduler.config.fingerprint["sha256"] == one.fingerprint
    changed = _config()
    changed["fingerprint"]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="searched for sha256 = '000"):
        SolverScheduleScheduler.from_config(changed)


def test_a_stock_config_holds_no_schedules() -> None:
    with pytest.raises(ValueError, match="schedules: this config holds none"):
        SolverScheduleScheduler.from_config(DDIMScheduler().config)


def test_back_to_a_stock_scheduler() -> None:
    """The config states the noise schedule in the words of diffusers."""
    stock = DPMSolverMultistepScheduler.from_config(scheduler_of(bank()).config)
    expected = build_scheduler("DPMSolverMultistepScheduler", VP, "epsilon")
    assert torch.equal(stock.alphas_cumprod, expected.alphas_cumprod)
    flow = DPMSolverMultistepScheduler.from_config(scheduler_of(bank("ddim", Prediction("flow", FLOW))).config)
    assert flow.config.use_flow_sigmas and flow.config.flow_shift == 3.0
    assert flow.config.prediction_type == "flow_prediction"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda e: e["table"].pop(), "schedules.5: it needs 5 timesteps, 6 sigmas and rows"),
        (lambda e: e["table"][2].append(0.1), "schedules.5: it needs"),
        (lambda e: e["timesteps"].pop(), "schedules.5: it needs"),
        (lambda e: e["table"][1].__setitem__(0, float("nan")), "must be finite"),
        (lambda e: e["table"][0].__setitem__(0, 0.0), "the first weight not zero"),
        (lambda e: e["timesteps"].__setitem__(1, 100.0), "at timestep 100 it was made for sigma = "),
        (lambda e: e["timesteps"].__setitem__(1, 1000.0), "are not all in 0 … 999"),
        (lambda e: e.__setitem__("basis", "velocity"), "does not determine the velocity"),
    ],
)
def test_damaged_schedules_are_refused(edit: Any, message: str) -> None:
    config = _config()
    edit(config["schedules"]["5"])
    with pytest.raises(ValueError, match=message):
        SolverScheduleScheduler.from_config(config)


def test_outputs_that_do_not_determine_the_data_are_refused() -> None:
    with pytest.raises(ValueError, match="epsilon does not determine the data at alpha = 0"):
        scheduler_of(bank("ddim", Prediction("epsilon", FLOW)))


def test_misuse_of_the_loop() -> None:
    scheduler = scheduler_of(bank())
    with pytest.raises(RuntimeError, match="set_timesteps must be called"):
        scheduler.step(noise(), 999, noise())
    run(scheduler, 5, noise())
    assert scheduler.step_index == 5
    with pytest.raises(RuntimeError, match="all 5 steps are made"):
        scheduler.step(noise(), 0, noise())
    scheduler.set_timesteps(5)
    assert scheduler.step_index is None and scheduler.begin_index is None
    with pytest.raises(ValueError, match=r"timestep = .* where the first is 999: .* img2img needs strength = 1"):
        scheduler.step(noise(), scheduler.timesteps[2], noise())
    with pytest.raises(ValueError, match=r"begin_index = 2: .* img2img needs strength = 1"):
        scheduler.set_begin_index(2)
    scheduler.set_begin_index(0)
    assert scheduler.begin_index == 0
    with pytest.raises(ValueError, match="num_inference_steps = None: there are schedules for 5 only"):
        scheduler.set_timesteps()


def test_add_noise_as_in_diffusers() -> None:
    x, eps = noise(3, 2, 4, 4), noise(3, 2, 4, 4).flip(0)
    ours, stock = scheduler_of(bank()), build_scheduler("DDIMScheduler", VP, "epsilon")
    times = torch.tensor([0, 417, 999])
    close(ours.add_noise(x, eps, times), stock.add_noise(x, eps, times), 1e-6)
    assert torch.equal(ours.alphas_cumprod, stock.alphas_cumprod) and len(ours) == len(stock) == 1000
    with pytest.raises(ValueError, match="timesteps: 0 … 1000 are not all in 0 … 999"):
        ours.add_noise(x, eps, torch.tensor([0, 1, 1000]))
    flow, euler = scheduler_of(bank("ddim", Prediction("flow", FLOW))), FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(4)
    close(flow.scale_noise(x, euler.timesteps[:3], eps), euler.scale_noise(x, euler.timesteps[:3], eps), 1e-6)
    edm = scheduler_of(bank("ddim", Prediction("edm", EDM)))
    times = torch.log(torch.tensor([0.1, 2.0, 80.0])) / 4
    close(edm.add_noise(x, eps, times), x + torch.tensor([0.1, 2.0, 80.0]).reshape(3, 1, 1, 1) * eps, 1e-5)


def test_edm_scales_its_input_and_noise() -> None:
    scheduler = scheduler_of(bank("heun", Prediction("edm", EDM)))
    scheduler.set_timesteps(5)
    assert scheduler.init_noise_sigma == pytest.approx((80**2 + 1) ** 0.5)
    for t in scheduler.timesteps:
        sigma = torch.exp(4 * t)
        scaled = scheduler.scale_model_input(torch.ones(1, 1), t)
        assert scaled.item() == pytest.approx(1 / (sigma**2 + 0.25).sqrt().item(), rel=1e-5)
        scheduler.step(torch.zeros(1, 1), t, torch.ones(1, 1))


@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("first_column", ["free", "with zeros"])
def test_any_table_is_summed(basis: Any, first_column: str) -> None:
    """Fine-tuned tables need not be of a solver: then the start of the sampling stays in the sum."""
    weights = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).tril()
    if first_column == "with zeros":
        weights[2, 0] = weights[5, 0] = 0.0
    times = torch.tensor([999.0, 800.5, 610.0, 300.0, 20.0], dtype=torch.float64)
    table = SolverTable(weights, torch.zeros(6, dtype=torch.float64), times, basis, 1.0)
    one = replace(bank(), tables={5: TableRecord.of(table)})
    scheduler = scheduler_of(one)
    assert scheduler.config.schedules["5"]["fine_tuned"]
    close(run(scheduler, 5, noise()), sample(model, noise(), table, EPS))
    assert bank_of(scheduler) == one
    assert bank_of(scheduler_of(replace(one, schedules={}))).tables == one.tables


def test_the_file_stands_alone() -> None:
    tree = ast.parse(Path(solver_schedule.__file__).read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            names.add(node.module.split(".")[0])
    assert {name for name in names if name not in sys.stdlib_module_names} == {"torch", "numpy", "diffusers"}
