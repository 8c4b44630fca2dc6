"""Milliseconds of each layer in each choice of bits on this machine, by which bits are chosen within a limit of time.

One call of the network is predicted to take what its layers take, each by itself on an input that was recorded, and
besides what it takes in full precision beyond its layers. Layers of the same shape are measured once, their choices by
turns. Rounding takes no part in the time, so that weights are rounded to nearest, whatever the settings say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genlight import io
from genlight.loops.quantization_speed import call_milliseconds
from genlight.loops.quantization_variants import Variant
from genlight.quantization.trajectory import replay
from genlight.reports.latency import device_name, measure_in_turn

if TYPE_CHECKING:
    from genlight.loops.quantization_bits import Choice
    from genlight.loops.quantization_work import QuantizationWork

FILE = "search/latency.json"
TIMES = "times of layers"  # in the account of time
TURNS = 7
_KIND, _VERSION = "times of layers", 1
# relative difference that counts as the same time
_SAME = 0.1

# what layers have in common that take the same time: how they print, shape and type of the input, and what it is of
Kind = tuple[str, tuple[int, ...], str, int | None, bool]


@dataclass(frozen=True)
class LayerTimes:
    """What was measured, for one call of the network with a batch of the evaluation.

    Attributes:
        machine: in words.
        samples: of the batch.
        whole: milliseconds of the call in full precision.
        rest: of them those of no layer; below 0 where layers overlap in the call and not by themselves.
        layers: milliseconds by name, and by bits of the weight and the input as `written`.
    """

    machine: str
    samples: int
    whole: float
    rest: float
    layers: Mapping[str, Mapping[str, float]]

    def of(self, layer: str, choice: Choice) -> int:
        """Microseconds."""
        return round(1000 * self.layers[layer][written(choice)])

    def limit(self, milliseconds: float) -> int:
        """Microseconds that all layers together may take within a limit of the whole call."""
        return round(1000 * milliseconds) - round(1000 * self.rest)

    def call(self, layers: int) -> float:
        """Milliseconds of the call in which all layers together take so many microseconds."""
        return (layers + round(1000 * self.rest)) / 1000

    def predicted(self, chosen: Mapping[str, Choice]) -> float:
        """Milliseconds of the call with these bits."""
        return self.call(sum(self.of(layer, choice) for layer, choice in chosen.items()))


def written(choice: Choice) -> str:
    """Bits of the weight and the input, as "4/8" or "4"."""
    return "/".join(str(bits) for bits in choice if bits is not None)


def layer_times(work: QuantizationWork, choices: Mapping[str, Sequence[Choice]]) -> LayerTimes:
    """Times of all layers in their choices: those that this run measured on this machine before, or new ones.

    The first process measures, while the others wait.

    Raises:
        UserError, CorruptFileError: see `read_record`.
    """
    evaluations, path = work.evaluations, work.folder / FILE
    samples = int(work.datamodule.eval_batch_size)
    method = work.method
    work.reference("search", samples)  # in every process, as is what follows
    if method.special:
        work.special  # noqa: B018
    fingerprint = {
        **work.fingerprint,
        "machine": device_name(evaluations.trainer.strategy.root_device),
        "torch": str(torch.__version__),
        "precision": str(evaluations.trainer.precision),
        "samples": str(samples),
        "forms": str(sorted((name, repr(form)) for name, form in work.forms.items())),
        "choices": str({name: [written(choice) for choice in choices[name]] for name in sorted(choices)}),
        "inputs": f"{method.balancing} {method.rank} {method.parts_in_words}",
    }
    found: LayerTimes | None = None
    if evaluations.trainer.is_global_zero:
        with evaluations.timing(TIMES):
            kept = io.read_record(path, kind=_KIND, version=_VERSION) if path.exists() else {}
            if kept.get("fingerprint") == fingerprint:
                found = LayerTimes(**kept["times"])
            else:
                found = _measured(work, choices, fingerprint["machine"], samples)
                content = {"fingerprint": fingerprint, "times": asdict(found)}
                io.write_record(path, content, kind=_KIND, version=_VERSION)
    result: LayerTimes = evaluations.agreed(found)
    return result


def _measured(
    work: QuantizationWork, choices: Mapping[str, Sequence[Choice]], machine: str, samples: int
) -> LayerTimes:
    whole = call_milliseconds(work, work.network, samples)
    kinds, inputs = work.inside(partial(_watched, work, samples))
    wanted: dict[Kind, dict[Choice, None]] = {}
    for name, found in kinds.items():
        for kind in found:
            wanted.setdefault(kind, {}).update(dict.fromkeys(choices[name]))
    first = {kind: name for name in reversed(kinds) for kind in kinds[name]}
    times = {kind: _by_turns(work, first[kind], list(wanted[kind]), inputs[kind]) for kind in wanted}
    plain = sum(times[kind][None] for found in kinds.values() for kind in found)
    layers = {
        name: {written(choice): sum(times[kind][choice] for kind in kinds.get(name, ())) for choice in own}
        for name, own in choices.items()
    }
    return LayerTimes(machine, samples, whole, whole - plain, layers)


def _watched(work: QuantizationWork, samples: int) -> tuple[dict[str, list[Kind]], dict[Kind, Tensor]]:
    """The kinds of all calls of each layer in one call of the network, and an input of each kind, on the CPU."""
    method = work.method
    splits = work.special.splits if method.split_shortcuts else {}
    text = set(work.special.text) if method.constant_tokens != "off" else set[str]()
    kinds: dict[str, list[Kind]] = {}
    inputs: dict[Kind, Tensor] = {}

    def watcher(name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, arguments: Any) -> None:
            value = arguments[0]
            kind = (repr(module), tuple(value.shape), str(value.dtype), splits.get(name), name in text)
            kinds.setdefault(name, []).append(kind)
            if kind not in inputs:
                inputs[kind] = value.detach().to("cpu", copy=True)

        return note

    with ExitStack() as stack:
        for name in work.forms:
            module = work.network.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(watcher(name)).remove)
        replay(work.network, work.reference("search", samples).calls[0])
    return kinds, inputs


def _by_turns(
    work: QuantizationWork, name: str, choices: Sequence[Choice], value: Tensor
) -> dict[Choice | None, float]:
    """Median milliseconds of a layer on an input, in each choice of bits and, as None, in full precision."""
    group = work.calibrated.groups[work.calibrated.group_of(name)]
    layers: dict[Choice | None, nn.Module] = {None: work.network.get_submodule(name)}
    for choice in choices:
        variant = Variant.mixed(work.method, "one layer", dict.fromkeys(group, choice))
        layers[choice] = work.layers_of(replace(variant, rounding="nearest", clip="none"), [name])[name]

    def measure() -> dict[Choice | None, float]:
        device = next(work.network.parameters()).device
        placed = value.to(device)

        def ready(layer: nn.Module) -> Callable[[], Any]:
            return partial(layer.to(device), placed)

        return measure_in_turn({key: partial(ready, layer) for key, layer in layers.items()}, device, repeats=TURNS)

    found: dict[Choice | None, float] = work.inside(measure)
    return found


def latency_facts(
    times: LayerTimes, limit: float, ways: Mapping[str, Mapping[str, Choice]], uniform: Sequence[Mapping[str, Choice]]
) -> dict[str, Any]:
    """What the report says of the limit, as JSON.

    Args:
        times: of this machine.
        limit: in milliseconds.
        ways: bits of each layer by the way they were chosen; the first is the artifact's.
        uniform: the same choice for all layers, those with the most bits last.
    """
    predicted = {way: times.predicted(chosen) for way, chosen in ways.items()}
    *fewer, most = [times.predicted(chosen) for chosen in uniform]
    return {
        "limit": limit,
        "predicted": next(iter(predicted.values())),
        "full_precision": times.whole,
        "samples": times.samples,
        "machine": times.machine,
        # of layers alone, so that a large rest hides nothing
        "fewer_bits_are_faster": min(fewer) - times.rest < (1 - _SAME) * (most - times.rest),
        "over": [way for way, value in predicted.items() if round(1000 * value) > round(1000 * limit)],
    }


def measured_latency(work: QuantizationWork, layers: Mapping[str, nn.Module]) -> float:
    """Milliseconds of the same call of the network with these layers, as it is."""
    with work.replaced(layers):
        return call_milliseconds(work, work.network, int(work.datamodule.eval_batch_size))


def latency_notes(title: str, facts: Mapping[str, Any] | None) -> list[str]:
    """Predicted beside measured, and where the limit buys nothing or rows do not keep it; none without a limit.

    Args:
        title: of the method.
        facts: of `latency_facts`, and what was `measured`.
    """
    if facts is None:
        return []
    notes = [
        f"one call of the network with {facts['samples']} samples, in milliseconds: limit {facts['limit']:g}, "
        f"predicted {facts['predicted']:.4g}, measured {facts['measured']:.4g}; full precision "
        f"{facts['full_precision']:.4g} ({facts['machine']}, without torch.compile)"
    ]
    if not facts["fewer_bits_are_faster"]:
        notes.append(
            f"fewer bits make nothing faster on this machine ({facts['machine']}): with the same bits for all layers "
            "these take at least nine tenths of their time with the most bits, so that a limit of milliseconds decides "
            "by little more than chance"
        )
    if facts["over"]:
        rows = ", ".join(f"{title} {way}" for way in facts["over"])
        notes.append(f"predicted above method.mixed.milliseconds, for they begin with the fewest bits: {rows}")
    return notes
