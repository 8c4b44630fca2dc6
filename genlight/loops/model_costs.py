"""What one evaluation by each member of a zoo costs: all that its network is asked in a step, guidance included.

In milliseconds what lies around the networks is a part of it: a sampler makes a step, and begins and ends a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genlight.diffusion.model_schedule import ModelSchedule
from genlight.errors import UserError
from genlight.modules.pretrained import first_line
from genlight.modules.scheduled_denoiser import ScheduledDenoiser
from genlight.reports.latency import cost_key, measure_in_turn, profile_members
from genlight.reports.member_costs import CostKey, MemberCosts, Unit
from genlight.search.spaces.model_schedule import ModelScheduleSpace

# evaluations of two schedules by the cheapest member, whose times say what lies around its network
_FEW, _SEVERAL = 1, 4
# share of all timesteps by which pipelines in half precision may round them
_NEAR = 0.01


def member_costs(module: Any, rows: int, unit: Unit) -> tuple[MemberCosts, dict[str, str]]:
    """Costs of the members that work, and why the others fail, by name.

    Each member samples in one evaluation; the calls of networks in it are made again and timed: two where a pipeline
    calls its network for each half of the guidance, one with twice the rows where it asks both at once.

    Args:
        module: with members that take turns: `ZooModule`, or `PipelineModule` with members.
        rows: samples.
        unit: see `profile_members`.

    Raises:
        UserError: no member works.
    """
    failed: dict[str, str] = {}
    steps: dict[str, _Step] = {}
    space = ModelScheduleSpace(module.prediction.schedule, dict.fromkeys(module.members, 1.0))
    for name in module.members:
        try:
            steps[name] = _recorded(module, space, name, rows)
        except Exception as error:  # whatever a network raises
            _blame(module.scheduled, error, failed)
    while steps:
        try:
            found = profile_members(steps, _inputs(module), rows, module.device, unit=unit)
            return _with_overhead(found, module, steps, space, rows) if unit == "ms" else found, failed
        except Exception as error:
            _blame(module.scheduled, error, failed)
        steps = {name: step for name, step in steps.items() if name not in failed}
    raise UserError(f"no member works: {', '.join(f'{name}: {reason}' for name, reason in failed.items())}")


def wanted_key(module: Any, rows: int, device: torch.device | str) -> CostKey:
    """What costs must have been measured for, to be those of this module."""
    return cost_key(rows, module.sample_shape, module.scheduled.dtype, device)


def times_of(
    module: Any, space: ModelScheduleSpace, schedules: Sequence[ModelSchedule], rows: int, costs: MemberCosts
) -> tuple[list[float], MemberCosts]:
    """Milliseconds of one batch by each schedule, and the costs of their members measured again by turns with them.

    Costs in work stay as they are.
    """
    pieces: dict[Hashable, Callable[[], Callable[[], Any]]] = {
        number: partial(_ready, module, space, schedule, rows) for number, schedule in enumerate(schedules)
    }
    if costs.unit == "macs":
        found = measure_in_turn(pieces, module.device)
        return [found[number] for number in range(len(schedules))], costs
    used = {name for schedule in schedules for name in schedule.members}
    costs = replace(costs, members={name: member for name, member in costs.members.items() if name in used})
    cheapest = _cheapest(costs)
    for name in costs.members:
        step = _recorded(module, space, name, rows)
        pieces[name] = partial(_calling, step, _inputs(module)(step, rows))
    pieces |= _around(module, space, cheapest, rows)
    found = measure_in_turn(pieces, module.device)
    members = {
        name: replace(member, latency=replace(member.latency, median_ms=found[name]))
        for name, member in costs.members.items()
        if member.latency
    }
    costs = _overhead(replace(costs, members=members), found, cheapest)
    return [found[number] for number in range(len(schedules))], costs


def sampled(module: Any, rows: int) -> Tensor:
    """Undecoded samples of the module as it is, of zeros and the first class or prompt."""
    noise = torch.zeros(rows, *module.sample_shape, device=module.device)
    label = torch.zeros(rows, dtype=torch.long, device=module.device) if module.class_conditional else None
    samples: Tensor = module.sample_latents(noise, label)
    return samples


class _Step(nn.Module):
    """The calls of one evaluation by one member, made again."""

    def __init__(self, scheduled: ScheduledDenoiser, name: str, timestep: float, calls: list[Any]) -> None:
        super().__init__()
        self.network = scheduled.members[name]
        # no submodule: it holds all members
        self._scheduled = (scheduled,)
        self.schedule, self.calls = ([timestep], [name]), calls

    def forward(self, state: Tensor) -> None:
        """Of `state` only the size matters."""
        (scheduled,) = self._scheduled
        scheduled.set_schedule(*self.schedule)
        for arguments, options in self.calls:
            scheduled(*arguments, **options)


def _recorded(module: Any, space: ModelScheduleSpace, name: str, rows: int) -> _Step:
    calls: list[Any] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        calls.append((arguments, dict(options)))

    space.apply(module, ModelSchedule("singlestep", ((name,),)))
    handle = module.scheduled.register_forward_pre_hook(note, with_kwargs=True)
    try:
        sampled(module, rows)
    finally:
        handle.remove()
    _check_timesteps(module, space, calls)
    return _Step(module.scheduled, name, module.scheduled.schedule[0][0], calls)


def _check_timesteps(module: Any, space: ModelScheduleSpace, calls: Sequence[Any]) -> None:
    """UserError unless the networks were given the timestep of the one evaluation: members would not take turns."""
    schedule, (wanted, _) = space.noise_schedule, module.scheduled.schedule[0]
    ends = [schedule.model_timestep(time) for time in (schedule.t_min, schedule.t_max)]
    for arguments, options in calls:
        found = module.scheduled.timestep_of_call(arguments, options)
        if abs(found - wanted) > _NEAR * abs(ends[1] - ends[0]):
            name = type(getattr(module, "pipe", module)).__name__
            raise UserError(
                f"{name} gives its network the timestep {found:g} where {wanted:g} is scheduled, in a way that is not "
                "known here: members cannot take turns in it"
            )


def _with_overhead(
    costs: MemberCosts, module: Any, steps: Mapping[str, _Step], space: ModelScheduleSpace, rows: int
) -> MemberCosts:
    """The costs with what an evaluation and a batch take beside the networks."""
    name = _cheapest(costs)
    pieces: dict[Hashable, Callable[[], Callable[[], Any]]] = {
        name: partial(_calling, steps[name], _inputs(module)(steps[name], rows)),
        **_around(module, space, name, rows),
    }
    return _overhead(costs, measure_in_turn(pieces, module.device, repeats=5), name)


def _cheapest(costs: MemberCosts) -> str:
    return min(costs.costs, key=lambda name: costs.costs[name])


def _around(
    module: Any, space: ModelScheduleSpace, name: str, rows: int
) -> dict[Hashable, Callable[[], Callable[[], Any]]]:
    """Sampling in few and in several evaluations by one member, by what `_overhead` knows them."""
    schedules = {count: ModelSchedule("singlestep", ((name,),) * count) for count in (_FEW, _SEVERAL)}
    return {("around", count): partial(_ready, module, space, each, rows) for count, each in schedules.items()}


def _overhead(costs: MemberCosts, found: Mapping[Hashable, float], name: str) -> MemberCosts:
    """The time of a batch is a line over its evaluations: its slope beyond the network `name`, and where it begins."""
    few, several, own = found["around", _FEW], found["around", _SEVERAL], found[name]
    evaluation = max(0.0, (several - few) / (_SEVERAL - _FEW) - own)
    return replace(costs, evaluation_ms=evaluation, batch_ms=max(0.0, few - _FEW * (own + evaluation)))


def _ready(module: Any, space: ModelScheduleSpace, schedule: ModelSchedule, rows: int) -> Callable[[], Any]:
    space.apply(module, schedule)
    return partial(sampled, module, rows)


def _calling(step: _Step, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    return partial(step, **inputs)


def _inputs(module: Any) -> Any:
    def inputs(step: nn.Module, rows: int) -> Mapping[str, Any]:
        state = torch.zeros(rows, *module.sample_shape, device=module.device, dtype=module.scheduled.dtype)
        return {"state": state}

    return inputs


def _blame(scheduled: ScheduledDenoiser, error: Exception, failed: dict[str, str]) -> None:
    """Note the member whose call raised; raise what no member's call did."""
    name, scheduled.failed = scheduled.failed, None
    if name is None:
        raise error
    failed[name] = reason_of(error)
    torch.cuda.empty_cache()  # nothing where CUDA is not in use


def reason_of(error: Exception) -> str:
    """One line: what kind of error, and what it says first."""
    return f"{type(error).__name__}: {first_line(error)}"
