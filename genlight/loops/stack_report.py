"""What each stage of a stack made of the model, on the report draw: quality, network evaluations, bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from genlight import io
from genlight.loops.evaluation import CandidateTrainer, measured, noise_of
from genlight.loops.result import MethodResult
from genlight.modules.zoo_module import ZooModule
from genlight.quantization.accounting import tensor_bytes
from genlight.quantization.calls import first_input
from genlight.reports.cost import CostEstimate
from genlight.reports.search_figures import sampler_comparison
from genlight.reports.stack_figure import stages_picture

if TYPE_CHECKING:
    from genlight.loops.stack import Stack


def measured_row(name: str, evaluations: CandidateTrainer, module: Any, datamodule: Any) -> dict[str, Any]:
    """The metrics of a module, its network evaluations for one sample (two a step with guidance), and its 10⁶ bytes."""
    found = measured(evaluations, module, datamodule, "report", datamodule.num_samples)
    row: dict[str, Any] = {"stage": name}
    row |= {key.removeprefix("val/"): value for key, value in found.items() if not key.endswith("_std")}
    row["nfe"] = evaluations.inside(module, lambda: evaluations_of_one(module, datamodule))
    return row | {"megabytes": sum(tensor_bytes(network) for network in _networks(module)) / 1e6}


def evaluations_of_one(module: Any, datamodule: Any) -> int:
    """How many rows the network, or all of a zoo together, is given to make one sample."""
    noise, conditions = noise_of(datamodule, "report", 1)
    label, rows = conditions.get("label"), list[int]()

    def count(_: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        rows.append(len(first_input(arguments, options)))

    handles = [network.register_forward_pre_hook(count, with_kwargs=True) for network in _networks(module)]
    try:
        module.sample(noise.to(module.device), None if label is None else label.to(module.device))
    finally:
        for handle in handles:
            handle.remove()
    return sum(rows)


def _networks(module: Any) -> list[Any]:
    return list(module.members.values()) if isinstance(module, ZooModule) else [module.net]


def with_gains(rows: Sequence[Mapping[str, Any]], metric: str, mode: str) -> list[dict[str, Any]]:
    """The rows with what each saves against the first, and what that costs.

    Adds ``nfe_gain`` and ``bytes_gain``, how many times fewer evaluations and bytes; ``gain``, their product; and
    ``loss``, by how much the metric is worse, negative where it is better.
    """
    plain, sign, made = rows[0], 1 if mode == "min" else -1, []
    for row in rows:
        calls, weights = plain["nfe"] / row["nfe"], plain["megabytes"] / row["megabytes"]
        loss = sign * (row[metric] - plain[metric])
        made.append({**row, "nfe_gain": calls, "bytes_gain": weights, "gain": calls * weights, "loss": loss})
    return made


def stack_result(
    method: Stack,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    images: Mapping[str, Tensor],
    artifacts: Mapping[str, Path],
    predicted: CostEstimate | None,
) -> MethodResult:
    """Table, pictures, and the artifact of the last stage.

    Args:
        folder: of the run.
        rows: of the plain model and of each stage.
        images: likewise, made of the same noise.
        artifacts: by stage.
        predicted: the sum of what stages were to cost.
    """
    metric = method.objective.removeprefix("val/")
    table = with_gains(rows, metric, method.mode)
    stages_picture(table, folder / "figures" / "stack.png", metric)
    sampler_comparison(images, folder / "figures" / "comparison.png")
    last, names = table[-1], {"stage", "nfe", "megabytes", "nfe_gain", "bytes_gain", "gain", "loss"}
    headline = {f"val/{name}": value for name, value in last.items() if name not in names}
    headline |= {f"{metric}_plain": table[0][metric]}
    headline |= {name: float(last[name]) for name in ("nfe", "megabytes", "nfe_gain", "bytes_gain", "gain", "loss")}
    source = list(artifacts.values())[-1]
    return MethodResult(
        headline,
        method=f"stack ({', '.join(artifacts)})",
        table=table,
        notes=[
            f"each stage was measured on the same report noise, which chose nothing in any stage; loss is {metric} "
            "against the plain model, nfe counts rows of the network for one sample, megabytes all of its tensors",
            *(f"{name}: {path}" for name, path in artifacts.items()),
        ],
        predicted=predicted,
        save=lambda target, _: _copy(source, target),
    )


def _copy(source: Path, target: Path) -> None:
    """All files of an artifact; the folder that is written gets a manifest of its own."""
    io.verify_folder(source)
    for file in sorted(path for path in source.rglob("*") if path.is_file() and path != source / "manifest.json"):
        name = file.relative_to(source)
        io.create_folder((target / name).parent)
        io.copy_to_folder(file, target, name.as_posix())
