"""Speed and memory of quantized networks on a GPU: docs/results/quantized_gpu.json.

Networks of full size with random weights, in bfloat16, whose speed does not depend on the values:

- "pixart": PixArt-Sigma XL, 1024 pixels, two guidance branches, 300 tokens of text;
- "sdxl": the UNet of SDXL, 512 pixels as SDXL-Turbo, batches of 1, 4 and 16;
- "gemm": matrix products with common shapes of both, alone.

Every side is a process of its own, and all are timed in turns. A network is compiled block by block, one program for
all blocks of a kind, its whole forward pass is captured as one CUDA graph, and what is compared with is bfloat16 in the
same treatment. Milliseconds are those of one forward pass between CUDA events. Weights are what a built network holds
on the device; the peak is that of a forward pass without the graph. torchao is no dependency: put it on PYTHONPATH to
have it compared.

    make proof NAME=quantized_gpu
    python tools/proofs/quantized_gpu.py --part pixart --seconds 90 --out pixart.json
    python tools/proofs/quantized_gpu.py --join pixart.json sdxl.json gemm.json
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import _turns
from _commands import record

from genlight.io import atomic_write_json, read_json
from genlight.reports.proof import Bar, bar_at_least, bar_at_most

SECONDS = {"pixart": 90.0, "sdxl": 80.0, "gemm": 40.0}
ROUNDS, TURN_SECONDS = 5, 0.15
# a forward pass cannot be faster where linear layers, 66 % of its products, take half the time
CEILING = 1.5
BF16, EAGER, NOT_MEASURED = "bf16 compiled", "bf16 eager", "not measured"
VIDITQ, GENERIC = "W8A8 ViDiT-Q, fused", "W8A8 ViDiT-Q, inductor"
MIXDQ, W4, KERNEL = "W8A8 MixDQ", "W4A16", "W8A8 Triton kernel"
# in the order of importance
PIXART = (
    BF16,
    VIDITQ,
    GENERIC,
    "W8A8 plain, fused",
    "W8A8 plain, inductor",
    "torchao int8",
    "torchao float8 by row",
    "float8, fused",
    "W4A8 ViDiT-Q, fused",
    "W8A8 ViDiT-Q, fused, torch._int_mm",
    "W8A8 plain, no Triton kernels",
    EAGER,
)
BATCHES = (1, 4, 16)
SDXL = (BF16, MIXDQ, W4, EAGER)
GEMM = (BF16, KERNEL, "torch._int_mm alone", "torch._int_mm, compiled", "W4A8 Triton kernel", "float8")
# rows, inputs, outputs: PixArt's layers, then SDXL's at batches of 1 and 16, the last a convolution's over patches
PRODUCTS = (
    (8192, 1152, 1152),
    (8192, 1152, 4608),
    (8192, 4608, 1152),
    (1024, 640, 5120),
    (16384, 640, 640),
    (16384, 2560, 640),
    (4096, 1280, 1280),
    (4096, 1280, 10240),
    (4096, 5120, 1280),
    (4096, 11520, 1280),
)
# products of a graph, so that launching it costs nothing beside them
REPEATS = 20
REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")
TARGETS = {"pixart": r"^transformer_blocks.*(attn|ff)", "sdxl": r"^(?!conv_in|conv_out)"}


@dataclass
class Measured:
    """What a side's process times.

    Attributes:
        runs: by case.
        network: None for products alone.
        calls: how often a run does what is asked for.
    """

    runs: dict[str, Callable[[], Any]]
    network: Any = None
    calls: int = 1


def device_of() -> Any:
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def wait_for(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_device(network: Any, device: Any) -> Any:
    """A network from the device "meta" with random numbers."""
    import torch

    network.to(torch.bfloat16).to_empty(device=device)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(0, 0.02)
        else:
            tensor.data.zero_()
    return network.eval().requires_grad_(False)


def pixart(tiny: bool) -> Any:
    """On the device "meta"."""
    import torch
    from diffusers import PixArtTransformer2DModel

    heads, width = (4, 16) if tiny else (16, 72)
    made: Any = PixArtTransformer2DModel
    with torch.device("meta"):
        network = made(
            num_attention_heads=heads,
            attention_head_dim=width,
            in_channels=4,
            out_channels=8,
            num_layers=3 if tiny else 28,
            cross_attention_dim=heads * width,
            sample_size=16 if tiny else 128,
            patch_size=2,
            caption_channels=48 if tiny else 4096,
            interpolation_scale=2,
            use_additional_conditions=False,
        )
    # else the first block's input lies in memory as no other's, and has it compiled a second time
    network.pos_embed.register_forward_hook(lambda module, inputs, output: output.contiguous())
    return network


def pixart_inputs(network: Any, batch: int, device: Any) -> dict[str, Any]:
    import torch

    size, text = network.config.sample_size, network.config.caption_channels
    kind = {"device": device, "dtype": torch.bfloat16}
    return {
        "hidden_states": torch.randn(batch, 4, size, size, **kind),
        "encoder_hidden_states": torch.randn(batch, 300, text, **kind),
        "encoder_attention_mask": torch.ones(batch, 300, **kind),
        "timestep": torch.full((batch,), 500, device=device),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sdxl(tiny: bool) -> Any:
    """On the device "meta"."""
    import torch
    from diffusers import UNet2DConditionModel

    made: Any = UNet2DConditionModel
    with torch.device("meta"):
        return made(
            sample_size=8 if tiny else 64,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 64) if tiny else (320, 640, 1280),
            transformer_layers_per_block=(1, 1, 2) if tiny else (1, 2, 10),
            attention_head_dim=(2, 4, 4) if tiny else (5, 10, 20),
            cross_attention_dim=64 if tiny else 2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8 if tiny else 256,
            projection_class_embeddings_input_dim=80 if tiny else 2816,
        )


def sdxl_inputs(network: Any, batch: int, device: Any) -> dict[str, Any]:
    import torch

    config, kind = network.config, {"device": device, "dtype": torch.bfloat16}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    image = torch.randn(batch, 4, config.sample_size, config.sample_size, **kind)
    return {
        "sample": image.contiguous(memory_format=torch.channels_last),
        "timestep": torch.full((batch,), 999, device=device),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, **kind),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled, **kind),
            "time_ids": torch.full((batch, 6), 512.0, **kind),
        },
    }


def targets(network: Any, part: str) -> dict[str, Any]:
    """The layers that are quantized, by name."""
    from genlight.quantization.convert import quantizable_layers

    return {name: layer for name, layer in quantizable_layers(network).items() if re.search(TARGETS[part], name)}


def quantize_pixart(network: Any, form: Any, balanced: bool) -> None:
    """Quantize in place; layers with the same input share a scale and a rotation where they are balanced."""
    import torch

    from genlight.quantization.balance import Balance
    from genlight.quantization.convert import quantize_layer, replace_layers
    from genlight.quantization.fusion import share_balances
    from genlight.quantization.hadamard import Rotation, random_rotation

    known: dict[str, Balance] = {}
    for name, layer in targets(network, "pixart").items():
        # keys and values of the text read one input in all blocks
        source = re.sub(r"^.*attn2\.to_[kv]$", "text", re.sub(r"attn1\.to_[qkv]$", "attn1", name))
        if balanced and source not in known:
            width, device = layer.in_features, layer.weight.device
            rotation = random_rotation(width, "block", len(known))
            scale = torch.rand(width, device=device) + 0.5
            known[source] = Balance(scale, Rotation(rotation.signs.to(device), rotation.factors))
        replace_layers(network, {name: quantize_layer(layer, form, balance=known.get(source))})
    share_balances(network)


def prepare_pixart(name: str, network: Any) -> Any:
    """Make a network into a side, in place; the backend that compiles it, None for eager."""
    from genlight.quantization import integer
    from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
    from genlight.quantization.fusion import fused
    from genlight.quantization.kernels import available

    if name.startswith("torchao"):
        by_torchao(network, name)
    elif name.startswith("float8"):
        form = LayerFormat(WeightFormat(numbers="float8"), ActivationFormat(numbers="float8"))
        quantize_pixart(network, form, balanced=False)
    elif not name.startswith("bf16"):
        balanced = "ViDiT-Q" in name
        form = LayerFormat(WeightFormat(4 if name.startswith("W4") else 8, symmetric=not balanced))
        quantize_pixart(network, form, balanced)
    if "no Triton kernels" in name:
        available._has_kernels = lambda device: False  # type: ignore[assignment]
    if "torch._int_mm" in name:
        integer.triton_runs_on = lambda device: False
    if name == EAGER:
        return None
    return fused if "fused" in name else "inductor"


def by_torchao(network: Any, name: str) -> None:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    names = set(targets(network, "pixart"))
    by_row = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(
        network,
        by_row if "float8" in name else Int8DynamicActivationInt8WeightConfig(),
        lambda _, layer: layer in names,
    )


def prepare_sdxl(name: str, network: Any, splits: Mapping[str, int]) -> Any:
    """As `prepare_pixart`: ranges of any size, shortcuts split, the first token of the text kept."""
    import torch

    from genlight.quantization.constant_tokens import with_constant_rows
    from genlight.quantization.convert import quantize_layer, quantize_split, replace_layers
    from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat

    ranges = torch.tensor([[[-4.0, 4.5]]], device=network.device)
    static = LayerFormat(WeightFormat(8), ActivationFormat(8, False, "static", "tensor"))
    four = LayerFormat(WeightFormat(4), ActivationFormat(16))
    for key, layer in {} if name.startswith("bf16") else targets(network, "sdxl").items():
        if name == W4:
            made = quantize_layer(layer, four)
        elif key in splits:
            made = quantize_split(layer, static, splits[key], ranges[0].expand(2, 2))
        else:
            made = quantize_layer(layer, static, activation_range=ranges)
            if re.search(r"attn2\.to_[kv]$", key):
                first = torch.randn(1, layer.in_features, device=network.device)
                made = with_constant_rows(made, layer, (0,), first)
        replace_layers(network, {key: made})
    return None if name == EAGER else "inductor"


def compile_regions(network: Any, backend: Any) -> None:
    """Compile blocks of the kinds that repeat, and quantized layers outside of them."""
    import torch

    from genlight.quantization.layers import QuantizedLayer

    # blocks of a kind share one program for each of their shapes
    torch._dynamo.config.recompile_limit = 256
    blocks = [module for module in network.modules() if type(module).__name__ in REGIONS]
    inside = {id(part) for block in blocks for part in block.modules()}
    layers = [one for one in network.modules() if isinstance(one, QuantizedLayer) and id(one) not in inside]
    for module in [*blocks, *layers]:
        module.forward = torch.compile(module.forward, backend=backend, dynamic=False)


def network_side(part: str, name: str, batches: Sequence[int], tiny: bool) -> tuple[Measured, int]:
    """A network with its inputs, and bytes of its weights."""
    import torch

    device = device_of()
    if part == "pixart":
        network = on_device(pixart(tiny), device)
        inputs, splits = pixart_inputs, {}
    else:
        from genlight.quantization.special_inputs import concatenated_inputs

        network = sdxl(tiny)
        example = sdxl_inputs(network.to(torch.bfloat16), 1, torch.device("meta")) if name == MIXDQ else {}
        splits = concatenated_inputs(network, lambda: network(**example)) if name == MIXDQ else {}
        network, inputs = on_device(network, device).to(memory_format=torch.channels_last), sdxl_inputs
    backend = prepare_pixart(name, network) if part == "pixart" else prepare_sdxl(name, network, splits)
    weights = held(network, device)
    if backend is not None:
        compile_regions(network, backend)
    runs: dict[str, Callable[[], Any]] = {}
    for batch in batches:
        given = inputs(network, batch, device)
        runs[f"batch {batch}"] = lambda given=given: network(**given, return_dict=False)
    return Measured(runs, network), weights


def held(network: Any, device: Any) -> int:
    """Bytes of a network: on a GPU all that is allocated, as nothing else is there yet."""
    import gc

    import torch

    from genlight.quantization.accounting import tensor_bytes

    gc.collect()
    if device.type != "cuda":
        return tensor_bytes(network)
    # 32 MiB on Hopper, of the sides whose building multiplies
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(device)


def gemm_side(name: str, tiny: bool) -> Measured:
    """Products with every shape, weights with a scale for each output, inputs with one for each row, and a bias."""
    import torch
    from torch.nn import functional

    from genlight.quantization import integer
    from genlight.quantization.float8 import float8_linear
    from genlight.quantization.formats import ActivationFormat, WeightFormat
    from genlight.quantization.rows import quantize_rows
    from genlight.quantization.weights import quantize_weight

    device, kind = device_of(), torch.bfloat16
    numbers: Any = "float8" if name == "float8" else "integer"
    weight_form = WeightFormat(4 if name.startswith("W4") else 8, numbers=numbers)
    multiply: Any = float8_linear if name == "float8" else integer.integer_linear
    if "compiled" in name and name != BF16:
        integer.triton_runs_on = lambda device: False
        multiply = torch.compile(integer.integer_linear, dynamic=False)
        torch._dynamo.config.recompile_limit = 64
    runs: dict[str, Callable[[], Any]] = {}
    for rows, columns, outputs in PRODUCTS if not tiny else [(64, 32, 48)]:
        values = torch.randn(rows, columns, device=device, dtype=kind)
        matrix, bias = (
            torch.randn(outputs, columns, device=device, dtype=kind),
            torch.randn(outputs, device=device).to(kind),
        )
        case = f"{rows} × {columns} × {outputs}"
        if name == BF16:
            runs[case] = lambda x=values, w=matrix, b=bias: functional.linear(x, w, b)
            continue
        found, weight = quantize_rows(values, ActivationFormat(numbers=numbers)), quantize_weight(matrix, weight_form)
        if name.endswith("alone"):
            runs[case] = lambda q=found.codes, w=weight.codes: torch._int_mm(q, w.t())
        else:
            runs[case] = lambda q=found, w=weight, b=bias: multiply(q.codes, q.grid, w, bias=b, dtype=kind)
    return Measured(runs, calls=REPEATS)


def work(part: str, name: str, batches: Sequence[int], tiny: bool) -> None:
    """A side's process: build, compile, and answer."""
    import torch

    started, device = time.monotonic(), device_of()
    # convolutions in bf16 with the fastest of the library's kernels
    torch.backends.cudnn.benchmark = True
    if part == "gemm":
        measured, facts = gemm_side(name, tiny), dict[str, Any]()
    else:
        measured, weights = network_side(part, name, batches, tiny)
        facts = {"weights": weights, "built": round(time.monotonic() - started, 1)}
    for run in measured.runs.values():
        run()
        wait_for(device)
    if measured.network is not None and device.type == "cuda":
        facts["peak"] = {case: peak_of(run, device) for case, run in measured.runs.items()}
    _turns.say(**facts, seconds=round(time.monotonic() - started, 1))
    calls = dict[str, Callable[[], Any]]()

    def settle() -> dict[str, Any]:
        if part != "sdxl" and device.type == "cuda":
            tune_again()
        notes = {}
        for case, run in measured.runs.items():
            run()
            calls[case] = repeated(run, measured.calls)
            if device.type == "cuda" and name != EAGER:
                try:
                    calls[case] = captured(run, measured.calls)
                except Exception as error:
                    notes[case] = f"without CUDA graph: {error!r}"[:300]
        return {"notes": notes}

    def times() -> dict[str, float]:
        seconds = TURN_SECONDS / len(calls)
        return {case: milliseconds(call, device, seconds) / measured.calls for case, call in calls.items()}

    _turns.serve(settle, times)


def tune_again() -> None:
    """Have tiles chosen anew: while others compile they may have been chosen badly."""
    from genlight.quantization.kernels.integer_product import _product_kernel

    _product_kernel.cache.clear()


def peak_of(run: Callable[[], Any], device: Any) -> int:
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    run()
    wait_for(device)
    return torch.cuda.max_memory_allocated(device)


def repeated(run: Callable[[], Any], calls: int) -> Callable[[], Any]:
    def each() -> None:
        for _ in range(calls):
            run()

    return each


def captured(run: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """So many calls as one CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeated(run, calls)()
    return graph.replay


def milliseconds(call: Callable[[], Any], device: Any, seconds: float) -> float:
    """Of one call, the median over as many as fit, three at least."""
    import torch

    call()
    wait_for(device)
    found: list[float] = []
    until = time.perf_counter() + seconds
    while len(found) < 3 or (time.perf_counter() < until and len(found) < 100):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            begun = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - begun))
    return median(found)


def measure(part: str, seconds: float, out: Path, tiny: bool, only_compile: bool) -> None:
    """All sides of a part; `out` holds what is known, at any time."""
    started, sides = time.monotonic(), list[_turns.Side]()
    # of the threads that compile, each side has a few
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "3")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if part == "sdxl":
        os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    names = {"pixart": PIXART, "sdxl": SDXL, "gemm": GEMM}[part]
    batches = BATCHES if part == "sdxl" else (2,)
    wanted = [(name, (batch,)) for batch in batches for name in names if part != "sdxl" or name != EAGER]
    if part == "sdxl":
        wanted.insert(len(SDXL) - 1, (EAGER, BATCHES))
    out.parent.mkdir(parents=True, exist_ok=True)
    for index, (name, given) in enumerate(wanted):
        log = out.parent / f"{out.stem}-{index}.log"
        words = [__file__, "--part", part, "--side", name, "--batches", *map(str, given), *(["--tiny"] if tiny else [])]
        sides.append(_turns.Side(name, words, log, min(10, 2 * (index // 4))))

    def save() -> None:
        rows = rows_of(part, sides)
        atomic_write_json(out, {"part": part, "seconds": time.monotonic() - started, "rows": rows})

    _turns.take_turns(sides, seconds, 0 if only_compile else ROUNDS, save)
    for row in rows_of(part, sides):
        print("  ".join(str(value) for value in row.values() if value is not None), flush=True)


def rows_of(part: str, sides: Sequence[_turns.Side]) -> list[dict[str, Any]]:
    """Lines of the table, one for each case of each side; what failed has its reason as a note."""
    # of cases that a side never named, those of the other sides are as good
    plain = {case: side for side in sides if side.name == BF16 for case in side.rounds}
    weights = next((side.facts["weights"] for side in sides if side.name == BF16 and "weights" in side.facts), None)
    rows = []
    for side in sides:
        for case in side.rounds or [None]:
            first = plain.get(case) if case is not None else None
            peak = side.facts.get("peak", {}).get(case)
            notes = [side.facts.get("notes", {}).get(case), side.error]
            rows.append(
                {
                    "part": part,
                    "side": side.name,
                    "case": case,
                    "milliseconds": _turns.milliseconds_of(side, case) if case is not None else None,
                    "bf16 / side": _turns.speed_of(side, first, case) if first is not None else None,
                    "weights, MB": side.facts["weights"] / 1e6 if "weights" in side.facts else None,
                    "weights, share": side.facts["weights"] / weights if weights and "weights" in side.facts else None,
                    "peak, MB": peak / 1e6 if peak else None,
                    "seconds to compile": side.facts.get("seconds"),
                    "note": "; ".join(note for note in notes if note) or None,
                }
            )
    return rows


def bars_of(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """What is asked of each part; what was not measured holds nothing."""
    found = {(row["part"], row["side"], row["case"]): row for row in rows}
    weights = {(row["part"], row["side"]): row["weights, share"] for row in rows if row["weights, share"] is not None}

    def least(id: str, what: str, value: float | None, limit: float) -> Bar:
        return (
            Bar(id, what, NOT_MEASURED, f"≥ {limit:g}", False)
            if value is None
            else bar_at_least(id, what, value, limit)
        )

    def most(id: str, what: str, value: float | None, limit: float) -> Bar:
        return (
            Bar(id, what, NOT_MEASURED, f"≤ {limit:g}", False) if value is None else bar_at_most(id, what, value, limit)
        )

    def speed(part: str, side: str, case: str) -> float | None:
        value: float | None = found.get((part, side, case), {}).get("bf16 / side")
        return value

    pixel = "PixArt-Sigma XL, 1024 pixels, latency of a step, bf16 compiled /"
    products = [
        speed("gemm", KERNEL, row["case"])
        for row in rows
        if (row["part"], row["side"]) == ("gemm", BF16) and row["case"]
    ]
    measured = [value for value in products if value is not None]
    slowest = min(measured) if measured and len(measured) == len(products) else None
    return [
        most("memory-pixart-w8", "PixArt-Sigma XL: weights, W8A8 / bf16", weights.get(("pixart", VIDITQ)), 0.55),
        least("speed-pixart-generic", f"{pixel} {GENERIC}", speed("pixart", GENERIC, "batch 2"), 1.15),
        least("speed-pixart-fused", f"{pixel} {VIDITQ}", speed("pixart", VIDITQ, "batch 2"), 1.3),
        most("memory-sdxl-w8", "UNet of SDXL: weights, W8A8 / bf16", weights.get(("sdxl", MIXDQ)), 0.55),
        most("memory-sdxl-w4", "UNet of SDXL: weights, W4 / bf16", weights.get(("sdxl", W4)), 0.32),
        least(
            "gemm", f"bf16 / int8 product, the slowest of {len(products)} shapes of 1024 rows and more", slowest, 1.2
        ),
    ]


def join(files: Sequence[Path]) -> None:
    """Parts to docs/results/quantized_gpu.json."""
    parts = [read_json(file) for file in files]
    rows = [row | {"of the ceiling": None} for part in parts for row in part["rows"]]
    for row in rows:
        if row["part"] == "pixart" and row["bf16 / side"] is not None:
            row["of the ceiling"] = row["bf16 / side"] / CEILING
    record("quantized_gpu", bars_of(rows), rows, [0], time.monotonic() - sum(part["seconds"] for part in parts))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(SECONDS), help="measure this one, and write --out")
    parser.add_argument("--seconds", type=float, help="that it may take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only-compile", action="store_true", help="fill the caches of compilers, and time nothing")
    parser.add_argument("--join", nargs="+", type=Path, help="parts to make the record of")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--batches", nargs="+", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        try:
            with torch.no_grad():
                work(given.part, given.side, given.batches, given.tiny)
        except Exception as error:
            _turns.say(error=f"{type(error).__name__}: {error}")
            raise
    elif given.join:
        join(given.join)
    elif not (torch.cuda.is_available() or given.tiny):
        print("quantized_gpu needs a GPU with CUDA: nothing was measured")
    elif given.part:
        measure(given.part, given.seconds or SECONDS[given.part], given.out, given.tiny, given.only_compile)
    else:
        with TemporaryDirectory() as folder:
            files = [Path(folder) / f"{part}.json" for part in SECONDS]
            for part, file in zip(SECONDS, files, strict=True):
                measure(part, SECONDS[part], file, given.tiny, False)
            join(files)


if __name__ == "__main__":
    main()
