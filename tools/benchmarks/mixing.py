"""What one combination of K checkpoints costs, against the machine's copying and against averaging state dicts.

Four sides in alternating rounds, so that a change of the machine's speed meets all of them, on a network of linear
layers and a trajectory on disk:

- mix: `WeightMixer.mix` with the differences on the device, all coefficients other than zero;
- streamed: the same with no room on the device, from memory-mapped files (in the page cache);
- copy: `torch.Tensor.copy_` of as many bytes as `mix` reads;
- state_dicts: K times `safetensors.torch.load_file`, a weighted sum by parameter, and `load_state_dict`.

Printed is one line of JSON: median milliseconds of each; `share_of_copy`, the bytes that `mix` reads per second over
those that `copy_` reads and writes per second; `share_of_read`, the same over those that `copy_` reads alone; and
`state_dicts_over_mix`. Ratios are medians over the rounds of the ratio within a round. Then the same for `bins`, the
default basis of a search.

    python tools/benchmarks/mixing.py --parameters 1000000 --members 50
    python tools/benchmarks/mixing.py --parameters 55700000 --members 150 --device cuda --folder /tmp/trajectory
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from genlight.checkpoints.bases import Basis, GeometricBins, Raw
from genlight.checkpoints.mixing import WeightMixer
from genlight.checkpoints.trajectory import Trajectory
from genlight.checkpoints.writer import TrajectoryWriter

WIDTH = 256


def network(parameters: int) -> nn.Module:
    """Linear layers with about so many parameters."""
    layers = max(1, round(parameters / (WIDTH * WIDTH + WIDTH)))
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))


def written(folder: Path, module: nn.Module, members: int) -> Trajectory:
    """A trajectory of random steps from the module's weights."""
    weights = {name: tensor.detach().cpu() for name, tensor in module.named_parameters()}
    writer = TrajectoryWriter(
        folder, {name: tensor.shape for name, tensor in weights.items()}, {}, every_n_steps=1, max_members=members
    )
    for step in range(1, members + 1):
        weights = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in weights.items()}
        writer.append(step, weights)
    writer.close()
    return Trajectory.open(folder, check="names")


def averaged(trajectory: Trajectory, module: nn.Module, weights: np.ndarray) -> None:
    """Load, sum and load into the module, as one would by hand."""
    total: dict[str, torch.Tensor] = {}
    device = str(next(module.parameters()).device)
    for member, weight in zip(trajectory.members, weights.tolist(), strict=True):
        for name, tensor in safetensors.torch.load_file(trajectory.folder / member.file, device=device).items():
            total[name] = total[name] + weight * tensor if name in total else weight * tensor
    module.load_state_dict(total)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done what `run` asks of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(
    trajectory: Trajectory, module: nn.Module, basis: Basis, rounds: int, sides: tuple[str, ...]
) -> dict[str, Any]:
    """Medians of one basis; the first round does not count."""
    device = next(module.parameters()).device
    mixer = WeightMixer(trajectory, module, basis=basis, device_bytes=1 << 60)
    streamed = WeightMixer(trajectory, module, basis=basis, device_bytes=0)
    size = mixer.coordinates.size
    alpha = np.random.default_rng(0).normal(0, 0.2, size)
    weights = mixer.coordinates.to_members(alpha)
    # the differences and the newest member, once each
    numbers = (size + 1) * sum(p.numel() for p in module.parameters())
    source, target = (torch.ones(numbers, device=device) for _ in range(2))
    runs: dict[str, Callable[[], Any]] = {
        "mix": lambda: mixer.mix(alpha),
        "copy": lambda: target.copy_(source),
        "streamed": lambda: streamed.mix(alpha),
        "state_dicts": lambda: averaged(trajectory, module, weights),
    }
    seconds: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        order = sides if turn % 2 else sides[::-1]
        seconds.append({side: timed(runs[side], device) for side in order})
    result: dict[str, Any] = {"vectors": size + 1, "bytes_read": 4 * numbers}
    for side in sides:
        result[f"{side}_ms"] = round(1e3 * statistics.median(row[side] for row in seconds[1:]), 2)
    share = statistics.median(row["copy"] / row["mix"] for row in seconds[1:])
    result |= {"share_of_copy": round(share / 2, 3), "share_of_read": round(share, 3)}
    if "state_dicts" in sides:
        ratio = statistics.median(row["state_dicts"] / row["mix"] for row in seconds[1:])
        result["state_dicts_over_mix"] = round(ratio, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--members", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="where the trajectory is written, and left; a temporary folder without it")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    module = network(arguments.parameters).to(arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        trajectory = written(Path(arguments.folder or temporary), module, arguments.members)
        every = ("mix", "copy", "streamed", "state_dicts")
        report = {
            "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in module.parameters()),
            "members": arguments.members,
            "raw": measure(trajectory, module, Raw(), arguments.rounds, every),
            "bins": measure(trajectory, module, GeometricBins(), arguments.rounds, every[:2]),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
