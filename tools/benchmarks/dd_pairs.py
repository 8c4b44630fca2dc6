"""What pairs of noise and tokens cost: a cache and 2M with 32 steps against none and Euler with 200; memory of a snap.

Two networks with random weights, one of tokens in raster order, one of scales. Three sides:

- pairs: as `genlight.modules.dd_pairs` makes them;
- plain: no cache of keys and values, Euler with 200 steps, the tokens of a scale one position after the other;
- tokens: as plain, but every token of every image by a call of its own, on `--single` images.

Printed is one line of JSON: milliseconds an image of each, medians over the rounds, and the ratios plain / pairs
(`pairs_speed`) and tokens / pairs. Then the memory above its inputs of `nearest_codes` for `--snap-tokens` vectors
(`snap_bytes`), beside that of a chunk of distances (`chunk_bytes`), of a table of all differences (`table_bytes`), and
of `transport` for a quarter of them.

    python tools/benchmarks/dd_pairs.py
    python tools/benchmarks/dd_pairs.py --device cuda --images 1024 --codes 4096 --code-dim 32 --width 512
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlight.diffusion.flow_codes import flow_choice, transport
from genlight.nets.autoregressive import AutoregressiveModel, SamplingSettings, decode
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer
from genlight.nets.residual_vq import ResidualQuantizer
from genlight.nets.var import VAR, VARTransformer
from genlight.nets.vq import VectorQuantizer, nearest_codes

CLASSES, HEADS, LAYERS = 10, 4, 4


def models(codes: int, code_dim: int, width: int, device: str) -> dict[str, AutoregressiveModel]:
    """49 tokens in raster order; 91 tokens on scales 1 to 6."""
    scales = (1, 2, 3, 4, 5, 6)
    raster = LlamaGenTransformer(codes, 7, width, LAYERS, HEADS, CLASSES, multiple_of=64)
    torch.nn.init.normal_(raster.head.weight, std=width**-0.5)
    by_scale = VARTransformer(codes, code_dim, scales, width, LAYERS, HEADS, CLASSES)
    torch.nn.init.normal_(by_scale.head.weight, std=width**-0.5)
    flat, residual = VectorQuantizer(codes, code_dim), ResidualQuantizer(codes, code_dim, scales)
    for quantizer in (flat, residual):
        torch.nn.init.normal_(quantizer.embedding.weight)
    return {
        "raster": LlamaGen(raster.to(device).eval(), flat.to(device)),
        "scales": VAR(by_scale.to(device).eval(), residual.to(device)),
    }


@torch.no_grad()
def pairs(model: AutoregressiveModel, noise: Tensor, label: Tensor) -> Tensor:
    choose = flow_choice(noise, model.codebook, model.group_sizes)
    return decode(model, label, SamplingSettings(), choose)


@torch.no_grad()
def plain(model: AutoregressiveModel, noise: Tensor, label: Tensor) -> Tensor:
    tokens = label.new_zeros(noise.shape[:2])
    ends = itertools.accumulate(model.group_sizes, initial=0)
    for start, end in itertools.pairwise(ends):
        log_probs = model.logits(tokens, label).log_softmax(-1)
        for place in range(start, end):
            found = transport(noise[:, place], log_probs[:, place], model.codebook, steps=200, method="euler")
            tokens[:, place] = found[1]
    return tokens


def one_by_one(model: AutoregressiveModel, noise: Tensor, label: Tensor) -> Tensor:
    return torch.cat([plain(model, noise[row : row + 1], label[row : row + 1]) for row in range(len(noise))])


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds until the device has done what `run` asks of it."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def speed(model: AutoregressiveModel, images: int, single: int, rounds: int, device: str) -> dict[str, Any]:
    """Milliseconds an image of each side; the first round does not count."""
    noise = torch.randn(images, sum(model.group_sizes), model.codebook.shape[1], device=device)
    label = torch.arange(images, device=device) % CLASSES
    sides: dict[str, tuple[Callable[..., Tensor], int]] = {
        "pairs": (pairs, images),
        "plain": (plain, images),
        "tokens": (one_by_one, single),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, (run, count) in sides.items():
            seconds[name].append(timed(lambda r=run, n=count: r(model, noise[:n], label[:n]), device) / count)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    same = (pairs(model, noise[:single], label[:single]) == plain(model, noise[:single], label[:single])).float().mean()
    result: dict[str, Any] = {f"{name}_ms": round(1e3 * value, 3) for name, value in median.items()}
    result["pairs_speed"] = round(median["plain"] / median["pairs"], 2)
    result["tokens_over_pairs"] = round(median["tokens"] / median["pairs"], 2)
    return result | {"same_tokens": round(float(same), 4)}


def memory(run: Callable[[], Any], device: str) -> int:
    """Bytes that `run` needs above what is held before; on a CPU the process's largest size less that, which is more
    where it has been larger before.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def snap(tokens: int, codes: int, code_dim: int, device: str) -> dict[str, Any]:
    """Memory of the search for nearest codes, and of the flow."""
    vectors, codebook = torch.randn(tokens, code_dim, device=device), torch.randn(codes, code_dim, device=device)
    nearest_codes(vectors[:64], codebook)
    some = tokens // 4
    result = {
        "snap_tokens": tokens,
        "snap_codes": codes,
        "snap_bytes": memory(lambda: nearest_codes(vectors, codebook), device),
        "chunk_bytes": 4 * tokens * signature(nearest_codes).parameters["chunk_size"].default,
        "table_bytes": 4 * tokens * codes * code_dim,
    }
    log_probs = torch.zeros(some, codes, device=device)
    result["transport_bytes"] = memory(lambda: transport(vectors[:some], log_probs, codebook, steps=3), device)
    return result | {"transport_input_bytes": log_probs.nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--single", type=int, default=2)
    parser.add_argument("--codes", type=int, default=512)
    parser.add_argument("--code-dim", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--snap-tokens", type=int, default=64 * 680)
    parser.add_argument("--snap-codes", type=int, default=4096)
    parser.add_argument("--snap-code-dim", type=int, default=32)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = arguments.device
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        # first, before anything else has made the process large
        "snap": snap(arguments.snap_tokens, arguments.snap_codes, arguments.snap_code_dim, device),
    }
    for name, model in models(arguments.codes, arguments.code_dim, arguments.width, device).items():
        report[name] = speed(model, arguments.images, arguments.single, arguments.rounds, device)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
