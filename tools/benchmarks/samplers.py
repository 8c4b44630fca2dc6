"""What a table of weights costs in sampling, and what evaluating several schedules in one batch saves, in one run.

Two measurements, each of two sides in alternating rounds, so that a change of the machine's speed meets both:

- step: `SolverScheduleScheduler.step` against diffusers' `DPMSolverMultistepScheduler.step`, all steps of one sampling
  with given outputs in place of a network. "dpmpp_2m" is the same solver on the same timesteps, "unipc_3_bh2" one of
  third order with correctors, which diffusers' side is not.
- together: S schedules with equally many evaluations by one `sample_many` against S times `sample`, with the network of
  a pipeline folder, or a small random UNet without one.

Printed is one line of JSON: device, versions, and two lists. "step": shape, nfe, solver, median microseconds of a step
on both sides, ratio ours/theirs. "together": schedules, nfe, batch, rows that went through the network and median
seconds on both sides, ratio together/one by one, largest difference of the samples over the largest sample. Ratios are
medians over the rounds of the ratio within a round.

    python tools/benchmarks/samplers.py --rounds 15
    python tools/benchmarks/samplers.py --pipeline runs/demo/fit/artifact --device cuda --batch 64
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from genlight.diffusion.export_scheduler import scheduler_of
from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.presets import named_schedule, preset
from genlight.diffusion.solver.sample import sample, sample_many
from genlight.diffusion.solver.serialization import SolverBank
from genlight.diffusion.solver.spacings import SPACINGS
from genlight.modules.exported_pipeline import network_shape, network_style, predict
from genlight.modules.networks import label_rows
from genlight.modules.pretrained import read_pipeline

SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (1, 4, 128, 128), (8, 4, 128, 128))
SAME = "dpmpp_2m"
SOLVERS = (SAME, "unipc_3_bh2")
# candidates of a search differ in times and orders
CANDIDATES = ("dpmpp_2m", "dpmpp_3m", "unip_2_bh2", "deis_2")

Model = Callable[[Tensor, Tensor], Tensor]
Side = Callable[[], float]


def compare(ours: Side, theirs: Side, rounds: int) -> tuple[float, float, float]:
    """Median seconds of both sides, and the median of their ratio, after one round that does not count."""
    seconds: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        if turn % 2:
            first = ours()
            seconds.append((first, theirs()))
        else:
            second = theirs()
            seconds.append((ours(), second))
    own, other = zip(*seconds[1:], strict=True)
    return statistics.median(own), statistics.median(other), statistics.median(a / b for a, b in seconds[1:])


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds until the device has done what `run` asks of it."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: str) -> None:
    """Until the device has nothing left to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure_step(shape: tuple[int, ...], nfe: int, solver: str, rounds: int, device: str) -> dict[str, Any]:
    """One row of "step"."""
    prediction = Prediction("epsilon", VPSchedule())
    theirs = build_scheduler("DPMSolverMultistepScheduler", prediction.schedule, "epsilon")
    theirs.set_timesteps(nfe)
    times = (*(float(t) for t in theirs.timesteps), None)
    ours = scheduler_of(SolverBank.of(prediction, {nfe: preset(solver, prediction.schedule, times)}))
    generator = torch.Generator().manual_seed(0)
    noise, *outputs = (torch.randn(shape, generator=generator).to(device) for _ in range(nfe + 1))
    results: dict[str, Tensor] = {}

    def steps(scheduler: Any) -> None:
        x = noise
        for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
            x = scheduler.step(output, timestep, x, return_dict=False)[0]
        results[type(scheduler).__name__] = x

    def side(scheduler: Any) -> float:
        scheduler.set_timesteps(nfe, device=device)  # not part of the time
        return timed(lambda: steps(scheduler), device)

    own, other, ratio = compare(lambda: side(ours), lambda: side(theirs), rounds)
    if solver == SAME:
        one, two = results.values()
        assert (one - two).abs().max() <= 1e-4 * two.abs().max(), "the two sides do not take the same steps"
    microseconds = {"ours_us": round(1e6 * own / nfe, 1), "theirs_us": round(1e6 * other / nfe, 1)}
    return {"shape": list(shape), "nfe": nfe, "solver": solver, **microseconds, "ratio": round(ratio, 3)}


def model_of(folder: str | None, device: str, batch: int) -> tuple[Model, Prediction, tuple[int, int, int], list[int]]:
    """The network of a folder or a small random one, what it predicts, its input shape, and the count of its rows."""
    if folder is None:
        torch.manual_seed(0)
        unet: Any = diffusers.UNet2DModel  # diffusers leaves it without types
        network = unet(sample_size=32, block_out_channels=(32, 64, 64, 64), norm_num_groups=8)
        prediction = Prediction("epsilon", VPSchedule())
    else:
        pipeline = read_pipeline(Path(folder))
        network, prediction = pipeline.network, Prediction(pipeline.prediction_type, pipeline.noise_schedule)
    network = network.to(device).eval()
    style, classes, rows = network_style(network), label_rows(network), [0]

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        rows[0] += len(x)
        # the same labels for each of several schedules
        label = None if classes is None else torch.arange(len(x), device=x.device) % batch % classes
        return predict(network, style, x, timestep, label)

    return model, prediction, network_shape(network), rows


def candidates(prediction: Prediction, nfe: int, count: int) -> list[SolverTable]:
    """Tables of different schedules, as a search compares them."""
    tables = []
    for spacing in SPACINGS:
        for solver in CANDIDATES:
            try:
                schedule = named_schedule(solver, prediction.schedule, nfe, spacing=spacing)
                tables.append(compile_schedule(schedule, prediction.schedule))
            except ValueError:
                continue  # a spacing or solver that this noise schedule does not have
    if len(tables) < count:
        raise SystemExit(f"--schedules {count}: only {len(tables)} different ones are known here")
    return tables[:: len(tables) // count][:count]


@torch.no_grad()
def measure_together(
    model: Model, prediction: Prediction, noise: Tensor, nfe: int, count: int, rows: list[int], rounds: int
) -> dict[str, Any]:
    """One row of "together"."""
    tables, device = candidates(prediction, nfe, count), noise.device.type
    counted, results = {}, {}

    def side(name: str, run: Callable[[], Tensor]) -> float:
        rows[0] = 0

        def kept() -> None:
            results[name] = run()

        seconds = timed(kept, device)
        counted[name] = rows[0]
        return seconds

    def together() -> Tensor:
        return sample_many(model, noise, tables, prediction)

    def one_by_one() -> Tensor:
        return torch.stack([sample(model, noise, table, prediction) for table in tables])

    own, other, ratio = compare(lambda: side("together", together), lambda: side("one_by_one", one_by_one), rounds)
    off = (results["together"] - results["one_by_one"]).abs().max() / results["one_by_one"].abs().max()
    return {
        "schedules": count,
        "nfe": nfe,
        "batch": len(noise),
        "rows_together": counted["together"],
        "rows_one_by_one": counted["one_by_one"],
        "together_s": round(own, 5),
        "one_by_one_s": round(other, 5),
        "ratio": round(ratio, 3),
        "largest_relative_difference": float(f"{off:.1e}"),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows of both measurements."""
    device, rounds = arguments.device, arguments.rounds
    name = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    )
    step = [
        measure_step(shape, nfe, solver, rounds, device)
        for shape in SHAPES
        for nfe in arguments.nfe
        for solver in SOLVERS
    ]
    model, prediction, shape, rows = model_of(arguments.pipeline, device, arguments.batch)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(arguments.batch, *shape, generator=generator).to(device)
    together = [
        measure_together(model, prediction, noise, nfe, count, rows, rounds)
        for nfe in arguments.nfe
        for count in arguments.schedules
    ]
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"device": name, **versions, "rounds": rounds, "step": step, "together": together}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="a diffusers pipeline folder; a small random UNet without one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--schedules", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options)))
