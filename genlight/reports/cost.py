"""What a run will cost: time with an interval from a few measured steps, memory, disk. And the MACs of a network."""

from __future__ import annotations

import math
import re
import resource
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight.reports.report import duration, seconds_of, size

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

# two-sided, of the interval that three steps give
CONFIDENCE = 0.9
# what three steps cannot show: other processes, clocks that throttle, a cache that fills
DRIFT = 0.15
# files are written beside what they replace, and the rest of the machine needs room too
DISK_MARGIN = 1.1


@dataclass(frozen=True)
class Phase:
    """Steps of one kind.

    Attributes:
        name: e.g. "training step", "batch of samples".
        seconds: measured times of single steps after warm-up.
        count: how many of them the run will do.
    """

    name: str
    seconds: tuple[float, ...]
    count: int

    def __post_init__(self) -> None:
        if not self.seconds or not all(math.isfinite(second) and second >= 0 for second in self.seconds):
            raise ValueError(f'phase "{self.name}" needs measured times that are finite, got {self.seconds}')
        if self.count < 0:
            raise ValueError(f'phase "{self.name}" has a count of {self.count}')

    @property
    def total(self) -> float:
        return statistics.fmean(self.seconds) * self.count

    @property
    def half_width(self) -> float:
        """Half the interval of the total: Student's t for the mean of few steps, and the drift of long runs on top.

        Total T = Σ of N new steps; from n measured ones with deviation s, T = N·mean ± t·s·√(N²/n + N).
        """
        measured = len(self.seconds)
        drift = DRIFT * self.total
        if measured < 2:
            return self.total  # one step says nothing of its spread
        from scipy.special import stdtrit

        quantile = float(stdtrit(measured - 1, 0.5 + CONFIDENCE / 2))
        spread = statistics.stdev(self.seconds) * math.sqrt(self.count**2 / measured + self.count)
        return math.hypot(quantile * spread, drift)


@dataclass(frozen=True)
class PlannedFile:
    """Files that will be written: ``bytes`` each, ``count`` of them kept at once."""

    name: str
    bytes: int
    count: int = 1


@dataclass(frozen=True)
class CostEstimate:
    """What a run will cost; times in seconds, sizes in bytes.

    Attributes:
        total_seconds: expected wall time, with ``low_seconds`` and ``high_seconds`` as its interval.
        peak_memory_bytes: largest resident size so far, of this process.
        peak_gpu_bytes: largest allocation so far, over all GPUs of this process; None without one.
        disk_needed_bytes: all planned files with a margin.
        disk_free_bytes: free where the run folder lies.
    """

    total_seconds: float
    low_seconds: float
    high_seconds: float
    peak_memory_bytes: int
    peak_gpu_bytes: int | None
    disk_needed_bytes: int
    disk_free_bytes: int
    phases: tuple[Phase, ...] = ()
    files: tuple[PlannedFile, ...] = ()
    setup_seconds: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For "predicted" in report.json; keys that end in seconds or bytes are compared with what it really took."""
        values = asdict(self)
        for name in ("phases", "files", "extra"):
            values.pop(name)
        steps = {phase.name: phase.count for phase in self.phases}
        means = {phase.name: statistics.fmean(phase.seconds) for phase in self.phases}
        totals = {phase.name: phase.total for phase in self.phases}
        files = {file.name: {"bytes": file.bytes, "count": file.count} for file in self.files}
        return {**values, **self.extra, "steps": steps, "step_seconds": means, "phase_seconds": totals, "files": files}

    @property
    def fits_on_disk(self) -> bool:
        return self.disk_needed_bytes <= self.disk_free_bytes

    def line(self) -> str:
        """The time, for the person who waits."""
        low, high = duration(self.low_seconds), duration(self.high_seconds)
        return f"about {duration(self.total_seconds)} in all ({low} to {high})"

    def table(self) -> Table:
        """For the terminal."""
        from rich.table import Table

        table = Table(title="What this run will cost", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        for phase in self.phases:
            mean = duration(statistics.fmean(phase.seconds))
            table.add_row(phase.name, f"{phase.count:,} × {mean} = {duration(phase.total)}")
        if self.setup_seconds:
            table.add_row("setup", duration(self.setup_seconds))
        table.add_row("time", self.line())
        table.add_row("peak memory so far", size(self.peak_memory_bytes))
        if self.peak_gpu_bytes is not None:
            table.add_row("peak GPU memory so far", size(self.peak_gpu_bytes))
        for file in self.files:
            table.add_row(file.name, f"{file.count:,} × {size(file.bytes)}")
        warning = "" if self.fits_on_disk else "  NOT ENOUGH"
        disk = f"{size(self.disk_needed_bytes)} needed, {size(self.disk_free_bytes)} free{warning}"
        table.add_row("disk", disk, style=None if self.fits_on_disk else "red")
        for name, value in self.extra.items():
            table.add_row(name.replace("_", " "), f"{value:,.4g}")
        return table


def estimate(
    phases: Sequence[Phase],
    files: Sequence[PlannedFile],
    folder: str | Path,
    *,
    setup_seconds: float = 0.0,
    extra: dict[str, float] | None = None,
) -> CostEstimate:
    """Estimates a run from steps measured in this process, after which its peak memory is known.

    Args:
        phases: the steps it consists of.
        files: what it will keep on disk.
        folder: where; it need not exist yet.
        setup_seconds: time before the first step.
        extra: more numbers for the report, e.g. {"macs_per_sample": 1e9}.
    """
    total = setup_seconds + sum(phase.total for phase in phases)
    half = math.sqrt(sum(phase.half_width**2 for phase in phases))
    return CostEstimate(
        total_seconds=total,
        low_seconds=max(setup_seconds, total - half),
        high_seconds=total + half,
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_bytes=peak_gpu_bytes(),
        disk_needed_bytes=math.ceil(DISK_MARGIN * sum(file.bytes * file.count for file in files)),
        disk_free_bytes=free_bytes(folder),
        phases=tuple(phases),
        files=tuple(files),
        setup_seconds=setup_seconds,
        extra=dict(extra or {}),
    )


def longer(estimated: CostEstimate, phases: Sequence[Phase], folder: str | Path) -> CostEstimate:
    """An estimate of the same run with more phases."""
    every = (*estimated.phases, *phases)
    return estimate(every, estimated.files, folder, setup_seconds=estimated.setup_seconds, extra=estimated.extra)


def after_trainings(estimated: CostEstimate, seconds: Mapping[str, tuple[float, float, float]]) -> CostEstimate:
    """An estimate of a run that begins with the fits of others: by name of the fit its total, low and high seconds."""
    total, low, high = (sum(each[i] for each in seconds.values()) for i in range(3))
    return replace(
        estimated,
        total_seconds=estimated.total_seconds + total,
        low_seconds=estimated.low_seconds + low,
        high_seconds=estimated.high_seconds + high,
        phases=(*(Phase(f"training of {name}", each[:1], 1) for name, each in seconds.items()), *estimated.phases),
    )


_LINE = re.compile(r"about (.+?) in all \((.+?) to (.+?)\)")


def seconds_said(text: str) -> tuple[float, float, float] | None:
    """Total, low and high seconds of the line of a `CostEstimate` somewhere in a text; None without one."""
    found = _LINE.search(text)
    if found is None:
        return None
    total, low, high = (seconds_of(part) for part in found.groups())
    return total, low, high


def real_cost(wall_seconds: float, phase_seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What the run really took, under the keys of ``CostEstimate.to_dict``, for "real" in report.json."""
    values: dict[str, Any] = {
        "total_seconds": wall_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "phase_seconds": dict(phase_seconds or {}),
    }
    gpu = peak_gpu_bytes()
    return values if gpu is None else {**values, "peak_gpu_bytes": gpu}


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far (getrusage: KiB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes() -> int | None:
    """Largest allocation of this process so far, summed over its GPUs; None if it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return sum(int(torch.cuda.max_memory_allocated(index)) for index in range(torch.cuda.device_count()))


def count_macs(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of one call of a module: matrix products, convolutions and attention.

    torch.utils.flop_counter, with what it misses: attention on a CPU has no formula there (it counts 0), and the fused
    path of nn.TransformerEncoderLayer and nn.MultiheadAttention under no_grad is one opaque operator, so that path is
    switched off while counting. Causal attention counts as full. A compiled module is counted uncompiled. Element-wise
    work is not counted.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module = getattr(module, "_orig_mod", module)
    aten = torch.ops.aten
    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")
    formulas = {getattr(aten, name): _attention_flops for name in names if hasattr(aten, name)}
    fused = torch.backends.mha.get_fastpath_enabled()
    modes = [(part, part.training) for part in module.modules()]
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    try:
        # in inference mode the counter would see operators that are not broken into parts
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with torch.inference_mode(False), torch.no_grad(), counter:
            module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for part, training in modes:
            part.training = training
    return int(counter.get_total_flops()) // 2


def network_macs(module: Any) -> dict[str, float]:
    """Multiply-accumulates of one call of a generator's network for one sample; nothing for other modules."""
    if not hasattr(module, "predict") or not hasattr(module, "sample_shape"):
        return {}
    import torch

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module.net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            label = torch.zeros(1, dtype=torch.long, device=x.device) if module.class_conditional else None
            return torch.as_tensor(module.predict(x, torch.ones(1, device=x.device), label))

    return {
        "macs_per_network_call": float(count_macs(Call(), torch.zeros(1, *module.sample_shape, device=module.device)))
    }


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Two per multiply-accumulate of Q Kᵀ and of the weights times V; shapes [batch, heads, tokens, channels]."""
    batch, heads, queries, channels = query
    return 2 * batch * heads * queries * key[-2] * (channels + value[-1])


def free_bytes(folder: str | Path) -> int:
    """Free space where a folder lies, or will lie."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
