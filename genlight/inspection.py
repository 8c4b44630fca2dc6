"""`python -m genlight inspect`: what a model consists of, and what a method would do with each of its layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from genlight.build import build
from genlight.context import Run
from genlight.errors import UserError
from genlight.experts.families import family_of, find_blocks
from genlight.loops.expert_search import ExpertSearch
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_settings import formats_by_layer
from genlight.modules.outline import ALONE, Outline, outline_of, read_outline
from genlight.quantization.convert import GROUPED, is_grouped, layers_left_out, quantizable_layers
from genlight.reports.inspection import Work, experts_text, layer_rows, layers_of, short, work_of
from genlight.reports.report import result_table, size

# the network that is quantized: of a pipeline the first of these, or that of a module
_DENOISERS = ("transformer", "unet", "prior", ALONE)
# characters of a line where there is no terminal
_WIDTH = 180


def inspect_model(this: Run) -> None:
    """Print the networks of the model that the config names, layer by layer; weights are not read.

    Raises:
        UserError: no such model, or one without networks.
    """
    from rich.console import Console

    method = build(this.config.method, "method")
    source = this.plain["module"].get("pretrained")
    outline = read_outline(source) if source else outline_of(build(this.config.module, "module"))
    if not outline.networks:
        reasons = "".join(f"; {name}: {reason}" for name, reason in outline.skipped.items())
        raise UserError(f"{source or 'the module'} has no network to look at{reasons}")
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _WIDTH
    for name, network in outline.networks.items():
        work, refused = work_of(network), _refused(name, outline)
        console.print(f"\n{name}: {_heading(network, work)}", style="bold")
        column, verdicts = _verdicts(network, method, refused)
        table = result_table(layer_rows(network, column, verdicts, work))
        for each in table.columns:
            each.overflow = "fold"  # names are not cut
        console.print(table)
        for note in _notes(network, method, refused):
            console.print(note)
    for name, reason in outline.skipped.items():
        console.print(f"\nskipped {name}: {reason}")


def _heading(network: nn.Module, work: Work) -> str:
    parameters = list(network.parameters())
    kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    count, taken = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
    told = f", {short(work.total)} multiplications a {work.unit}" if work.unit else ", multiplications not counted"
    return f"{type(network).__name__} of {kinds}: {short(count)} parameters, {size(taken)}{told}"


def _refused(name: str, outline: Outline) -> str:
    """Why methods that quantize leave a whole network alone; "" for that which they take."""
    found = next((known for known in _DENOISERS if known in outline.networks), None)
    if "transformer_2" in outline.networks:
        return "two networks take turns"
    if name != found:
        return "not the denoiser"
    return "a language model" if _is_language_model(outline.networks[name]) else ""


def _verdicts(network: nn.Module, method: Any, refused: str) -> tuple[str, dict[str, str]]:
    """A question to the method, and its answer for each layer, by name."""
    layers = layers_of(network)
    if isinstance(method, ExpertSearch):
        counts = ", ".join(map(str, method.num_experts))
        kept = f"to {counts}" if counts else "as limits allow"
        experts = {f"{block}.experts" for block in _blocks(network)}
        return "pruned", {name: f"yes, {kept}" if name in experts else "no: no experts" for name in layers}
    chosen: Collection[str] = ()
    with suppress(ValueError):  # there is none
        chosen = quantizable_layers(network)
    left = layers_left_out(network, chosen)
    can = {name: "yes" if name in chosen else f"no: {left.get(name, ('', 'no quantized form'))[1]}" for name in layers}
    if not isinstance(method, QuantizationCalibration):
        return "can be quantized", can
    if refused:
        return "quantized", dict.fromkeys(layers, f"no: {refused}")
    whole = method.balances or method.form.weight.needs_hessian
    return "quantized", {
        name: _group(name, method, whole and is_grouped(layers[name])) if said == "yes" else said
        for name, said in can.items()
    }


def _group(layer: str, method: QuantizationCalibration, grouped: bool) -> str:
    """The first group of a method whose pattern is found in the name, and its bits."""
    if re.search(method.keep, layer):
        return "no: method.keep"
    if grouped:
        return f"no: {GROUPED}"
    index = next((i for i, group in enumerate(method.groups) if re.search(group.pattern, layer)), None)
    if index is None:
        return "no: in none of method.groups"
    group, mixed = method.groups[index], method.mixed
    weights: Sequence[Any] = [group.weight_bits or method.weight_bits]
    inputs: Sequence[Any] | None = None
    if mixed is not None:
        weights, inputs = mixed.choices_in(group)
    inputs = inputs or [group.activation_bits or method.activation_bits]
    bits = [letter + "/".join(map(str, choices)) for letter, choices in (("W", weights), ("A", inputs))]
    return f"yes: group {index} ({group.metric}), {' '.join(bits)}"


def _notes(network: nn.Module, method: Any, refused: str) -> list[str]:
    """What there is to say beside the layers: experts, and patterns that the method would refuse."""
    notes = [experts_text(network)] if refused and _is_language_model(network) else []
    if isinstance(method, QuantizationCalibration) and not refused:
        try:
            formats_by_layer(network, method.form, method.keep, method.groups)
        except UserError as error:
            notes.append(f"as it stands, the method would refuse this network: {error}")
    return notes


def _is_language_model(network: nn.Module) -> bool:
    """Whether a network of transformers makes text: text encoders of pipelines do not."""
    return getattr(network, "get_output_embeddings", lambda: None)() is not None


def _blocks(network: nn.Module) -> list[str]:
    with suppress(ValueError):
        return list(find_blocks(network, family_of(getattr(network, "config", None))))
    return []
