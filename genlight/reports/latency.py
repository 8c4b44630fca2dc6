"""What one call of each member of a zoo costs: latency for the deployed batch, work, memory, and changes of member.

On a GPU, time is taken by CUDA events with synchronisation, on a CPU by the clock. First calls, and those that still
compile, do not count; everything is measured twice, with all members in between, so that a machine that is busy with
something else shows. Work in multiply-accumulates is the same on every machine, for runs that must repeat exactly.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from genlight.reports.cost import count_macs
from genlight.reports.environment import machine
from genlight.reports.member_costs import CostKey, Latency, MemberCost, MemberCosts, Unit

MakeInputs = Callable[[nn.Module, int], Mapping[str, Any]]
Name = TypeVar("Name", bound=Hashable)

# relative difference of two medians that counts as agreement
_AGREE = 0.1
# groups of warm-up calls, at most
_MAX_GROUPS = 12


def measure_latency(
    call: Callable[[], Any], device: torch.device | str, *, warmup: int = 3, repeats: int = 20
) -> Latency:
    """Time of a call, without gradients, once it has settled.

    Args:
        call: what is measured; all its work runs on `device`.
        warmup: calls in a group; groups are thrown away until the medians of two agree within 10 %, so that compiling
            and tuning are over. 0: no warm-up.
        repeats: calls that count.

    Raises:
        ValueError: `repeats` below 1 or `warmup` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats = {repeats} and warmup = {warmup}; at least 1 and 0 are needed")
    device = torch.device(device)
    with torch.no_grad():
        _settle(call, device, warmup)
        return _latency(_times(call, device, repeats), device)


def measure_in_turn(
    pieces: Mapping[Name, Callable[[], Callable[[], Any]]], device: torch.device | str, *, repeats: int = 3
) -> dict[Name, float]:
    """Median milliseconds of calls that take turns, so that a change of the machine's speed meets all of them.

    Args:
        pieces: each gets ready, which is not timed, and gives the call.
        device: all work of the calls runs on it.
        repeats: rounds that count; the one before them does not.
    """
    device = torch.device(device)
    times: dict[Name, list[float]] = {name: [] for name in pieces}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, ready in pieces.items():
                times[name] += _times(ready(), device, 1)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def profile_members(
    members: Mapping[str, nn.Module],
    make_inputs: MakeInputs,
    batch_size: int,
    device: torch.device | str,
    *,
    unit: Unit = "ms",
    warmup: int = 3,
    repeats: int = 20,
) -> MemberCosts:
    """Costs of one call of each member, and of a change of member, in evaluation mode and without gradients.

    Args:
        members: networks by name, on `device`.
        make_inputs: (network, batch size) to the keyword arguments of one call, on `device`; the first tensor is the
            state [B, ...].
        batch_size: of the deployed sampler: rows that go through the network in one call.
        unit: "macs" measures no time.
        warmup, repeats: see `measure_latency`; `repeats` is made twice.

    Doubtful measurements are warnings, and stay in `notes`.

    Raises:
        ValueError: no members, or members whose inputs differ in shape or type.
    """
    if not members:
        raise ValueError("members: at least one is needed")
    device = torch.device(device)
    modes = [(part, part.training) for member in members.values() for part in member.modules()]
    for member in members.values():
        member.eval()
    try:
        inputs = {name: dict(make_inputs(member, batch_size)) for name, member in members.items()}
        key = _key(inputs, batch_size, device)
        work = {name: _work(member, inputs[name], batch_size) for name, member in members.items()}
        if unit == "macs":
            return MemberCosts(unit, work, 0.0, key)
        calls = {name: _call(member, inputs[name]) for name, member in members.items()}
        with torch.no_grad():
            first = {
                name: measure_latency(call, device, warmup=warmup, repeats=repeats) for name, call in calls.items()
            }
            again = {name: _times(call, device, repeats) for name, call in calls.items()}
            switch = _switch_ms(list(calls.values()), device, max(1, repeats // 2))
    finally:
        for part, training in modes:
            part.training = training
    second = {name: _latency(times, device) for name, times in again.items()}
    # what disturbs a measurement makes it longer
    latencies = {name: min(first[name], second[name], key=lambda latency: latency.median_ms) for name in members}
    found = {name: MemberCost(**{**vars(work[name]), "latency": latencies[name]}) for name in members}
    notes = (*_disagreements(first, second), *_doubts(found))
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return MemberCosts(unit, found, switch, key, notes=notes)


def device_name(device: torch.device | str) -> str:
    """The name under which costs are kept: of the GPU, or of the processor with torch's number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {machine()['cpu']}, {torch.get_num_threads()} threads"


def cost_key(batch_size: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> CostKey:
    """The key of costs that are measured here, for inputs [batch_size, *shape]."""
    kind = str(dtype).removeprefix("torch.")
    return CostKey(batch_size, tuple(shape), kind, device_name(device), str(torch.__version__))


def _key(inputs: Mapping[str, Mapping[str, Any]], batch_size: int, device: torch.device) -> CostKey:
    states = {
        name: next((v for v in values.values() if isinstance(v, Tensor)), None) for name, values in inputs.items()
    }
    kinds = set()
    for name, state in states.items():
        if state is None or state.ndim == 0 or len(state) != batch_size:
            raise ValueError(f"make_inputs: the first tensor for member {name} must have {batch_size} rows")
        kinds.add((tuple(state.shape[1:]), state.dtype))
    if len(kinds) != 1:
        raise ValueError(f"make_inputs: the members of a zoo take one shape and type, not {sorted(map(str, kinds))}")
    return cost_key(batch_size, *kinds.pop(), device)


def _work(member: nn.Module, inputs: Mapping[str, Any], batch_size: int) -> MemberCost:
    weights = list(member.parameters())
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *member.buffers()))
    return MemberCost(count_macs(member, **inputs) // batch_size, sum(weight.numel() for weight in weights), size)


def _call(member: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: member(**inputs)


def _settle(call: Callable[[], Any], device: torch.device, warmup: int) -> None:
    if warmup == 0:
        return
    previous = statistics.median(_times(call, device, warmup))
    for _ in range(_MAX_GROUPS - 1):
        median = statistics.median(_times(call, device, warmup))
        if _agree(median, previous):
            return
        previous = median


def _times(call: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    """Milliseconds of `count` calls, each with its own beginning and end."""
    if device.type == "cuda":
        return _event_times(call, device, count)
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begin))
    return times


def _event_times(call: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    times = []
    with torch.cuda.device(device):
        for _ in range(count):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            times.append(begin.elapsed_time(end))
    return times


def _latency(times: Sequence[float], device: torch.device) -> Latency:
    threads = None if device.type == "cuda" else torch.get_num_threads()
    return Latency(statistics.median(times), _spread(times), len(times), threads)


def _spread(values: Sequence[float]) -> float:
    """Interquartile range."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower


def _switch_ms(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> float:
    """What one change of member adds, the median over neighbours in the zoo.

    a b a b has two changes more than a a b b, and the same calls. A difference within its own noise counts as 0.
    """
    found = []
    for a, b in pairwise(calls):
        differences = []
        for _ in range(repeats):
            (together,) = _times(lambda a=a, b=b: (a(), a(), b(), b()), device, 1)  # type: ignore[misc]
            (apart,) = _times(lambda a=a, b=b: (a(), b(), a(), b()), device, 1)  # type: ignore[misc]
            differences.append((apart - together) / 2)
        middle = statistics.median(differences)
        found.append(middle if middle > _spread(differences) / repeats**0.5 else 0.0)
    return statistics.median(found) if found else 0.0


def _disagreements(first: Mapping[str, Latency], second: Mapping[str, Latency]) -> list[str]:
    return [
        f"latency of {name}: two measurements give {first[name].median_ms:.3g} and {second[name].median_ms:.3g} ms; "
        "something else may use the device"
        for name in first
        if not _agree(first[name].median_ms, second[name].median_ms)
    ]


def _doubts(members: Mapping[str, MemberCost]) -> list[str]:
    if len(members) < 2:
        return []
    latencies = [member.latency.median_ms for member in members.values() if member.latency]
    macs = [max(1, member.macs) for member in members.values()]
    ratio, work = max(latencies) / max(min(latencies), 1e-9), max(macs) / min(macs)
    if work > 2 and ratio < work**0.5:
        return [
            f"latencies differ by a factor of {ratio:.2g}, the work by {work:.2g}: small members wait for the launch "
            "of their kernels; a larger batch or compiled members bring the two together"
        ]
    if ratio <= 1 + _AGREE:
        return ["all members take the same time: a schedule can only gain by what each does best"]
    return []


def _agree(a: float, b: float) -> bool:
    return abs(a - b) <= _AGREE * max(a, b)
