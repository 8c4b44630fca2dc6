"""A student of Distilled Decoding as it is saved, sampled with torch alone.

    from sample import Student
    student = Student(".")
    images = student.sample(student.noise(4, seed=0), torch.tensor([0, 1, 2, 3]))

A student that was told guidance scales, ``config["student"]["guidance_range"]``, takes one: ``guidance_scale=2.0``.
That of an ImageGPT needs no labels, that of a network of texts takes features of texts in place of them.

The folder of a student in few bits, ``config["quantization"]``, is used in the same way. Its weights stay in these bits
in memory, and become numbers for each product; with inputs in eight bits too a CPU multiplies whole numbers.

`genlight fit` writes this file beside the weights, so it imports nothing of genlight. It computes the same numbers as
`genlight.nets.dd_student` and the decoder of `genlight.nets.vq_tokenizer`, for inference only.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

WEIGHTS, CONFIG = "student.safetensors", "config.json"
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_TYPES |= {"I8": torch.int8, "U8": torch.uint8}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name; ValueError if it ends too early."""
    found = {}
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        start = file.tell()
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            data = bytearray(end - first)  # the memory of the tensor itself
            file.seek(start + first)
            if file.readinto(data) != len(data):
                raise ValueError(f"{path} is truncated")
            found[name] = torch.frombuffer(data, dtype=_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


class Student:
    """Images from noise in one pass of a transformer, or a few.

    Args:
        folder: with ``config.json`` and ``student.safetensors``.
        device: where to compute.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self.config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        self.device = torch.device(device)
        self.weights = {name: value.to(device) for name, value in read_tensors(Path(folder) / WEIGHTS).items()}
        self.codebook = self.weights["codebook"]
        options = self.config["student"]["transformer"]
        self.scales = options.get("scales")
        self.is_imagegpt = "n_positions" in options
        names = ("n_head", "n_layer") if self.is_imagegpt else ("num_heads", "num_layers")
        self.num_heads, self.num_layers = (options[name] for name in names)
        self.num_classes = options.get("num_classes", 1)
        self.is_textual = options.get("text_dim") is not None
        count = options["n_positions"] if self.is_imagegpt else options.get("grid_size", 0) ** 2
        sizes = [scale * scale for scale in self.scales] if self.scales else [1] * count
        # how many tokens the first k groups have
        self.ends = list(itertools.accumulate(sizes, initial=0))

    def noise(self, count: int, seed: int) -> Tensor:
        """Noise of `count` images, [count, N, C]."""
        shape = (count, self.ends[-1], self.codebook.shape[1])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        labels: Tensor | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Images [B, channels, H, W] in [-1, 1].

        Args:
            noise: [B, N, C].
            labels: classes [B]; features [B, T, D] of a student of texts; None: of a student that knows neither.
            timesteps: how many groups of tokens are decided before each pass, of ``config["trained_timesteps"]``; None:
                as the student was saved.
            guidance_scale: in the range that the student was told; None: as the student was saved.

        Raises:
            ValueError: no class, or one that is not known, timesteps that do not increase from 0 or were not learned,
                or a guidance scale that was not learned.
        """
        scale = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        low, high = self.config["student"].get("guidance_range", [self.config["guidance_scale"]] * 2)
        if not low <= scale <= high:
            raise ValueError(f"guidance_scale = {scale} must be from {low} to {high}")
        if labels is None and self.is_imagegpt:
            labels = torch.zeros(len(noise), dtype=torch.long)
        if labels is None:
            raise ValueError("labels must be given")
        steps = self.config["timesteps"] if timesteps is None else timesteps
        if not steps or steps[0] != 0 or any(a >= b for a, b in itertools.pairwise([*steps, len(self.ends) - 1])):
            raise ValueError(f"timesteps = {steps} must increase from 0 to less than {len(self.ends) - 1}")
        if not set(steps) <= set(learned := self.config["trained_timesteps"]):
            raise ValueError(f"timesteps = {steps} must be of {learned}, which the student has learned")
        if not self.is_textual and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
            raise ValueError(f"labels must be from 0 to {self.num_classes - 1}")
        noise, labels = noise.to(self.device), labels.to(self.device)
        is_text = (labels != 0).any(-1) if self.is_textual else None
        condition = self._condition(labels, scale)
        place = torch.arange(noise.shape[1], device=self.device)
        x, known = noise, noise.new_zeros(noise.shape[:2], dtype=torch.long)
        for step in steps:
            is_data = (place < self.ends[step]).expand(len(noise), -1)
            x = torch.where(is_data[..., None], self.codebook[known], noise)
            logits, free = self._predict(x, is_data, condition, is_text)
            known = torch.where(is_data, known, logits.argmax(-1))
        split = max(self.ends[self.config["split_timestep"]], self.ends[steps[-1]])
        return self._decode(torch.where((place < split)[:, None], self.codebook[known], free)).clamp(-1, 1)

    def _condition(self, labels: Tensor, guidance_scale: float) -> Tensor:
        """What stands before all tokens, [B, T, width]."""
        if self.is_imagegpt:
            return self.weights["student.start_embedding"].expand(len(labels), 1, -1)
        if self.is_textual:
            hidden = self._linear(labels, "student.backbone.text_projection.0")
            condition = self._linear(functional.gelu(hidden, approximate="tanh"), "student.backbone.text_projection.2")
        else:
            condition = self.weights["student.backbone.class_embedding.weight"][labels][:, None]
        if "guidance_range" not in self.config["student"]:
            return condition
        low, high = self.config["student"]["guidance_range"]
        place = (guidance_scale - low) / max(high - low, 1e-6)
        angles = place * math.pi * 2.0 ** torch.arange(4, device=self.device)
        hidden = self._linear(torch.cat((angles.cos(), angles.sin())), "student.guidance_embedding.first")
        return condition + self._linear(functional.silu(hidden), "student.guidance_embedding.last")

    def _predict(
        self, vectors: Tensor, is_data: Tensor, prefix: Tensor, is_text: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        flags = functional.pad(is_data.long(), (prefix.shape[1], 0), value=1)
        state, condition = self.weights["student.state_embedding.weight"][flags], prefix[:, 0]
        if is_text is not None:
            share = is_text[..., None].to(prefix.dtype)
            condition = (prefix * share).sum(1) / share.sum(1).clamp(min=1)
        if self.scales:
            hidden = self._by_scale(vectors, condition, state)
            two = self._linear(functional.silu(condition), "student.backbone.head_modulation")
            scale, shift = two.view(len(condition), 1, 2, -1).unbind(2)
            logits = self._linear(_norm(hidden) * (1 + scale) + shift, "student.backbone.head")
        elif self.is_imagegpt:
            hidden = self._by_pixel(vectors, condition, state)
            logits = self._linear(hidden, "student.backbone.lm_head")
        else:
            hidden = self._in_raster_order(vectors, prefix, state, is_text)
            logits = self._linear(self._rms(hidden, "student.backbone.norm"), "student.backbone.head")
        table = self.weights["student.vector_head.shift_scale"] + condition[:, None]
        free = self._linear(_norm(hidden) * (1 + table[:, 1:]) + table[:, :1], "student.vector_head.linear")
        return logits, free

    def _in_raster_order(self, vectors: Tensor, prefix: Tensor, state: Tensor, is_text: Tensor | None) -> Tensor:
        x = self._linear(vectors, "student.backbone.token_embedding")
        x = torch.cat((prefix, x), 1) + state
        length, head_dim = x.shape[1], x.shape[2] // self.num_heads
        turn = _rotations(math.isqrt(vectors.shape[1]), head_dim, prefix.shape[1]).to(x.device)
        mask = None
        if is_text is not None:
            # padding is read by nothing but itself
            readable = functional.pad(is_text, (0, vectors.shape[1]), value=True)[:, None, None]
            whole = torch.ones(length, length, dtype=torch.bool, device=x.device)
            mask = (whole.tril() & readable) | torch.eye(length, dtype=torch.bool, device=x.device)
        for layer in range(self.num_layers):
            name = f"student.backbone.blocks.{layer}"
            qkv = self._linear(self._rms(x, f"{name}.attention_norm"), f"{name}.attention.qkv")
            query, key, value = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
            query, key = (_turned(part, turn) for part in (query, key))
            attended = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
            x = x + self._linear(attended.transpose(1, 2).flatten(2), f"{name}.attention.output")
            y = self._rms(x, f"{name}.feed_forward_norm")
            gate, up = (self._linear(y, f"{name}.feed_forward.{part}") for part in ("gate", "up"))
            x = x + self._linear(functional.silu(gate) * up, f"{name}.feed_forward.down")
        return x[:, prefix.shape[1] :]

    def _by_pixel(self, vectors: Tensor, condition: Tensor, state: Tensor) -> Tensor:
        root, epsilon = "student.backbone.transformer", self.config["student"]["transformer"]["layer_norm_epsilon"]
        x = torch.cat((condition[:, None], self._linear(vectors, f"{root}.wte")), 1) + state
        x = x + self.weights[f"{root}.wpe.weight"]
        for layer in range(self.num_layers):
            name = f"{root}.h.{layer}"
            qkv = self._transposed(self._rms(x, f"{name}.ln_1", epsilon), f"{name}.attn.c_attn")
            query, key, value = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self._transposed(attended.transpose(1, 2).flatten(2), f"{name}.attn.c_proj")
            y = self._transposed(self._rms(x, f"{name}.ln_2", epsilon), f"{name}.mlp.c_fc")
            x = x + self._transposed(y * torch.sigmoid(1.702 * y), f"{name}.mlp.c_proj")
        return self._rms(x, f"{root}.ln_f", epsilon)[:, 1:]

    def _by_scale(self, vectors: Tensor, condition: Tensor, state: Tensor) -> Tensor:
        root, weights = "student.backbone", self.weights
        level = torch.cat([torch.full((size * size,), i) for i, size in enumerate([1, *self.scales])]).to(
            vectors.device
        )
        readable = (level[:, None] > level) | torch.eye(len(level), dtype=torch.bool, device=vectors.device)
        first = condition[:, None] + weights[f"{root}.start_embedding"]
        x = torch.cat((first, self._linear(vectors, f"{root}.input_projection")), 1) + state
        x = x + weights[f"{root}.scale_embedding.weight"][level] + weights[f"{root}.position_embedding"]
        for layer in range(self.num_layers):
            name = f"{root}.blocks.{layer}"
            shared = f"{name}.modulation.offset" in weights
            six = self._linear(
                functional.silu(condition), f"{root}.shared_modulation" if shared else f"{name}.modulation"
            )
            six = six.view(len(condition), 1, 6, -1)
            six = six + weights[f"{name}.modulation.offset"] if shared else six
            gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = six.unbind(2)
            bias = weights[f"{name}.attention.query_bias"], weights[f"{name}.attention.value_bias"]
            bias_of_all = torch.cat((bias[0], torch.zeros_like(bias[0]), bias[1]))
            qkv = self._linear(_norm(x) * (1 + scale_a) + shift_a, f"{name}.attention.qkv") + bias_of_all
            query, key, value = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            sharpness = weights[f"{name}.attention.log_scale"].clamp(max=math.log(100)).exp()
            query, key = functional.normalize(query, dim=-1) * sharpness, functional.normalize(key, dim=-1)
            attended = functional.scaled_dot_product_attention(query, key, value, readable, scale=1.0)
            x = x + self._linear(attended.transpose(1, 2).flatten(2), f"{name}.attention.output") * gate_a
            x = x + self._linear(state, f"student.layer_state.{layer}")
            y = self._linear(_norm(x) * (1 + scale_f) + shift_f, f"{name}.feed_forward.0")
            x = x + self._linear(functional.gelu(y, approximate="tanh"), f"{name}.feed_forward.2") * gate_f
        return (x + self._linear(state, f"student.layer_state.{self.num_layers}"))[:, 1:]

    def _decode(self, vectors: Tensor) -> Tensor:
        if self.is_imagegpt:
            return _grid(vectors)
        x = self._conv(self._conv(self._features(vectors), "post_quant_conv"), "decoder.conv_in")
        x = self._residual(x, "decoder.mid_block.resnets.0")
        x = self._residual(self._attention(x, "decoder.mid_block.attentions.0"), "decoder.mid_block.resnets.1")
        for block in self._numbered("decoder.up_blocks", "resnets.0.conv1"):
            for part in self._numbered(f"{block}.resnets", "conv1"):
                x = self._residual(x, part)
                attention = part.replace("resnets", "attentions")
                if f"{attention}.to_q.weight" in self.weights:
                    x = self._attention(x, attention)
            if f"{block}.upsamplers.0.conv.weight" in self.weights:
                x = self._conv(functional.interpolate(x, scale_factor=2.0), f"{block}.upsamplers.0.conv")
        return self._conv(functional.silu(self._groups(x, "decoder.conv_norm_out")), "decoder.conv_out")

    def _numbered(self, name: str, inner: str) -> list[str]:
        """The parts <name>.0, <name>.1, … that there are, known by a layer in them."""
        parts = (f"{name}.{number}" for number in itertools.count())
        return list(itertools.takewhile(lambda part: f"{part}.{inner}.weight" in self.weights, parts))

    def _features(self, vectors: Tensor) -> Tensor:
        """What the decoder reads: the grid of vectors, or the sum of all scales."""
        if not self.scales:
            return _grid(vectors)
        options, size = self.config["quantizer"], self.scales[-1]
        total = vectors.new_zeros(len(vectors), vectors.shape[2], size, size)
        for index, (start, end) in enumerate(itertools.pairwise(self.ends)):
            grid = _grid(vectors[:, start:end])
            if grid.shape[-1] != size:
                grid = functional.interpolate(grid, size=(size, size), mode="bicubic")
            mended = self._conv(grid, f"quantizer.phi.{options['phi_of_scale'][index]}")
            total = total + (1 - options["phi_ratio"]) * grid + options["phi_ratio"] * mended
        return total

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        codes = self.weights.get(f"{name}.weight_codes")
        if codes is not None:
            product = self._product_of_codes(x, codes, self.weights[f"{name}.weight_scale"])
            return product if bias is None else product + bias
        return functional.linear(x, self.weights[f"{name}.weight"], bias)

    def _product_of_codes(self, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Of a weight in few bits, codes [outputs, bytes] and their scales [outputs, groups]."""
        form, columns = self.config["quantization"], x.shape[-1]
        if form["weight_bits"] == 4:
            pairs = codes.view(torch.int8)
            # the low half of a byte comes first; shifting it up and down again keeps its sign
            codes = torch.stack(((pairs << 4) >> 4, pairs >> 4), -1).flatten(1)[:, :columns]
        if form["group_size"] is not None:
            scale = scale.repeat_interleave(form["group_size"], 1)[:, :columns]
        if form["activation_bits"] != 8:
            return functional.linear(x, codes * scale)
        rows = x.reshape(-1, columns)
        step = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        rows = (rows / step).round()
        on_cpu = x.device.type == "cpu"
        product = torch._int_mm(rows.to(torch.int8), codes.T) if on_cpu else rows @ codes.to(rows.dtype).T
        return (product * step * scale.T).reshape(*x.shape[:-1], -1)

    def _transposed(self, x: Tensor, name: str) -> Tensor:
        """A linear layer whose weight is stored as [inputs, outputs]."""
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _rms(self, x: Tensor, name: str, epsilon: float = 1e-5) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], epsilon)

    def _conv(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return functional.conv2d(x, weight, self.weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def _groups(self, x: Tensor, name: str) -> Tensor:
        groups: int = self.config["norm_num_groups"]
        return functional.group_norm(x, groups, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def _residual(self, x: Tensor, name: str) -> Tensor:
        h = self._conv(functional.silu(self._groups(x, f"{name}.norm1")), f"{name}.conv1")
        h = self._conv(functional.silu(self._groups(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self._conv(x, f"{name}.conv_shortcut") if f"{name}.conv_shortcut.weight" in self.weights else x)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        rows = self._groups(x, f"{name}.group_norm").flatten(2).transpose(1, 2)
        query, key, value = (self._linear(rows, f"{name}.to_{part}") for part in "qkv")
        weights = (query @ key.transpose(1, 2) / math.sqrt(x.shape[1])).softmax(-1)
        return x + self._linear(weights @ value, f"{name}.to_out.0").transpose(1, 2).reshape(x.shape)


def _norm(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def _grid(vectors: Tensor) -> Tensor:
    size = math.isqrt(vectors.shape[1])
    return vectors.transpose(1, 2).reshape(len(vectors), -1, size, size)


def _rotations(grid_size: int, head_dim: int, before: int) -> Tensor:
    """Cosine and sine of each place, [before + N, head_dim / 2, 2]; zeros for those of class or text."""
    speeds = 10000.0 ** -(torch.arange(head_dim // 4) * 4 / head_dim)
    angles = torch.arange(grid_size).float()[:, None] * speeds
    rows, columns = angles.repeat_interleave(grid_size, 0), angles.repeat(grid_size, 1)
    both = torch.cat((rows, columns), 1)
    return functional.pad(torch.stack((both.cos(), both.sin()), -1), (0, 0, 0, 0, before, 0))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cosine, sine = turn.unbind(-1)
    return torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1).flatten(-2)
