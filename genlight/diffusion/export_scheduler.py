"""From a bank of solver schedules to a scheduler that plain diffusers loads, and back.

`scheduler_of` makes the `SolverScheduleScheduler` of a bank; `write_scheduler` puts it into a diffusers pipeline
folder, with the file that defines it, so that the folder loads where genlight is not installed. A schedule that a
scheduler of diffusers can follow by itself, given the right timesteps, needs none of this: `stock_form` says which and
how, `write_stock_scheduler` writes it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlight.diffusion import solver_schedule
from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler, read_scheduler
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.levels import levels_of
from genlight.diffusion.solver.serialization import SolverBank, TableRecord, schedule_from_json, schedule_to_json
from genlight.diffusion.solver_schedule import SolverScheduleScheduler
from genlight.io import (
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    read_json,
    remove_path,
    write_manifest,
)

SCHEDULER = "scheduler"
_CONFIG = "scheduler_config.json"
_THEIR_NAMES = {"flow": "flow_prediction"}
_OWN_NAMES = {"flow_prediction": "flow"}
_FAMILIES: dict[str, type[NoiseSchedule]] = {"vp": VPSchedule, "edm": EDMSchedule, "flow": FlowSchedule}
# their constructors build the scheduler anew, as DDIM or PNDM, from its config
_OWN_SCHEDULER = ("DDIMPipeline", "PNDMPipeline")
# diffusers computes its weights in float32, at each step
_EQUAL = 3e-5
# tables of one solver schedule, compiled here and read from a config, agree to this
_RECOMPILED = 1e-9


@dataclass(frozen=True)
class StockForm:
    """A scheduler of diffusers that takes the same steps.

    Args:
        class_name, config: `getattr(diffusers, class_name)(**config)` makes it.
        call: what `set_timesteps`, or a pipeline that passes it on, is called with.
    """

    class_name: str
    config: dict[str, Any]
    call: dict[str, Any]

    def build(self) -> Any:
        """A new scheduler, its timesteps set."""
        import diffusers

        scheduler = getattr(diffusers, self.class_name)(**self.config)
        scheduler.set_timesteps(**self.call)
        return scheduler


def prediction_of(bank: SolverBank) -> Prediction:
    """The noise schedule and prediction type of a bank; ValueError if its fingerprint is not theirs."""
    prediction = Prediction(bank.prediction_type, _FAMILIES[bank.family](**bank.noise_schedule))
    bank.check(prediction)
    return prediction


def scheduler_of(
    bank: SolverBank,
    *,
    integer_timesteps: bool = False,
    scores: Mapping[int, Mapping[str, float]] | None = None,
    setting: Mapping[str, Any] | None = None,
) -> SolverScheduleScheduler:
    """The diffusers scheduler of a bank: its fine-tuned tables, and the compiled schedules where there are none.

    Args:
        integer_timesteps: for networks that look their timesteps up: times between integers are an error.
        scores: by number of evaluations what was measured, kept in the config.
        setting: what else the schedules were searched for (guidance_scale, resolution, mu), kept in the config.

    Raises ValueError for an empty bank, timesteps that are not integers where those are asked for, and an analytical
    first step that diffusers' pipelines cannot make (a mean image, or any on flow matching).
    """
    prediction = prediction_of(bank)
    kind = _THEIR_NAMES.get(prediction.prediction_type, prediction.prediction_type)
    process = {"family": bank.family, "prediction_type": kind, "noise_schedule": prediction.schedule.definition()}
    schedules = {
        str(nfe): _entry(bank, nfe, prediction, integer_timesteps) | {"score": dict((scores or {}).get(nfe, {}))}
        for nfe in sorted({*bank.schedules, *bank.tables})
    }
    if not schedules:
        raise ValueError("solver bank: it holds no schedules")
    return SolverScheduleScheduler(
        family=bank.family,
        prediction_type=kind,
        use_flow_sigmas=bank.family == "flow",
        schedules=schedules,
        fingerprint=process | {"sha256": bank.fingerprint},
        setting=dict(setting) if setting else None,
        **_named_as_in_diffusers(bank),
    )


def bank_of(scheduler: SolverScheduleScheduler) -> SolverBank:
    """The bank of a scheduler.

    Raises ValueError if a table is not what its decisions compile to.
    """
    config: Any = scheduler.config
    noise_schedule = _FAMILIES[config.family](**config.fingerprint["noise_schedule"])
    kind = _OWN_NAMES.get(config.prediction_type, config.prediction_type)
    schedules, tables = {}, {}
    for name, entry in config.schedules.items():
        nfe, table = int(name), _table_of(entry, noise_schedule)
        if entry.get("decisions") is not None:
            schedules[nfe] = schedule_from_json(json.dumps(entry["decisions"]))
        if entry.get("fine_tuned") or nfe not in schedules:
            tables[nfe] = TableRecord.of(table)
            continue
        compiled = compile_schedule(schedules[nfe], noise_schedule, basis=table.basis)
        off = (compiled.weights - table.weights).abs().max().item()
        if off > _RECOMPILED * max(1.0, table.weights.abs().max().item()):
            raise ValueError(f"schedules.{nfe}: its table is not what its decisions compile to, by {off:.3g}")
    bank = SolverBank.of(Prediction(kind, noise_schedule), schedules)
    return SolverBank(**{**vars(bank), "tables": tables})


def write_scheduler(scheduler: SolverScheduleScheduler, folder: str | Path) -> None:
    """Make a scheduler that of a diffusers pipeline folder: its config, the file that defines it, and the entry.

    The folder then loads with ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.

    Raises ValueError if the folder is none of a pipeline, is of a pipeline that puts a scheduler of its own in place of
    any other, or its present scheduler states another noise schedule or prediction type: that is what the network was
    trained on.
    """
    folder = Path(folder)
    _check_model(scheduler, folder)
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline in _OWN_SCHEDULER:
        raise ValueError(f"{folder}: a {pipeline} replaces every scheduler by one of its own; use a DDPMPipeline")
    module = solver_schedule.MODULE
    atomic_write_bytes(folder / SCHEDULER / f"{module}.py", Path(solver_schedule.__file__).read_bytes())
    atomic_write_text(folder / SCHEDULER / _CONFIG, scheduler.to_json_string())
    _write_entry(folder, [module, type(scheduler).__name__])


def write_stock_scheduler(scheduler: SolverScheduleScheduler, folder: str | Path) -> dict[int, dict[str, Any]]:
    """Make the stock scheduler that takes the same steps that of a pipeline folder; no custom code is then needed.

    Returns:
        By number of evaluations, what a pipeline must be called with: num_inference_steps, timesteps or sigmas.

    Raises ValueError as `write_scheduler` does, and if no single scheduler of diffusers follows all schedules.
    """
    folder = Path(folder)
    _check_model(scheduler, folder)
    forms = {nfe: list(stock_forms(scheduler, nfe)) for nfe in scheduler.available_steps}
    first = forms[scheduler.available_steps[0]]
    for form in first:
        same = {
            nfe: [f for f in found if (f.class_name, f.config) == (form.class_name, form.config)]
            for nfe, found in forms.items()
        }
        if all(same.values()):
            atomic_write_text(folder / SCHEDULER / _CONFIG, form.build().to_json_string())
            _write_entry(folder, ["diffusers", form.class_name])
            remove_path(folder / SCHEDULER / f"{solver_schedule.MODULE}.py")
            return {nfe: found[0].call for nfe, found in same.items()}
    raise ValueError(
        f"no single scheduler of diffusers follows the schedules for {', '.join(str(n) for n in forms)} evaluations; "
        "use write_scheduler"
    )


def write_stock_form(form: StockForm, pipeline: Path, folder: Path) -> None:
    """Write what, copied over a folder of a diffusers pipeline, makes the form its scheduler; no custom code is needed.

    Beside scheduler and `model_index.json` lies `call.json`: what a pipeline must be called with.

    Args:
        form: that takes the steps of a searched schedule.
        pipeline: the folder with the searched schedules; not changed.
        folder: where to.
    """
    index = read_json(pipeline / "model_index.json")
    atomic_write_text(folder / SCHEDULER / _CONFIG, form.build().to_json_string())
    atomic_write_json(folder / "model_index.json", index | {SCHEDULER: ["diffusers", form.class_name]})
    atomic_write_json(folder / "call.json", form.call)


def why_no_stock_form(scheduler: SolverScheduleScheduler, nfe: int) -> str:
    """Of a schedule for which `stock_form` finds none, in words."""
    config: Any = scheduler.config
    if config.family == "vp" and any(t != round(t) for t in config.schedules[str(nfe)]["timesteps"]):
        return "its timesteps are no whole numbers (method.integer_times)"
    return "DDIM, multistep DPM-Solver and flow-matching Euler take others"


def stock_form(scheduler: SolverScheduleScheduler, nfe: int) -> StockForm | None:
    """The first of `stock_forms`, None if there is none."""
    return next(stock_forms(scheduler, nfe), None)


def stock_forms(scheduler: SolverScheduleScheduler, nfe: int) -> Iterator[StockForm]:
    """The schedulers of diffusers that take the steps of the schedule with `nfe` evaluations.

    Found by trying DDIM, multistep DPM-Solver and FlowMatchEuler with their options, on random outputs: a form is given
    if its timesteps are the schedule's and every point is, to float32 rounding.
    """
    scheduler = SolverScheduleScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(nfe)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1, 2, 16, generator=generator) for _ in range(nfe + 1)]
    points = _points(scheduler, values)
    for form in _candidates(scheduler, nfe):
        try:
            other = form.build()
        except (ValueError, AssertionError):
            continue  # a combination that this class refuses
        times = torch.as_tensor(other.timesteps).double()
        if times.shape != (nfe,) or not torch.allclose(times, scheduler.timesteps.double(), rtol=1e-6, atol=1e-4):
            continue
        theirs = _points(other, values)
        if all((a - b).abs().max() <= _EQUAL * max(1.0, a.abs().max().item()) for a, b in zip(points, theirs)):
            yield form


def _candidates(scheduler: SolverScheduleScheduler, nfe: int) -> Iterator[StockForm]:
    config: Any = scheduler.config
    kind = _OWN_NAMES.get(config.prediction_type, config.prediction_type)
    plain = _FAMILIES[config.family](**config.fingerprint["noise_schedule"])
    even: dict[str, Any] = {"num_inference_steps": nfe}
    options: dict[str, Any]
    if config.family == "flow" and kind == "flow":
        yield from _form("FlowMatchEulerDiscreteScheduler", plain, kind, even)
        # diffusers shifts the sigmas that it is given
        unshifted = FlowSchedule(config.num_train_timesteps)
        yield from _form("FlowMatchEulerDiscreteScheduler", unshifted, kind, {"sigmas": scheduler.sigmas[:-1].tolist()})
    if config.family == "vp":
        for spacing in ("leading", "trailing", "linspace"):
            for to_one, offset in ((True, 0), (True, 1), (False, 0), (False, 1)):
                options = {"clip_sample": False, "timestep_spacing": spacing}
                options |= {"set_alpha_to_one": to_one, "steps_offset": offset}
                yield from _form("DDIMScheduler", plain, kind, even, **options)
        even = {"timesteps": [round(float(t)) for t in scheduler.timesteps]}
    if config.family == "edm":
        for order in (1, 2, 3):
            for grid in ("karras", "exponential"):
                options = {"solver_order": order, "sigma_schedule": grid}
                yield from _form("EDMDPMSolverMultistepScheduler", plain, kind, even, **options)
        return
    final = "zero" if scheduler.sigmas[-1] == 0 else "sigma_min"
    for algorithm in ("dpmsolver++", "dpmsolver"):
        for order in (1, 2, 3):
            for solver in ("midpoint", "heun") if order > 1 else ("midpoint",):
                for lower in (True, False):
                    options = {"solver_order": order, "algorithm_type": algorithm, "solver_type": solver}
                    options |= {"lower_order_final": lower, "final_sigmas_type": final}
                    yield from _form("DPMSolverMultistepScheduler", plain, kind, even, **options)


def _form(
    name: str, schedule: NoiseSchedule, kind: str, call: dict[str, Any], /, **options: Any
) -> Iterator[StockForm]:
    try:
        scheduler = build_scheduler(name, schedule, kind, **options)
    except (ValueError, NotImplementedError):
        return  # a noise schedule or prediction type that this class does not know
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    yield StockForm(name, config, call)


def _points(scheduler: Any, values: list[Tensor]) -> list[Tensor]:
    """Where a scheduler goes from the first of `values`, its outputs being the others."""
    x, points = values[0] * float(scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else 1.0), []
    for timestep, output in zip(scheduler.timesteps, values[1:]):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, timestep)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
        points.append(x)
    return points


def _entry(bank: SolverBank, nfe: int, prediction: Prediction, integers: bool) -> dict[str, Any]:
    """One schedule in the form of the scheduler's config."""
    schedule, record, noise_schedule = bank.schedules.get(nfe), bank.tables.get(nfe), prediction.schedule
    table = record.table() if record is not None else compile_schedule(bank.schedule(nfe), noise_schedule)
    first = table.weights[0, 0].item()
    if bool(table.mean_weights.any()) or (bank.family == "flow" and abs(first * table.initial_scale - 1) > 1e-6):
        raise ValueError(
            f"schedules.{nfe}.afs: an analytical first step with a mean image, or on flow matching, cannot be made "
            "inside the pipelines of diffusers; they start from standard normal noise"
        )
    timesteps: list[float] = noise_schedule.model_timestep(table.times).tolist()
    fraction = next((t for t in timesteps if t != round(t)), None)
    if integers and fraction is not None:
        raise ValueError(
            f"schedules.{nfe}: timestep {fraction:g} is not an integer; search with whole timesteps, or leave "
            "integer_timesteps out for a network that takes fractions"
        )
    return {
        "timesteps": timesteps,
        "sigmas": _sigmas(table, noise_schedule, schedule if record is None else None),
        "table": [row[: i + 1] for i, row in enumerate(table.weights.tolist())],
        "basis": table.basis,
        "initial_scale": table.initial_scale,
        "decisions": None if schedule is None else json.loads(schedule_to_json(schedule)),
        "fine_tuned": record is not None,
    }


def _sigmas(table: SolverTable, noise_schedule: NoiseSchedule, schedule: SolverSchedule | None) -> list[float | None]:
    """σ/α, for flow matching σ, at the evaluations and at the end; None where infinite."""
    alpha, sigma = noise_schedule.alpha(table.times).tolist(), noise_schedule.sigma(table.times).tolist()
    if schedule is not None:
        last = levels_of(schedule, noise_schedule)[-1]
        alpha, sigma = [*alpha, float(last.alpha)], [*sigma, float(last.sigma)]
    else:  # of a fine-tuned table: what the last row makes of data and noise that the outputs tell exactly
        row, first = table.weights[-1].tolist(), table.weights[0, 0].item()
        ratio, outputs = row[0] / first, sum(row[1:])
        alpha.append(ratio * alpha[0] + (outputs if table.basis == "data" else 0.0))
        sigma.append(ratio * sigma[0] + (outputs if table.basis == "noise" else 0.0))
    if noise_schedule.family == "flow":
        return [float(s) for s in sigma]
    return [None if a == 0 else s / a for a, s in zip(alpha, sigma)]


def _table_of(entry: Mapping[str, Any], noise_schedule: NoiseSchedule) -> SolverTable:
    """The table in a scheduler's config."""
    count = len(entry["timesteps"])
    weights = [[*row, *[0.0] * (count + 1 - len(row))] for row in entry["table"]]
    times = torch.tensor(entry["timesteps"], dtype=torch.float64)
    if isinstance(noise_schedule, FlowSchedule):
        times = times / noise_schedule.num_train_timesteps
    elif noise_schedule.family == "edm":
        times = torch.exp(4 * times).clamp(noise_schedule.t_min, noise_schedule.t_max)
    return SolverTable(
        torch.tensor(weights, dtype=torch.float64),
        torch.zeros(count + 1, dtype=torch.float64),
        times,
        entry["basis"],
        entry["initial_scale"],
    )


def _named_as_in_diffusers(bank: SolverBank) -> dict[str, Any]:
    names = {"rescale_zero_terminal_snr": "rescale_betas_zero_snr", "shift": "flow_shift"}
    return {names.get(name, name): value for name, value in bank.noise_schedule.items()}


def _check_model(scheduler: SolverScheduleScheduler, folder: Path) -> None:
    """Raise ValueError unless `folder` is a pipeline whose scheduler states the same process and prediction type."""
    path = folder / SCHEDULER / _CONFIG
    if not (folder / "model_index.json").is_file() or not path.is_file():
        raise ValueError(f"{folder}: not a folder of a diffusers pipeline with a scheduler")
    config = json.loads(path.read_text(encoding="utf-8"))
    name, mine = str(config.get("_class_name")), scheduler.config["fingerprint"]
    if name == type(scheduler).__name__:
        theirs = config["fingerprint"]
    else:
        import diffusers

        if not hasattr(diffusers, name):
            raise ValueError(f"{path}: {name} is no scheduler of diffusers")
        noise_schedule, kind = read_scheduler(getattr(diffusers, name).from_config(config))
        definition, kind = noise_schedule.definition(), _THEIR_NAMES.get(kind, kind)
        theirs = {"family": noise_schedule.family, "prediction_type": kind, "noise_schedule": definition}
    for key in ("family", "prediction_type", "noise_schedule"):
        # the shift of flow matching moves times, which the schedule has its own of, and not the process
        a, b = (
            {k: v for k, v in x[key].items() if k != "shift"} if key == "noise_schedule" else x[key]
            for x in (mine, theirs)
        )
        if a != b:
            raise ValueError(f"{path}: the schedules were searched for {key} = {a!r}, but the model has {b!r}")


def _write_entry(folder: Path, entry: list[str]) -> None:
    index = read_json(folder / "model_index.json")
    atomic_write_json(folder / "model_index.json", index | {SCHEDULER: entry})
    if (folder / "manifest.json").is_file():
        write_manifest(folder)
