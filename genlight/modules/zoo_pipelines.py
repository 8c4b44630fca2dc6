"""Further denoisers beside that of a diffusers pipeline, by turns in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import read_scheduler
from genlight.errors import UserError
from genlight.modules.scheduled_denoiser import ScheduledDenoiser
from genlight.modules.zoo import COMPONENTS, Member, Zoo, ZooEntry, class_rows, load_zoo

# the name of the pipeline's own network among the members
OWN = "own"
# pipelines that give their network t/1000 for the timestep t of their scheduler, by the beginning of their names
_FRACTIONS = (
    "AuraFlow",
    "BriaFibo2",
    "Chroma",
    "Flux",
    "Krea2",
    "LongCat",
    "NucleusMoE",
    "Ovis",
    "PRX",
    "QwenImage",
    "VisualCloze",
)
# and (1000 - t)/1000
_REVERSED = ("Lumina", "ZImage")


def denoiser_key(pipe: Any) -> str:
    """The name of a pipeline's denoising network: "transformer", "unet" or "prior".

    Raises:
        UserError: it has none, or two that it switches between by itself.
    """
    if getattr(pipe, "transformer_2", None) is not None:
        raise UserError(
            f"{type(pipe).__name__} switches between transformer and transformer_2 by itself: leave module.members "
            "empty, or take the one away and make it a member"
        )
    for key in COMPONENTS:
        if getattr(pipe, key, None) is not None:
            return key
    raise UserError(f"{type(pipe).__name__} has none of {', '.join(COMPONENTS)} for members to take turns with")


def timestep_reader(pipe: Any) -> Callable[[float], float] | None:
    """The timestep of the scheduler of a pipeline, of what it gives its network; None where the two are the same."""
    name = type(pipe).__name__
    if name.startswith(_FRACTIONS):
        return lambda timestep: 1000 * timestep
    if name.startswith(_REVERSED):
        return lambda timestep: 1000 - 1000 * timestep
    return None


def add_members(
    pipe: Any, entries: Mapping[str, Any], source: str, variant: str | None = None, resident: int | None = None
) -> Zoo | None:
    """Read members (see `load_zoo`) and put them and the pipeline's own network, called "own", in its place by turns.

    "own" is the primary. Members of dtype "auto" take its precision.

    Args:
        entries: the members, by name; where there are none, nothing is done.
        source, variant: folder or hub id of the pipeline, and ending of its files: where "own" is from.
        resident: as in `ScheduledDenoiser`; members are read into the memory of the host, and stay there until called.

    Raises:
        UserError: as `load_zoo`, and for a pipeline whose scheduler is of a kind that is not known.
    """
    if not entries:
        return None
    key = denoiser_key(pipe)
    network = getattr(pipe, key)
    if OWN in entries:
        raise UserError(f"members.{OWN}: the name is taken, it is that of the pipeline's own network")
    try:
        schedule, kind = read_scheduler(pipe.scheduler)
    except (KeyError, ValueError) as error:
        raise UserError(f"members: the scheduler of the {type(pipe).__name__} cannot be replaced: {error}") from error
    vae = getattr(pipe, "vae", None)
    own = Member(
        OWN,
        network,
        ZooEntry(source, variant=variant),
        Path(source) / key,
        Path(source),
        prediction=Prediction(kind, schedule),
        vae=None if vae is None else dict(vae.config),
        num_classes=class_rows(network),
    )
    zoo = load_zoo(entries, dtype=network.dtype, beside=[own])
    for member in zoo.members.values() if resident is None else ():
        member.network.to(network.device)
    scheduled = ScheduledDenoiser(zoo.networks, OWN, zoo.predictions, resident, timestep_reader(pipe))
    setattr(pipe, key, scheduled.eval())
    return zoo


def scheduled_of(pipe: Any) -> ScheduledDenoiser | None:
    """The members that take turns in a pipeline; None where it has one network."""
    for key in COMPONENTS:
        if isinstance(found := getattr(pipe, key, None), ScheduledDenoiser):
            return found
    return None


def schedule_members(pipe: Any, timesteps: Sequence[float], names: Sequence[str]) -> None:
    """Set who answers when, see `ScheduledDenoiser.set_schedule`; UserError for a pipeline with one network."""
    scheduled = scheduled_of(pipe)
    if scheduled is None:
        raise UserError("module.members is empty: name the denoisers that are to take turns")
    scheduled.set_schedule(timesteps, names)


@contextmanager
def by_turns(pipe: Any, active: bool) -> Iterator[None]:
    """Within it members take turns as scheduled if `active`, else the primary answers always."""
    scheduled = scheduled_of(pipe)
    with nullcontext() if scheduled is None else scheduled.primary_only(not active):
        yield


@contextmanager
def own_network(pipe: Any) -> Iterator[None]:
    """Within it the pipeline has its primary network alone, in the form in which it can be saved."""
    scheduled = scheduled_of(pipe)
    if scheduled is None:
        yield
        return
    key = denoiser_key(pipe)
    setattr(pipe, key, scheduled.members[scheduled.primary])
    try:
        yield
    finally:
        setattr(pipe, key, scheduled)
