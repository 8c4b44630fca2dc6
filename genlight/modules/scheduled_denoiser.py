"""Several networks in the place of one: a schedule over timesteps says which of them answers.

OMS-DPM (Liu et al. 2023, arXiv 2306.08860) lets members of a zoo take turns within one sampling. Here they stand where
a diffusers pipeline or a sampler expects one network, so that neither knows of the others. The member is chosen by the
value of the timestep and not by counting calls: guidance may call twice in a step.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genlight.diffusion.noise_schedules import NoiseSchedule, expand
from genlight.diffusion.prediction import Prediction
from genlight.errors import UserError

# what diffusers calls the noisy input of a network
_INPUTS = ("sample", "hidden_states")


class ScheduledDenoiser(nn.Module):
    """Forwards each call to the member of the nearest scheduled timestep.

    `config`, `dtype`, `device` and all other attributes are those of the primary member; where members differ in
    whether they predict a variance beside the mean, nobody's is passed on, and `config.out_channels` says so. An output
    of another prediction type is turned into the primary's.

    It stands in the place of a pipeline's network, ``pipe.unet = ScheduledDenoiser(...)``, and is not saved as one.

    Args:
        members: networks by name.
        primary: answers where no schedule is set, and says what pipelines read; None: the one with most parameters.
        predictions: prediction type and noise schedule of members; needed where prediction types differ.
        resident: so many members at most stay on the device, the least recently used go to the CPU. None: all stay.
        timestep_of: the scheduled timestep that a timestep of a call stands for, for pipelines that give their network
            t/1000 or the like. None: the same.

    Attributes:
        calls: calls of the networks, by name.
        switches: times that another member than that of the call before was called.
        moves: times that a member was brought to the device for a call.
        failed: the member whose call raised, since this was last set to None.

    Raises:
        ValueError: no members, an empty name, a primary or prediction of no member, members of several prediction
            types of which some are not given or whose noise schedules differ, or `resident` below 1.
    """

    def __init__(
        self,
        members: Mapping[str, nn.Module],
        primary: str | None = None,
        predictions: Mapping[str, Prediction] | None = None,
        resident: int | None = None,
        timestep_of: Callable[[float], float] | None = None,
    ) -> None:
        super().__init__()
        if not members or not all(isinstance(name, str) and name.strip() for name in members):
            raise ValueError(f"members = {list(members)}: one network or more, each with a name, is needed")
        first = largest(members) if primary is None else primary
        if first not in members:
            raise ValueError(f"primary = {first!r} is not among the members {', '.join(members)}")
        if resident is not None and resident < 1:
            raise ValueError(f"resident = {resident} must be 1 or more")
        self.names, self.primary, self.resident = tuple(members), first, resident
        self.predictions = _checked_predictions(members, predictions or {})
        self.timestep_of = timestep_of
        # the primary first: it is of its type that callers cast inputs to
        order = [first, *(name for name in members if name != first)]
        self.networks = nn.ModuleDict({_key(name): members[name] for name in order})
        self.calls: Counter[str] = Counter()
        self.switches = self.moves = 0
        self.failed: str | None = None
        self._latest: str | None = None
        self._paused = False
        self._schedule: tuple[tuple[float, str], ...] = ()
        self._arguments = list(inspect.signature(members[first].forward).parameters)
        variances = {_learns_variance(network) for network in members.values()}
        self._drop_variance = len(variances) > 1
        self._device = _device_of(members[first])
        here = [name for name in order if resident is None or _device_of(members[name]) == self._device]
        # least recently used first
        self._on_device = here[:resident][::-1]
        for name in [] if resident is None or self._device.type == "cpu" else here[resident:]:
            members[name].to("cpu")

    @property
    def members(self) -> dict[str, nn.Module]:
        """The networks by name, in the order that they were given in."""
        return {name: self.networks[_key(name)] for name in self.names}

    @property
    def schedule(self) -> tuple[tuple[float, str], ...]:
        """(timestep, name) of each evaluation; empty where the primary makes all."""
        return self._schedule

    def set_schedule(self, timesteps: Sequence[float] | None, names: Sequence[str] = ()) -> None:
        """Let names[i] answer at timesteps[i] and nearer to it than to the others; None or (): the primary always.

        Args:
            timesteps: of each evaluation, as the networks see them (`NoiseSchedule.model_timestep`).

        Raises:
            ValueError: as many names as timesteps are needed; a name of no member, a timestep that is not finite, or
                the same timestep with two members.
        """
        times = [float(time) for time in (() if timesteps is None else timesteps)]
        if len(times) != len(names):
            raise ValueError(f"names: {len(names)} names for {len(times)} timesteps")
        found: dict[float, str] = {}
        for index, (time, name) in enumerate(zip(times, names, strict=True)):
            if name not in self.names:
                raise ValueError(f"names[{index}] = {name!r} is not among the members {', '.join(self.names)}")
            if not math.isfinite(time):
                raise ValueError(f"timesteps[{index}] = {time} is not finite")
            if found.setdefault(time, name) != name:
                raise ValueError(f"timesteps[{index}] = {time:g} has two members, {found[time]!r} and {name!r}")
        self._schedule = tuple(zip(times, names, strict=True))
        self._latest = None

    def member_at(self, timestep: float) -> str:
        """The name of the member that answers at a timestep of a call."""
        if not self._schedule or self._paused:
            return self.primary
        time = self._on_schedule(timestep)
        return min(self._schedule, key=lambda entry: abs(entry[0] - time))[1]

    def timestep_of_call(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> float:
        """The timestep on the schedule that a call with these arguments stands for; ValueError as `forward`."""
        return self._on_schedule(_one_timestep(self._timestep(arguments, options)))

    def _on_schedule(self, timestep: float) -> float:
        return timestep if self.timestep_of is None else self.timestep_of(timestep)

    @contextmanager
    def primary_only(self, active: bool = True) -> Iterator[None]:
        """Within it the primary answers always, whatever is scheduled; not if `active` is false."""
        before, self._paused = self._paused, self._paused or active
        try:
            yield
        finally:
            self._paused = before

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the member of the timestep answers, in the primary's prediction type and precision.

        Arguments are those of the networks: the input as "sample" or "hidden_states", the timestep, and others, which
        are passed on.

        Raises ValueError for samples of different timesteps.
        """
        timestep = _one_timestep(self._timestep(arguments, options))
        name = self.member_at(timestep)
        self.calls[name] += 1
        self.switches += self._latest is not None and self._latest != name
        self._latest = name
        try:
            return self._answer(name, timestep, arguments, options)
        except Exception:
            self.failed = name
            raise

    def _answer(self, name: str, timestep: float, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        network = self.brought(name)
        x = next((options[key] for key in _INPUTS if options.get(key) is not None), arguments[0] if arguments else None)
        own, wanted = _dtype_of(network), self.dtype
        if own == wanted:
            return self._as_primary(name, network(*arguments, **options), x, timestep)
        place = self._place_of_timestep()
        arguments = tuple(value if index == place else _cast(value, own) for index, value in enumerate(arguments))
        options = {key: value if key == "timestep" else _cast(value, own) for key, value in options.items()}
        return self._as_primary(name, network(*arguments, **options), x, timestep, wanted)

    def _as_primary(self, name: str, result: Any, x: Any, timestep: float, dtype: torch.dtype | None = None) -> Any:
        output = _output_of(result)
        changed = output
        if self._drop_variance and _learns_variance(self.networks[_key(name)]):
            changed = changed[:, : changed.shape[1] // 2]
        prediction, wanted = self.predictions.get(name), self.predictions.get(self.primary)
        if prediction and wanted and prediction.prediction_type != wanted.prediction_type:
            changed = _converted(prediction, wanted.prediction_type, changed, x, self._on_schedule(timestep))
        changed = changed if dtype is None else changed.to(dtype)
        return result if changed is output else _with_output(result, changed)

    def _place_of_timestep(self) -> int:
        return self._arguments.index("timestep") if "timestep" in self._arguments else 1

    def _timestep(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        place = self._place_of_timestep()
        if "timestep" not in options and place >= len(arguments):
            raise ValueError("timestep is missing from the call of the network")
        return options["timestep"] if "timestep" in options else arguments[place]

    def brought(self, name: str) -> nn.Module:
        """The member, on the device, to be called by itself; the least recently used one leaves, see `resident`."""
        network = self.networks[_key(name)]
        if self.resident is None:
            return network
        if name not in self._on_device:
            while len(self._on_device) >= self.resident:
                self.networks[_key(self._on_device.pop(0))].to("cpu")
            network.to(self._device)
            self._on_device.append(name)
            self.moves += 1
        self._on_device.remove(name)
        self._on_device.append(name)
        return network

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScheduledDenoiser:
        """As in torch; members that wait on the CPU are cast there, and are not moved."""
        for name, network in self.members.items():
            if name in self._on_device:
                network._apply(fn, recurse)  # type: ignore[no-untyped-call]
                self._device = _device_of(network)
            elif _casts(fn, network):
                network._apply(lambda tensor: fn(tensor).to("cpu"), recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def config(self) -> Any:
        """The primary's; without the variance that it predicts where that is dropped."""
        config: Any = self.networks[_key(self.primary)].config
        if self._drop_variance:
            return type(config)({**config, "out_channels": config["in_channels"]})
        return config

    @property
    def dtype(self) -> torch.dtype:
        """The primary's."""
        return _dtype_of(self.networks[_key(self.primary)])

    @property
    def device(self) -> torch.device:
        """Where members are when they are called."""
        return _device_of(self.networks[_key(self.primary)]) if self.resident is None else self._device

    @contextmanager
    def cache_context(self, *arguments: Any, **options: Any) -> Iterator[None]:
        """The context of diffusers' caches, on all members that have one."""
        with ExitStack() as stack:
            for network in self.networks.values():
                if hasattr(network, "cache_context"):
                    stack.enter_context(network.cache_context(*arguments, **options))  # type: ignore[operator]
            yield

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """UserError: several networks are not saved as one."""
        raise UserError(
            "a ScheduledDenoiser is not one network: save each by members[name].save_pretrained(folder), and "
            "the schedule by genlight.modules.model_schedule_file.write_model_schedule"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names, such as torch.compile's mark of a compiled module, say what the object itself is
            networks = self.__dict__.get("_modules", {}).get("networks")
            if networks is None or name.startswith("_"):
                raise
        return getattr(networks[_key(self.primary)], name)


def largest(members: Mapping[str, nn.Module]) -> str:
    """The name of the network with most parameters, the first of several."""
    return max(members, key=lambda name: sum(parameter.numel() for parameter in members[name].parameters()))


def time_of_timestep(schedule: NoiseSchedule, timestep: float) -> float:
    """Inverse of `NoiseSchedule.model_timestep`, held within the range of times."""
    if schedule.family == "edm":
        time = math.exp(4 * timestep)
    elif schedule.family == "flow":
        time = timestep / schedule.definition()["num_train_timesteps"]
    else:
        time = timestep
    return min(max(time, schedule.t_min), schedule.t_max)


def process_of(schedule: NoiseSchedule) -> dict[str, Any]:
    """Family and definition of a noise schedule as far as α(t) and σ(t) depend on it: the shift of flow matching moves
    the times that are looked at, and not the process."""
    definition = {key: value for key, value in schedule.definition().items() if key != "shift"}
    return {"family": schedule.family, **definition}


def _checked_predictions(
    members: Mapping[str, nn.Module], predictions: Mapping[str, Prediction]
) -> dict[str, Prediction]:
    for name in predictions:
        if name not in members:
            raise ValueError(f"predictions.{name}: it is not among the members {', '.join(members)}")
    if len({prediction.prediction_type for prediction in predictions.values()}) > 1:
        missing = [name for name in members if name not in predictions]
        if missing:
            raise ValueError(f"predictions.{missing[0]} is missing, and the other members differ in prediction type")
        first, *others = (process_of(prediction.schedule) for prediction in predictions.values())
        if any(other != first for other in others):
            raise ValueError("predictions: all members need one noise schedule")
    return dict(predictions)


def _converted(prediction: Prediction, to: str, output: Tensor, x: Tensor, timestep: float) -> Tensor:
    """A mean, and a variance beside it as it is, with the mean written as another prediction type."""
    time = time_of_timestep(prediction.schedule, timestep)
    mean, rest = output[:, : x.shape[1]], output[:, x.shape[1] :]
    x_t = x.to(torch.promote_types(x.dtype, torch.float32)) / expand(prediction.schedule.input_scale(time), x)
    mean = prediction.convert(mean.to(x_t.dtype), x_t, time, to=to).to(output.dtype)
    return torch.cat([mean, rest], 1) if rest.shape[1] else mean


def _key(name: str) -> str:
    """A name as a key of a ModuleDict, which may neither hold a dot nor be one of its attributes."""
    return "=" + name.replace("%", "%25").replace(".", "%2E")


def _one_timestep(timestep: Any) -> float:
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = set(timestep.detach().flatten().tolist())  # one transfer from the device
    if len(values) != 1:
        raise ValueError(
            f"timestep: {', '.join(f'{value:g}' for value in sorted(values)[:3])} … in one call; all samples of a call "
            "need the same, since one member answers for all"
        )
    return float(values.pop())


def _learns_variance(network: nn.Module) -> bool:
    config: Any = getattr(network, "config", None)
    if not isinstance(config, Mapping):
        return False
    channels = config.get("in_channels")
    return channels is not None and config.get("out_channels") == 2 * channels


def _output_of(result: Any) -> Tensor:
    output: Tensor = result if isinstance(result, Tensor) else result[0]
    return output


def _with_output(result: Any, output: Tensor) -> Any:
    if isinstance(result, Tensor):
        return output
    if isinstance(result, tuple):
        return (output, *result[1:])
    result.sample = output
    return result


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of arguments in another precision."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(entry, dtype) for entry in value)
    return value


def _first_parameter(network: nn.Module) -> Tensor | None:
    return next((p for p in network.parameters() if p.is_floating_point()), None)


def _casts(fn: Callable[[Tensor], Tensor], network: nn.Module) -> bool:
    """Whether what is to be done to each tensor of a network changes their type."""
    parameter = _first_parameter(network)
    return parameter is not None and fn(torch.empty(0, dtype=parameter.dtype)).dtype != parameter.dtype


def _dtype_of(network: nn.Module) -> torch.dtype:
    found = getattr(network, "dtype", None)  # diffusers looks beyond layers that are kept in float32
    if isinstance(found, torch.dtype):
        return found
    parameter = _first_parameter(network)
    return torch.get_default_dtype() if parameter is None else parameter.dtype


def _device_of(network: nn.Module) -> torch.device:
    parameter = _first_parameter(network)
    return torch.device("cpu") if parameter is None else parameter.device
