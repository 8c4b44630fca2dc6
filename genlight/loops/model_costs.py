"""What one evaluation by each member of a zoo costs: all that its network is asked in a step, guidance included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genlight.diffusion.model_schedule import ModelSchedule
from genlight.errors import UserError
from genlight.modules.pretrained import first_line
from genlight.modules.scheduled_denoiser import ScheduledDenoiser
from genlight.reports.latency import MemberCosts, Unit, profile_members
from genlight.search.spaces.model_schedule import ModelScheduleSpace


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
            return profile_members(steps, _inputs(module), rows, module.device, unit=unit), failed
        except Exception as error:
            _blame(module.scheduled, error, failed)
        steps = {name: step for name, step in steps.items() if name not in failed}
    raise UserError(f"no member works: {', '.join(f'{name}: {reason}' for name, reason in failed.items())}")


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
    return _Step(module.scheduled, name, module.scheduled.schedule[0][0], calls)


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
