"""What a quantized linear layer takes against the same layer in floating point, with what stands before it, in one run.

Sides in alternating rounds, so that a change of the machine's speed meets all of them, on random numbers:

- fp32 and bf16: `torch.nn.Linear`;
- w8a8: codes per token and per output channel, multiplied in integers;
- w4a8: the same with weights of four bits, stored packed;
- w8a8_balanced: scale and block rotation of the input on top;
- float8: weight and input in float8, on a GPU that has it;
- product: the integer product of w8a8 alone, on codes that are there already;
- norm_… and gelu_…: a norm with modulation, or GELU, and then the layer: bf16; w8a8_balanced; and the latter with what
  stands before it taken into the kernel (fused), with `--compile` on a GPU with Triton's kernels.

With `--compile` all layers are compiled, which is how they should be compared on a GPU. Quantized layers take and
give float32 on the CPU, and bf16 on CUDA. A kernel is worth keeping where its side is faster than the one without.
Printed is one line of JSON: device, versions, threads, whether Triton's
kernels ran, median milliseconds of each side, and for each quantized side the ratios fp32 / side and bf16 / side: above
1 the quantized layer is faster. Ratios are medians over the rounds of the ratio within a round.

    python tools/benchmarks/quantized_linear.py --rounds 7
    python tools/benchmarks/quantized_linear.py --device cuda --compile --tokens 8192 --outputs 4608
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from genlight.quantization.balance import Balance
from genlight.quantization.convert import quantize_layer
from genlight.quantization.float8 import require_float8
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.fusion import fused
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.integer import integer_linear
from genlight.quantization.kernels.available import triton_runs_on
from genlight.quantization.layers import QuantizedLinear
from genlight.quantization.rows import quantize_rows

FLOATS = ("fp32", "bf16")
FLOAT8 = LayerFormat(WeightFormat(numbers="float8"), ActivationFormat(numbers="float8"))


class Prologue(nn.Module):
    """A linear layer after a norm with modulation, or after GELU, as in a block of a transformer."""

    def __init__(self, layer: nn.Module, kind: str, width: int) -> None:
        super().__init__()
        self.layer, self.kind = layer, kind
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.register_buffer("modulation", torch.randn(2, 1, 1, width))

    def forward(self, values: Tensor) -> Tensor:
        if self.kind == "gelu":
            return self.layer(functional.gelu(values, approximate="tanh"))
        scale, shift = self.modulation
        return self.layer(self.norm(values) * (1 + scale) + shift)


def sides(width: int, outputs: int, tokens: int, device: torch.device, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    layer, values = nn.Linear(width, outputs), torch.randn(tokens, width)
    kind = torch.float32 if device.type == "cpu" else torch.bfloat16
    form, balance = LayerFormat(), Balance(torch.ones(width), random_rotation(width, "block", 0))
    layers: dict[str, tuple[nn.Module, torch.dtype]] = {
        "fp32": (nn.Linear(width, outputs), torch.float32),
        "bf16": (nn.Linear(width, outputs), torch.bfloat16),
        "w8a8": (quantize_layer(layer, form), kind),
        "w4a8": (quantize_layer(layer, LayerFormat(WeightFormat(4), ActivationFormat(8))), kind),
        "w8a8_balanced": (quantize_layer(layer, form, balance=balance), kind),
    }
    if has_float8(device):
        layers["float8"] = (quantize_layer(layer, FLOAT8), kind)
    for before in ("norm", "gelu"):
        plain = nn.Linear(width, outputs)
        layers[f"{before}_bf16"] = (Prologue(plain, before, width), torch.bfloat16)
        for side in ("w8a8_balanced", *(["fused"] if compiled and triton_runs_on(device) else [])):
            made = quantize_layer(layer, form, balance=balance)
            layers[f"{before}_{side}"] = (Prologue(made, before, width), kind)
    runs: dict[str, Callable[[], Any]] = {}
    for name, (module, dtype) in layers.items():
        module = module.to(device, dtype).eval()
        backend = fused if name.endswith("fused") else "inductor"
        call = torch.compile(module, fullgraph=True, backend=backend) if compiled else module
        inputs = values.to(device, dtype)[None]
        runs[name] = lambda call=call, inputs=inputs: call(inputs)
    quantized = layers["w8a8"][0]
    assert isinstance(quantized, QuantizedLinear)
    weight, found = quantized.quantized_weight, quantize_rows(values.to(device), form.activation)
    assert weight is not None

    def product(codes: Tensor, scale: Tensor) -> Tensor:
        return integer_linear(codes, type(found.grid)(scale, None, 8), weight, dtype=kind)

    multiply = torch.compile(product, fullgraph=True) if compiled else product
    runs["product"] = lambda: multiply(found.codes, found.grid.scale)
    return runs


def has_float8(device: torch.device) -> bool:
    """Whether it multiplies such numbers."""
    try:
        require_float8(device)
    except ValueError:
        return False
    return device.type == "cuda"


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of one call, until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--outputs", type=int, help="as the width without it")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    outputs = arguments.outputs or arguments.width
    seconds: list[dict[str, float]] = []
    with torch.inference_mode():
        runs = sides(arguments.width, outputs, arguments.tokens, device, arguments.compile)
        # the first round does not count: it compiles and chooses tiles
        for turn in range(arguments.rounds + 1):
            order = list(runs) if turn % 2 else list(runs)[::-1]
            seconds.append({name: timed(runs[name], device, 20 if device.type == "cuda" else 1) for name in order})
    rounds = seconds[1:]
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_runs_on(device),
        "compiled": arguments.compile,
        "tokens": arguments.tokens,
        "width": arguments.width,
        "outputs": outputs,
        "milliseconds": {name: round(1e3 * statistics.median(row[name] for row in rounds), 3) for name in runs},
        "speed": {
            name: {f"over_{base}": round(statistics.median(r[base] / r[name] for r in rounds), 2) for base in FLOATS}
            for name in runs
            if name not in FLOATS
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
