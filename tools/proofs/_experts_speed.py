"""What EEP costs in bfloat16 at the size of Mixtral-8x7B's layers, weights random: the part "speed" of experts_gpu."""

from __future__ import annotations

import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from _findings import Findings
from _machine import Machine, over

EXPERTS, KEPT, PER_TOKEN = 8, 4, 2
Config = dict[str, Any]
BIG: Config = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
}  # fmt: skip
SMALL: Config = BIG | {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
# sequences and their length: prefilling, a batch of questions, and so few that weights alone take memory
PREFILL, QUESTIONS, FEW = ((4, 2048), (1, 8192)), (128, 128), (1, 128)
# batches of questions behind a score: 256 questions
BATCHES = 2


@dataclass
class Subject:
    """A model of random weights, the space of its candidates, and tokens for it."""

    machine: Machine
    module: Any
    space: Any
    shrink: int

    @property
    def model(self) -> Any:
        return self.module.network

    @property
    def editor(self) -> Any:
        return self.module.expert_editor()

    def candidate(self, phase: str, seed: int = 0) -> Any:
        """A random one that prunes, or that merges."""
        import numpy as np

        return replace(self.space, phase=phase).sample(np.random.default_rng(seed))

    def apply(self, candidate: Any) -> None:
        self.space.apply(self.module, candidate)

    def run(self, shape: tuple[int, int]) -> Any:
        """Logits of the last place of random texts [sequences, length]."""
        import torch

        count, length = shape[0], max(8, shape[1] // self.shrink)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.model.config.vocab_size, (count, length), generator=generator)
        ids = ids.to(self.machine.device)
        return lambda: self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def made(machine: Machine, config: Config, experts: int = EXPERTS) -> Any:
    """A module with random weights in bfloat16, made where it stays."""
    import torch
    import transformers

    from genlight.modules.causal_lm import CausalLMModule

    torch.manual_seed(0)
    with machine.device:
        settings = {"num_local_experts": experts, "num_experts_per_tok": PER_TOKEN, **config}
        module = CausalLMModule(transformers.MixtralConfig(**settings), dtype="bfloat16").eval()
    return module.requires_grad_(False)


def subject(machine: Machine, config: Config, shrink: int) -> Subject:
    """A model with all its experts."""
    from genlight.search.spaces.expert_maps import ExpertMapSpace

    module = made(machine, config)
    editor = module.expert_editor()
    sizes = [sum(tensor[0].numel() for tensor in layer.weights().values()) for layer in editor.layers.values()]
    space = ExpertMapSpace(
        tuple(editor.layers), EXPERTS, KEPT, None, PER_TOKEN, expert_parameters=sizes, bytes_per_parameter=2
    )
    return Subject(machine, module, space, shrink)


def weights_of(model: Any) -> tuple[int, int]:
    """Parameters and bytes."""
    return sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters())


def kernel_works(found: Findings, machine: Machine) -> None:
    """Whether the kernel of mixtures runs here; if not, products in blocks take its place, and that is said."""
    import torch

    from genlight.experts import mixing

    matrix, tensor = torch.rand(2, 4), torch.randn(4, 64, 96, dtype=torch.bfloat16, device=machine.device)
    try:
        mixed = mixing.mix(matrix, tensor).float()
        expected = torch.einsum("re,eab->rab", matrix.to(machine.device), tensor.float())
        torch.testing.assert_close(mixed, expected, rtol=2**-7, atol=2**-8)
    except Exception as error:
        traceback.print_exc()
        found.failures["kernel"] = f"{type(error).__name__}: {error}"[:300]
        mixing.triton_runs_on = lambda device: False  # type: ignore[assignment]


def looped(matrix: Any, tensor: Any) -> Any:
    """Each new expert as a sum over the old ones, one after the other, in the type of the weights."""
    mixed = tensor.new_zeros(len(matrix), *tensor.shape[1:])
    for total, factors in zip(mixed, matrix.tolist(), strict=True):
        for expert, factor in zip(tensor, factors, strict=True):
            total.add_(expert, alpha=factor)
    return mixed


def merging(found: Findings, machine: Machine, layer: Any) -> None:
    """Merged experts of one layer, by genlight and by a loop."""
    import torch

    from genlight.experts.mixing import _mixed_in_blocks, mix

    matrix = torch.rand(KEPT, EXPERTS, generator=torch.Generator().manual_seed(0))
    matrix /= matrix.sum(1, keepdim=True)
    tensors = [weight.detach() for weight in layer.weights().values()]
    on_device = matrix.to(machine.device)
    sides = {
        "genlight": lambda: [mix(matrix, tensor) for tensor in tensors],
        "products in blocks": lambda: [_mixed_in_blocks(on_device, tensor.flatten(1)) for tensor in tensors],
        "a loop over experts": lambda: [looped(matrix, tensor) for tensor in tensors],
        # reads and writes half of all: as many bytes as merging reads
        "copying half of them": lambda: [tensor[:KEPT].clone() for tensor in tensors],
    }
    times = machine.sides(sides)
    moved = sum(tensor.nbytes for tensor in tensors) * (1 + KEPT / EXPERTS)
    found.values["merge-loop"] = over(times, "a loop over experts", "genlight")
    for name, values in times.items():
        bytes_moved = moved / 1.5 if name.startswith("copying") else moved
        found.add(
            None,
            model="12 B",
            what=f"merging the experts of one layer: {name}",
            milliseconds=median(values),
            other=f"{bytes_moved / median(values) / 1e9:.3f} TB/s of what must be read and written",
        )


def memory(found: Findings, name: str, one: Subject) -> None:
    """Peaks of the whole model, and of a merging candidate."""
    run, machine = one.run(FEW), one.machine
    parameters, size = weights_of(one.model)
    run()
    whole = machine.peak(run)
    layer = sum(weight.nbytes for weight in next(iter(one.editor.layers.values())).weights().values())
    one.apply(one.candidate("merge"))
    merged = machine.peak(run)
    one.apply(one.candidate("prune"))
    pruned = machine.peak(run)
    one.editor.restore()
    found.values |= {f"{name}-peak": whole, f"{name}-parameters": float(parameters)}
    found.values[f"{name}-applied"] = merged / (size + layer)
    for what, peak in (("all experts", whole), ("a candidate that merges", merged), ("one that prunes", pruned)):
        found.add(None, model=name, what=f"peak of memory: {what}", gigabytes=peak / 1e9, parameters=parameters)


def smaller(found: Findings, name: str, machine: Machine, model: Any) -> None:
    """Memory of the model with fewer experts, as a share of that of the whole one."""
    parameters, _ = weights_of(model)
    ids = Subject(machine, _Holder(model), None, 1).run(FEW)
    ids()
    peak = machine.peak(ids)
    share, expected = peak / found.values[f"{name}-peak"], parameters / found.values[f"{name}-parameters"]
    found.add(
        {f"{name}-memory": share / expected - 1},
        model=name,
        what=f"peak of memory: {KEPT} of {EXPERTS} experts",
        gigabytes=peak / 1e9,
        parameters=parameters,
        other=f"{share:.4f} of the whole; {expected:.4f} of its parameters",
    )


@dataclass
class _Holder:
    network: Any


def prefilling(found: Findings, name: str, one: Subject) -> None:
    """One expert a token against two, by the editor that searches use."""
    ratios = []
    for shape in PREFILL:
        run = one.run(shape)
        before = {
            "two": one.editor.restore,
            "one": lambda: one.editor.route(num_experts_per_tok=1),
        }
        times = one.machine.sides({"two": run, "one": run}, before)
        ratios.append(over(times, "two", "one"))
        for side, values in times.items():
            found.add(
                None,
                model=name,
                what=f"prefilling {shape[0]} × {shape[1]} tokens, {side} of eight experts a token",
                milliseconds=median(values),
                other=f"{shape[0] * shape[1] / median(values):.0f} tokens a millisecond",
            )
    one.editor.restore()
    found.add({f"{name}-prefill": min(ratios)})


def applying(found: Findings, name: str, one: Subject) -> None:
    """Applying a candidate, and merging in each pass, against all of its evaluation."""
    run = one.run(QUESTIONS)
    pairs = {phase: [one.candidate(phase, seed) for seed in (1, 2)] for phase in ("prune", "merge")}
    hosted: dict[str, list[float]] = {phase: [] for phase in pairs}
    turn = {phase: 0 for phase in pairs}

    def put(phase: str) -> None:
        turn[phase] += 1
        chosen = pairs[phase][turn[phase] % 2]
        one.apply(one.candidate(phase, 3))  # from another one of its kind
        hosted[phase].append(one.machine.milliseconds(lambda: one.apply(chosen)))

    times = one.machine.sides(
        {phase: run for phase in pairs}, {"prune": lambda: put("prune"), "merge": lambda: put("merge")}
    )
    one.editor.restore()
    passes = {phase: BATCHES * median(values) for phase, values in times.items()}
    merging = BATCHES * median(b - a for a, b in zip(times["prune"], times["merge"], strict=True))
    for phase, extra in (("prune", 0.0), ("merge", max(0.0, merging))):
        cost = median(hosted[phase][1:]) + extra
        found.add(
            {f"{name}-apply-{phase}": cost / (passes[phase] + median(hosted[phase][1:]))},
            model=name,
            what=f"a candidate that {phase}s, on {BATCHES * QUESTIONS[0]} questions of {QUESTIONS[1]} tokens",
            milliseconds=passes[phase],
            other=f"applied in {cost:.2f} ms, {extra:.2f} of it in the passes",
        )


def compiled(found: Findings, machine: Machine, config: Config, shrink: int) -> None:
    """One expert a token against two in two layers of the big model, each layer compiled."""
    sides = {}
    for side, count in (("two", 2), ("one", 1)):
        module = made(machine, config | {"num_hidden_layers": 2, "num_experts_per_tok": count})
        for layer in module.network.model.layers:
            layer.compile()
        sides[side] = Subject(machine, module, None, shrink).run(PREFILL[0])
    started = time.monotonic()
    times = machine.sides(sides)
    seconds = time.monotonic() - started
    shape = f"{PREFILL[0][0]} × {PREFILL[0][1]}"
    for side, values in times.items():
        found.add(
            None,
            model="two of its layers, compiled",
            what=f"prefilling {shape} tokens, {side} of eight experts a token",
            milliseconds=median(values),
            other=f"compiled and measured in {seconds:.0f} s",
        )
    found.add({"compiled-prefill": over(times, "two", "one")})


def copied(machine: Machine, one: Subject, config: Config) -> Any:
    """The model that a merged one is saved as, with its weights, as if it were read from a folder."""
    import torch

    target = made(machine, config, KEPT)
    with torch.no_grad():
        for (_, layer), (_, place) in zip(
            one.editor.layers.items(), target.expert_editor().layers.items(), strict=True
        ):
            for key, weight in place.weights().items():
                weight.copy_(layer.edited_weight(key))
            for key, rows in place.router_rows().items():
                rows.copy_(layer.edited_router_rows()[key])
    return target.network


def saved_and_read(machine: Machine, one: Subject) -> Any:
    """The merged model through a folder and plain transformers."""
    import torch
    import transformers

    from genlight.experts.export import export

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        export(one.editor, folder)
        one.module.network, one.module._editor, one.space = None, None, None
        machine.free()
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_pretrained(folder, dtype=torch.bfloat16).eval().requires_grad_(False).to(machine.device)


def speed(found: Findings, tiny: bool) -> None:
    """The part of random weights."""
    import torch

    shrink = 256 if tiny else 1
    cut: Config = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_attention_heads": 4}
    cut |= {"num_key_value_heads": 2}
    big, small = (config | cut if tiny else config for config in (BIG, SMALL))
    machine = Machine()
    torch.set_grad_enabled(False)
    with found.trying("kernel"):
        kernel_works(found, machine)
    with found.trying("12 B"):
        one = subject(machine, big, shrink)
        kind = one.model.config._experts_implementation
        found.add(None, model="12 B", what="experts by", parameters=weights_of(one.model)[0], other=str(kind))
        with found.trying("memory"):
            memory(found, "12 B", one)
        with found.trying("merging"):
            merging(found, machine, next(iter(one.editor.layers.values())))
        with found.trying("prefilling"):
            prefilling(found, "12 B", one)
        with found.trying("applying"):
            applying(found, "12 B", one)
        with found.trying("fewer"):
            one.apply(one.candidate("merge"))
            target = copied(machine, one, big)
            del one
            machine.free()
            smaller(found, "12 B", machine, target)
            del target
    one = None  # type: ignore[assignment]
    machine.free()
    with found.trying("2.4 B"):
        one = subject(machine, small, shrink)
        memory(found, "2.4 B", one)
        with found.trying("small prefilling"):
            prefilling(found, "2.4 B", one)
        one.apply(one.candidate("merge"))
        smaller(found, "2.4 B", machine, saved_and_read(machine, one))
    one = None  # type: ignore[assignment]
    machine.free()
    with found.trying("compiled"):
        compiled(found, machine, big, shrink)
