"""A model schedule as a JSON file that is used with genlight or with plain diffusers.

With genlight, `apply_to_pipeline` puts scheduler and members into a pipeline. One switch of a Wan pipeline needs
neither: see `boundary_ratio`. Without genlight, members of one prediction type take turns as in `PLAIN_USE`, which
needs the file ``solver_schedule.py`` that `write_model_schedule` puts beside the schedule.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from genlight.diffusion import solver_schedule as scheduler_file
from genlight.diffusion.export_scheduler import scheduler_of
from genlight.diffusion.model_schedule import ModelSchedule, solver_schedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import read_scheduler
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.serialization import SolverBank
from genlight.diffusion.solver_schedule import SolverScheduleScheduler
from genlight.errors import UserError
from genlight.io import atomic_write_bytes, atomic_write_json, read_json
from genlight.modules.pipeline_calls import weights_digest
from genlight.modules.scheduled_denoiser import ScheduledDenoiser, largest
from genlight.modules.zoo import Member, ZooEntry, load_zoo
from genlight.modules.zoo_pipelines import OWN, denoiser_key, timestep_reader

MODEL_SCHEDULE = "model_schedule.json"
KIND: Literal["genlight.model_schedule"] = "genlight.model_schedule"
VERSION: Literal[1] = 1
# a pipeline `pipe` of Stable Diffusion, on its device, in the folder of the file; members of another prediction type or
# precision than the primary's are what this leaves out
PLAIN_USE = """\
import json, torch
from diffusers import UNet2DConditionModel
from solver_schedule import SolverScheduleScheduler

file = json.load(open("model_schedule.json"))
def load(m):
    options = {"subfolder": m["subfolder"], "variant": m["variant"], "torch_dtype": getattr(torch, m["dtype"])}
    return UNet2DConditionModel.from_pretrained(m["source"], **options).to(pipe.device).eval()
members = {m["name"]: load(m) for m in file["members"]}
answer = {name: network.forward for name, network in members.items()}

def by_turns(x, timestep, *arguments, **options):
    time = float(torch.as_tensor(timestep).flatten()[0])
    nearest = min(file["evaluations"], key=lambda entry: abs(entry["timestep"] - time))
    return answer[nearest["member"]](x, timestep, *arguments, **options)

pipe.unet = members[file["primary"]]
pipe.unet.forward = by_turns
pipe.scheduler = SolverScheduleScheduler(**file["scheduler"])
steps = len(file["evaluations"])  # pipe(prompt, num_inference_steps=steps)
"""
_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True)
class MemberRecord:
    """Where a member was read from, and what it was.

    Args:
        source, subfolder, variant: as in `ZooEntry`; None for a network that was not read from a folder. A folder is
            absolute, to be found from elsewhere; the subfolder is that of the network, whether it was given or found.
        dtype: of the weights, "float32", "float16" or "bfloat16".
        sha256: of names, types and values of the weights in that precision, see `weights_digest`.
    """

    name: str
    source: str | None
    subfolder: str | None
    variant: str | None
    dtype: str
    prediction_type: str
    sha256: str
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    @staticmethod
    def of(member: Member, prediction: Prediction) -> MemberRecord:
        """The record of a member that was read."""
        source = None if member.root is None else str(member.root.absolute())
        inside = member.folder is not None and member.root is not None and member.folder != member.root
        subfolder = member.folder.relative_to(member.root).as_posix() if inside else None  # type: ignore[union-attr, arg-type]
        if member.entry is not None and not Path(member.entry.source).exists():
            source = member.entry.source  # a hub id says more than a folder of the cache
        variant = None if member.entry is None else member.entry.variant
        kind, digest = prediction.prediction_type, member.sha256
        return MemberRecord(member.name, source, subfolder, variant, _dtype_of(member.network), kind, digest)


@dataclass(frozen=True)
class Evaluation:
    """One network evaluation: who, at which timestep of the network, at λ = ln(α/σ) (None: -∞), in a step of order."""

    member: str
    timestep: float
    half_log_snr: Annotated[float | None, Field(alias="lambda")]
    order: int
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT


@dataclass(frozen=True)
class ModelScheduleFile:
    """What a file holds.

    Args:
        primary: the member whose config and prediction type are the pipeline's.
        members: those that the schedule uses.
        schedule, slots: as they were searched, see `solver_schedule`.
        evaluations: from noise to data.
        scheduler: arguments of `SolverScheduleScheduler`.
        budget, predicted_cost: in the unit of the costs that the search was given.
        scores: what was measured.
        fingerprint: SHA-256 (hex) of schedule, noise schedule, prediction type and weights.
    """

    kind: Literal["genlight.model_schedule"]
    version: Literal[1]
    primary: str
    members: tuple[MemberRecord, ...]
    schedule: ModelSchedule
    slots: int | None
    evaluations: tuple[Evaluation, ...]
    scheduler: dict[str, Any]
    budget: float | None
    predicted_cost: float | None
    scores: dict[str, float]
    fingerprint: str
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    @property
    def nfe(self) -> int:
        """Network evaluations: the num_inference_steps that a pipeline is called with."""
        return len(self.evaluations)

    def build_scheduler(self) -> SolverScheduleScheduler:
        """A fresh scheduler of the schedule."""
        scheduler: SolverScheduleScheduler = SolverScheduleScheduler(**self.scheduler)
        return scheduler


_ADAPTER = TypeAdapter(ModelScheduleFile)


def write_model_schedule(
    path: str | Path,
    schedule: ModelSchedule,
    members: Mapping[str, Member],
    predictions: Mapping[str, Prediction],
    *,
    primary: str | None = None,
    slots: int | None = None,
    budget: float | None = None,
    predicted_cost: float | None = None,
    scores: Mapping[str, float] | None = None,
) -> ModelScheduleFile:
    """Write a schedule, and beside it the file of the scheduler for use without genlight; returns what was written.

    Args:
        members, predictions: of a `Zoo`; those that the schedule does not use are left out.
        primary: of the search, on whose noise schedule the times are. Where it is None, or one that the schedule does
            not use, that of the file is the one with most parameters.

    Raises ValueError for a member that there is not, or a schedule that the noise schedule cannot have.
    """
    unknown = sorted(set(schedule.members) - set(members))
    if unknown:
        raise ValueError(f"schedule: {', '.join(unknown)} is not among the members {', '.join(members)}")
    used = {name: member for name, member in members.items() if name in schedule.members}
    first = primary if primary in used else largest({name: member.network for name, member in used.items()})
    # members may differ in the shift of flow matching: the times are those of the primary of the search
    prediction = Prediction(predictions[first].prediction_type, predictions[primary or first].schedule)
    solver = solver_schedule(schedule, prediction.schedule, slots)
    times = compile_schedule(solver, prediction.schedule).times
    scheduler = scheduler_of(SolverBank.of(prediction, {schedule.nfe: solver}))
    config = json.loads(scheduler.to_json_string())
    records = tuple(MemberRecord.of(member, predictions[name]) for name, member in used.items())
    lambdas = prediction.schedule.half_log_snr(times).tolist()
    rows = zip(
        schedule.members, prediction.schedule.model_timestep(times).tolist(), lambdas, _orders(schedule), strict=True
    )
    file = ModelScheduleFile(
        kind=KIND,
        version=VERSION,
        primary=first,
        members=records,
        schedule=schedule,
        slots=slots,
        evaluations=tuple(Evaluation(name, t, lam if math.isfinite(lam) else None, k) for name, t, lam, k in rows),
        scheduler={key: value for key, value in config.items() if not key.startswith("_")},
        budget=budget,
        predicted_cost=predicted_cost,
        scores=dict(scores or {}),
        fingerprint=_fingerprint(first, records, schedule, slots, config["fingerprint"]["sha256"]),
    )
    path = Path(path)
    module = f"{scheduler_file.MODULE}.py"
    atomic_write_bytes(path.parent / module, Path(scheduler_file.__file__).read_bytes())
    atomic_write_json(path, _ADAPTER.dump_python(file, mode="json", by_alias=True))
    return file


def load_model_schedule(path: str | Path) -> ModelScheduleFile:
    """Read a file of `write_model_schedule`.

    Raises:
        UserError: no such file, of another kind or version, damaged, or changed by hand.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is missing")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        kind = content.get("kind") if isinstance(content, dict) else None
        raise UserError(f"{path} is no model schedule: its kind is {kind!r}, not {KIND!r}")
    if content.get("version") != VERSION:
        raise UserError(f"{path} is of version {content.get('version')!r}; version {VERSION} is known here")
    try:
        file = _ADAPTER.validate_json(json.dumps(content))
        config: Any = file.build_scheduler().config
        sha256 = str(config.fingerprint["sha256"])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: scheduler: {error}") from error
    _check_whole(file, sha256, path)
    return file


def apply_to_pipeline(
    pipe: Any, file: ModelScheduleFile, members: Mapping[str, nn.Module], *, resident: int | None = None
) -> ScheduledDenoiser:
    """Put the scheduler and the members, by turns, into a diffusers pipeline; call it with `file.nfe` steps.

    Args:
        members: the networks by the names that the file has for them; ``pipe.unet`` or the like may be one.
        resident: as in `ScheduledDenoiser`.

    Raises:
        UserError: a member is missing, or has other weights than the schedule was made for.
    """
    for record in file.members:
        if record.name not in members:
            raise UserError(f"members.{record.name} is missing: the schedule uses it (it was {record.source})")
        network = members[record.name]
        if weights_digest(network) != record.sha256:
            found = _dtype_of(network)
            other = f"it is in {found}, not {record.dtype}" if found != record.dtype else f"it was {record.source}"
            raise UserError(f"members.{record.name} has other weights than the schedule was made for: {other}")
    scheduler = file.build_scheduler()
    schedule, _ = read_scheduler(scheduler)
    scheduled = ScheduledDenoiser(
        {record.name: members[record.name] for record in file.members},
        file.primary,
        {record.name: Prediction(record.prediction_type, schedule) for record in file.members},
        resident,
        timestep_reader(pipe),
    )
    scheduled.set_schedule([e.timestep for e in file.evaluations], [e.member for e in file.evaluations])
    setattr(pipe, denoiser_key(pipe), scheduled.eval())
    pipe.scheduler = scheduler
    return scheduled


def attach_model_schedule(pipe: Any, path: str | Path, *, resident: int | None = None) -> ScheduledDenoiser:
    """Put a schedule into the diffusers pipeline that it was searched for, its members read from where they are.

    Call the pipeline with ``num_inference_steps=len(scheduled.schedule)``.

    Args:
        pipe: the pipeline, whose own network the file calls "own".
        path: of a file that `method=oms` wrote for ``module=pipeline``.
        resident: as in `ScheduledDenoiser`.

    Raises:
        UserError: as `load_model_schedule`, `load_zoo` and `apply_to_pipeline`; a pipeline that is offloaded already:
            the other members would stay where they are.
    """
    file = load_model_schedule(path)
    own = getattr(pipe, denoiser_key(pipe))
    if hasattr(own, "_hf_hook"):
        raise UserError("pipe is offloaded already: attach the schedule first, then call enable_model_cpu_offload()")
    entries = {
        record.name: ZooEntry(record.source or record.name, record.subfolder, record.dtype, record.variant)
        for record in file.members
        if record.name != OWN
    }
    found = load_zoo(entries).networks if entries else {}
    for network in found.values() if resident is None else ():
        network.to(own.device)
    return apply_to_pipeline(pipe, file, {OWN: own, **found}, resident=resident)


def boundary_ratio(file: ModelScheduleFile) -> float | None:
    """The `boundary_ratio` of a WanPipeline that makes the same choice; None for other than one switch.

    Its ``transformer`` is the member of the first evaluation, its ``transformer_2`` that of the last.
    """
    switches = [(one, two) for one, two in pairwise(file.evaluations) if one.member != two.member]
    falling = all(one.timestep > two.timestep for one, two in pairwise(file.evaluations))
    if len(switches) != 1 or not falling or "num_train_timesteps" not in file.scheduler:
        return None
    one, two = switches[0]
    return (one.timestep + two.timestep) / 2 / float(file.scheduler["num_train_timesteps"])


def _orders(schedule: ModelSchedule) -> list[int]:
    """Of the step that each evaluation is part of."""
    return list(schedule.orders) or [len(step) for step in schedule.steps for _ in step]


def _check_whole(file: ModelScheduleFile, sha256: str, path: str | Path) -> None:
    names = {record.name for record in file.members}
    members = tuple(evaluation.member for evaluation in file.evaluations)
    if members != file.schedule.members or not names.issuperset(members) or file.primary not in names:
        raise UserError(f"{path}: evaluations, members and schedule do not name the same members")
    expected = _fingerprint(file.primary, file.members, file.schedule, file.slots, sha256)
    if file.fingerprint != expected:
        raise UserError(f"{path}: its fingerprint is {file.fingerprint}, that of its content {expected}")


def _fingerprint(
    primary: str, members: tuple[MemberRecord, ...], schedule: ModelSchedule, slots: int | None, sha256: str
) -> str:
    weights = [(member.name, member.prediction_type, member.sha256) for member in members]
    text = json.dumps([primary, weights, repr(schedule), slots, sha256])
    return hashlib.sha256(text.encode()).hexdigest()


def _dtype_of(network: Any) -> str:
    return str(network.dtype).removeprefix("torch.")
