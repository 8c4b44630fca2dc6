"""The layers of a network, those of like names in one row: sizes, multiplications, and what a method does with them."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genlight.experts.families import family_of, find_blocks, routing_of
from genlight.quantization.accounting import count_macs as macs_of_layers
from genlight.reports.cost import count_macs
from genlight.reports.report import size

_TEXT_TOKENS = 77
_SMALL = "norms, biases and the like"


@dataclass(frozen=True)
class Work:
    """Multiplications of one call of a network for one sample, or for one token.

    Attributes:
        unit: "sample", "token", or "" where they could not be counted.
        layers: by name.
        total: with those of attention, which belong to no layer, where they were counted.
    """

    unit: str = ""
    layers: Mapping[str, int] = field(default_factory=dict)
    total: int = 0


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """What holds a parameter of two dimensions or more itself, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    }


def layer_rows(network: nn.Module, column: str, verdicts: Mapping[str, str], work: Work) -> list[dict[str, Any]]:
    """One row for layers whose names differ in numbers alone, and with the same verdict; the last row is the sum.

    Args:
        network: on any device.
        column, verdicts: a question, and its answer for each layer, by name.
        work: of the network.
    """
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    layers = layers_of(network)
    for name, layer in layers.items():
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        groups[pattern, type(layer).__name__, verdicts.get(name, "")].append(name)
    own = _own_parameters(network)
    rows = []
    for (_, kind, verdict), names in groups.items():
        row = {"layers": _pattern(names), "count": len(names), "type": kind}
        row["shape"] = _shapes([_largest(layers[name]) for name in names])
        rows.append(
            {**row, **_sizes([p for name in names for p in own.pop(name)], _macs(work, names)), column: verdict}
        )
    small = [parameter for parameters in own.values() for parameter in parameters]
    if small:
        rows.append({"layers": _SMALL, **_sizes(small, None)})
    rows.append({"layers": "all", **_sizes(list(network.parameters()), work.total if work.unit else None)})
    return rows


def experts_text(network: nn.Module) -> str:
    """The experts of a language model in words, or why none of them can be chosen among."""
    config: Any = network.config
    try:
        family = family_of(config)
        blocks = find_blocks(network, family)
    except ValueError as error:
        return f"experts: {error}"
    tensors = {name: [getattr(b.experts, t.name) for t in family.tensors] for name, b in blocks.items()}  # type: ignore[union-attr]
    counts = {name: len(found[0]) for name, found in tensors.items()}
    each = sum(tensor[0].numel() for tensor in next(iter(tensors.values())))
    numbers = "–".join(map(str, sorted({min(counts.values()), max(counts.values())})))
    chosen = routing_of(config, family).num_experts_per_tok
    return (
        f"experts: {_pattern(list(blocks))} × {len(blocks)} of family {family.model_type}: {numbers} experts of "
        f"{short(each)} parameters, {chosen} for each token"
    )


def work_of(network: nn.Module) -> Work:
    """Multiplications, counted on torch's meta device: no number is computed.

    Args:
        network: of transformers: for one token, without attention, and each expert that is a layer of its own as if
            it were always chosen; of diffusers: for one sample of the size in its config, where that and its inputs are
            known.
    """
    if hasattr(getattr(network, "config", None), "model_type"):
        layers = {name: _per_token(network, name, layer) for name, layer in layers_of(network).items()}
        return Work("token", layers, sum(layers.values()))
    totals: list[int] = []
    try:
        run = partial(count_macs, network, **_inputs(network))
        layers = macs_of_layers(network, lambda: totals.append(run()))
    except Exception:  # what a network of any kind raises for inputs that are not its own
        return Work()
    return Work("sample", layers, totals[0])


def short(count: float) -> str:
    """A number in words: 1.2 G."""
    for unit in ("", " k", " M", " G"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} T"


def _own_parameters(network: nn.Module) -> dict[str, list[Tensor]]:
    """The parameters of each module itself, by its name; those that several share belong to the first."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in network.named_modules()}
    for name, parameter in network.named_parameters():
        found[name.rpartition(".")[0]].append(parameter)
    return found


def _pattern(names: list[str]) -> str:
    """Names with an asterisk where they differ."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns)


def _largest(layer: nn.Module) -> torch.Size:
    return max((p.shape for p in layer.parameters(recurse=False)), key=lambda shape: shape.numel())


def _shapes(shapes: list[torch.Size]) -> str:
    """The least and the most."""
    ends = {min(shapes, key=torch.Size.numel), max(shapes, key=torch.Size.numel)}
    return " to ".join("×".join(map(str, shape)) for shape in sorted(ends, key=torch.Size.numel))


def _sizes(parameters: list[Tensor], macs: int | None) -> dict[str, str | None]:
    count = sum(p.numel() for p in parameters)
    taken = size(sum(p.numel() * p.element_size() for p in parameters))
    return {"parameters": short(count), "bytes": taken, "multiplications": None if macs is None else short(macs)}


def _macs(work: Work, names: list[str]) -> int | None:
    known = [work.layers[name] for name in names if name in work.layers]
    return sum(known) if known else None


def _per_token(network: nn.Module, name: str, layer: nn.Module) -> int:
    """Each weight of a matrix once; of experts that lie in one tensor, those of the experts that a token is sent to."""
    if isinstance(layer, nn.Embedding):
        return 0
    tensors = list(layer.parameters(recurse=False))
    if name.endswith(".experts"):
        config: Any = network.config
        return sum(p.numel() // len(p) * config.num_experts_per_tok for p in tensors if p.ndim == 3)
    return sum(p.numel() for p in tensors if p.ndim == 2)


def _inputs(network: nn.Module) -> dict[str, Any]:
    """What one call of a denoiser for one sample takes, as far as its config says; AttributeError if it does not."""
    config: Any = network.config
    dtype = next(network.parameters()).dtype

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device="meta", dtype=dtype)

    edges = config.sample_size if isinstance(config.sample_size, list | tuple) else [config.sample_size] * 2
    widths = (config.get(key) for key in ("joint_attention_dim", "caption_channels", "cross_attention_dim"))
    width = next((width for width in widths if isinstance(width, int)), 1)
    known: dict[str, Any] = {
        "sample": zeros(1, config.in_channels, *edges),
        "hidden_states": zeros(1, config.in_channels, *edges),
        "timestep": zeros(1),
        "encoder_hidden_states": zeros(1, _TEXT_TOKENS, width),
        "pooled_projections": zeros(1, config.get("pooled_projection_dim") or 1),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    if config.get("num_class_embeds") or config.get("num_embeds_ada_norm"):
        known["class_labels"] = torch.zeros(1, device="meta", dtype=torch.long)
    if config.get("addition_embed_type") == "text_time":  # SDXL: six sizes beside the pooled text
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        known["added_cond_kwargs"] = {"text_embeds": zeros(1, pooled), "time_ids": zeros(1, 6)}
    parameters = inspect.signature(network.forward).parameters
    return {name: value for name, value in known.items() if name in parameters}
