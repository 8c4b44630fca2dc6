"""Speed and memory of quantized layers on a CPU: docs/results/quantized_cpu.json.

Speed: sides take turns in one process of one thread, several rounds; a ratio is the median over the rounds of the ratio
within a round. What counts is the processor's time, which other work on the machine changes less than the clock's.

- "transformer": a forward pass of one block of PixArt's width, 1152, on 4,096 tokens, attention products and all.
  "plain" is what torchao's int8 is too: symmetric weights, a scale for each token; "ViDiT-Q" is what `method=viditq`
  makes: weights with zero points, inputs scaled by channel and rotated in blocks before they are rounded;
- "unet": linear layers and convolutions with the shapes of SDXL at 1024 pixels, in MixDQ's form: static ranges with
  zero points.

Beside float32 stands torchao's int8, dynamic as well, in the same layers; it convolves nothing on a CPU. It is no
dependency: put it on PYTHONPATH to have it compared.

Memory: weights of the same kind, built in float32 and then quantized, in a process of its own. Counted is what the
process has grown by in resident memory, and what all tensors hold that are alive in it; the larger share is the bar's.

    make proof NAME=quantized_cpu
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import re
import resource
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from _commands import record, run

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

ROUNDS = 5
WIDTH, TOKENS, TEXT_TOKENS, BLOCKS = 1152, 4096, 120, 4
QUANTIZED = r"^transformer_blocks.*(attn|ff)"
# rows, inputs, outputs: attention, feed-forward in and out of both widths, keys and values of the text
LINEARS = (
    (4096, 640, 640),
    (4096, 640, 5120),
    (4096, 2560, 640),
    (1024, 1280, 1280),
    (1024, 1280, 10240),
    (1024, 5120, 1280),
    (77, 2048, 1280),
)
# height and width, channels in and out, kernel: each level, after a shortcut, and the shortcut's own
CONVOLUTIONS = ((128, 320, 320, 3), (64, 640, 640, 3), (32, 1280, 1280, 3), (32, 2560, 1280, 3), (64, 1280, 640, 1))
FLOAT, PLAIN, TORCHAO = "float32", "W8A8 plain", "torchao int8"
# of the method, by kind, with weights of 8 and of 4 bits
FORMS = {"transformer": ("W8A8 ViDiT-Q", "W4A8 ViDiT-Q"), "unet": ("W8A8 MixDQ", "W4A8 MixDQ")}
NOT_MEASURED = "not measured"


Shares = Mapping[str, Mapping[str, float]]


def bars_of(kind: str, speed: Shares, memory: Shares) -> list[Bar]:
    """Bars of a kind: of the speed of each part of it, and of the memory of each form."""
    bars = []
    for name, found in speed.items():
        # beside torchao stands what computes the same, where there is such a form
        own = FORMS[kind][0]
        form = PLAIN if PLAIN in found else own
        for key in dict.fromkeys((form, own)):
            what = f"{name}, float32 / {key}, processor time of one thread"
            ending = "" if key == form else "-viditq"
            bars.append(bar_at_least(f"speed-{name}{ending}", what, found[key], 1.3))
        words = f"{name}, torchao's dynamic int8 / {form}, processor time of one thread"
        if TORCHAO in found:
            bars.append(bar_at_least(f"torchao-{name}", words, found[form] / found[TORCHAO], 1.0))
        elif name != "convolution":
            bars.append(Bar(f"torchao-{name}", f"{words}: torchao is not installed", NOT_MEASURED, "≥ 1", False))
    for form, limit in zip(FORMS[kind], (0.27, 0.15), strict=True):
        what = f"{kind}: memory of weights, {form} / float32, resident and of live tensors, the larger"
        bars.append(bar_at_most(f"memory-{kind}-{form[:2].lower()}", what, max(memory[form].values()), limit))
    return bars


def rows_of(kind: str, speed: Shares, memory: Shares) -> list[dict[str, Any]]:
    """Lines of the table: how many times as fast as float32 a part is, and what share of its memory a form takes."""
    empty = {"times as fast": None, "resident share": None, "share of live tensors": None}
    rows = [
        {"layers": name, "form": form, **empty, "times as fast": times}
        for name, found in speed.items()
        for form, times in found.items()
    ]
    return rows + [
        {"layers": kind, "form": form, **empty, "resident share": row["resident"], "share of live tensors": row["live"]}
        for form, row in memory.items()
    ]


def transformer(blocks: int) -> Any:
    """A PixArt of that many blocks, full width, random weights."""
    from diffusers import PixArtTransformer2DModel

    made: Any = PixArtTransformer2DModel
    return made(
        num_attention_heads=16,
        attention_head_dim=WIDTH // 16,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        cross_attention_dim=WIDTH,
        sample_size=128,
        patch_size=2,
        caption_channels=WIDTH,
        interpolation_scale=2,
        use_additional_conditions=False,
    ).eval()


def chosen(network: Any) -> dict[str, Any]:
    """The linear layers of a transformer that are quantized, by name."""
    from torch import nn

    named = network.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, nn.Linear) and re.search(QUANTIZED, name)}


def layers_of(kind: str, blocks: int = 1) -> dict[str, Any]:
    """The layers that are quantized, by name: of so many blocks, or each shape so many times."""
    from torch import nn

    if kind == "transformer":
        return chosen(transformer(blocks))
    layers: dict[str, Any] = {}
    for block in range(blocks):
        layers |= {f"{block}: linear {n} x {i} x {o}": nn.Linear(i, o) for n, i, o in LINEARS}
        convolutions = ((f"conv {k} of {i} to {o}", nn.Conv2d(i, o, k, padding=k // 2)) for _, i, o, k in CONVOLUTIONS)
        layers |= {f"{block}: {name}": layer for name, layer in convolutions}
    return layers


def quantized(form: str, layer: Any) -> Any:
    """A layer in a form, see above; speed does not depend on the values of scales and ranges."""
    import torch

    from genlight.quantization.balance import Balance
    from genlight.quantization.convert import quantize_layer
    from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
    from genlight.quantization.hadamard import random_rotation

    bits, way = int(form[1]), form.split()[1]
    if way == "plain":
        return quantize_layer(layer, LayerFormat(WeightFormat(bits)))
    if way == "ViDiT-Q":
        width = layer.in_features
        balance = Balance(torch.rand(width) + 0.5, random_rotation(width, "block", 0))
        return quantize_layer(layer, LayerFormat(WeightFormat(bits, symmetric=False)), balance=balance)
    static = LayerFormat(WeightFormat(bits), ActivationFormat(8, False, "static", "tensor"))
    return quantize_layer(layer, static, activation_range=torch.tensor([[[-4.0, 4.5]]]))


def by_torchao(model: Any, names: Collection[str]) -> Any:
    """A copy with the named layers in torchao's int8."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), lambda _, name: name in names)
    return model


def transformer_sides() -> dict[str, dict[str, Callable[[], Any]]]:
    """A forward pass of each side."""
    import torch

    from genlight.quantization.convert import replace_layers

    torch.manual_seed(0)
    plain = transformer(1)
    layers = chosen(plain)
    inputs = torch.randn(1, 4, 128, 128), torch.randn(1, TEXT_TOKENS, WIDTH), torch.tensor([500])
    sides = {FLOAT: plain}
    for form in (PLAIN, *FORMS["transformer"]):
        sides[form] = copy.deepcopy(plain)
        replace_layers(sides[form], {name: quantized(form, layer) for name, layer in layers.items()})
    if find_spec("torchao"):
        sides[TORCHAO] = by_torchao(plain, layers)

    def forward(network: Any) -> Any:
        sizes = {"resolution": None, "aspect_ratio": None}
        return network(inputs[0], encoder_hidden_states=inputs[1], timestep=inputs[2], added_cond_kwargs=sizes).sample

    return {"transformer": {side: partial(forward, network) for side, network in sides.items()}}


def unet_sides() -> dict[str, dict[str, Callable[[], Any]]]:
    """All linear layers one after the other, and all convolutions, of each side."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    made = list(layers_of("unet").values())
    linears, convolutions = made[: len(LINEARS)], made[len(LINEARS) :]
    rows = [torch.randn(n, i) for n, i, _ in LINEARS]
    images = [torch.randn(1, i, size, size) for size, i, _, _ in CONVOLUTIONS]

    def each(layers: list[Any], inputs: list[Any]) -> None:
        for layer, values in zip(layers, inputs, strict=True):
            layer(values)

    form = FORMS["unet"][0]
    found = {
        name: {
            FLOAT: partial(each, layers, inputs),
            form: partial(each, [quantized(form, layer) for layer in layers], inputs),
        }
        for name, layers, inputs in (("linear", linears, rows), ("convolution", convolutions, images))
    }
    if find_spec("torchao"):
        names = {str(index) for index in range(len(linears))}
        found["linear"][TORCHAO] = partial(each, list(by_torchao(nn.ModuleList(linears), names)), rows)
    return found


def speeds(sides: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """How many times as fast as the first side the others are."""
    seconds: list[dict[str, float]] = []
    # the first round warms up, and does not count
    for turn in range(rounds + 1):
        found = {}
        for name in list(sides) if turn % 2 else list(sides)[::-1]:
            started = time.process_time()
            sides[name]()
            found[name] = time.process_time() - started
        seconds.append(found)
    return {name: median(each[FLOAT] / each[name] for each in seconds[1:]) for name in sides if name != FLOAT}


def memory_shares(kind: str) -> dict[str, dict[str, float]]:
    """What quantized layers take, over what float32 takes, by form: of resident memory and of live tensors."""
    # what the first use of anything allocates is not that of weights
    for layer in layers_of(kind).values():
        quantized(FORMS[kind][1], layer)
    found = {}
    for form in (FLOAT, *FORMS[kind]):
        before = held()
        layers = layers_of(kind, BLOCKS)
        for name in list(layers) if form != FLOAT else ():
            layers[name] = quantized(form, layers.pop(name))
        found[form] = {key: value - before[key] for key, value in held().items()}
        del layers
    return {form: {key: found[form][key] / found[FLOAT][key] for key in found[form]} for form in FORMS[kind]}


def held() -> dict[str, int]:
    """Bytes of resident memory, and of the storages of all tensors that are alive."""
    import torch

    gc.collect()
    # the allocator's free pages go back to the system, where it is that of GNU
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"resident": pages * resource.getpagesize(), "live": sum(storages.values())}


def measure(kind: str, what: str) -> None:
    """One measurement, as JSON on the standard output."""
    import torch

    torch.set_num_threads(1)
    if what == "memory":
        print(json.dumps(memory_shares(kind)))
        return
    with torch.inference_mode():
        sides = transformer_sides() if kind == "transformer" else unet_sides()
        print(json.dumps({name: speeds(each) for name, each in sides.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    started, bars, table = time.monotonic(), list[Bar](), list[dict[str, Any]]()
    for kind in ("transformer", "unet"):  # one after the other, each in a process of its own
        speed, memory = (json.loads(run(__file__, "--measure", kind, what)) for what in ("speed", "memory"))
        bars += bars_of(kind, speed, memory)
        table += rows_of(kind, speed, memory)
    record("quantized_cpu", bars, table, [0], started)


if __name__ == "__main__":
    main()
