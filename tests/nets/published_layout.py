"""The published checkpoints of VAR and LlamaGen written down a second time: keys, shapes, and what the numbers mean.

Everything here reads tensors by their published keys and loops where the networks are vectorised.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

Layout = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


def random_state(layout: Layout, seed: int = 0) -> State:
    """Numbers large enough that every tensor matters; norms near one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in layout.items():
        fan = math.prod(shape[1:]) if len(shape) > 1 else 9
        state[key] = torch.randn(shape, generator=generator) / math.sqrt(fan)
        if len(shape) == 1 and key.endswith(".weight"):
            state[key] += 1
    return state


def linear(name: str, out: int, inside: int, *kernel: int, bias: bool = True) -> Layout:
    return {f"{name}.weight": (out, inside, *kernel)} | ({f"{name}.bias": (out,)} if bias else {})


def var_layout(depth: int, width: int, heads: int, codes: int, dim: int, scales, classes: int, shared=False) -> Layout:
    length = sum(scale**2 for scale in scales)
    layout = linear("word_embed", width, dim) | {
        "class_emb.weight": (classes + 1, width),
        "pos_start": (1, scales[0] ** 2, width),
        "pos_1LC": (1, length, width),
        "lvl_embed.weight": (len(scales), width),
        "lvl_1L": (1, length),
        "attn_bias_for_masking": (1, 1, length, length),
    }
    for i in range(depth):
        name = f"blocks.{i}"
        layout |= linear(f"{name}.attn.mat_qkv", 3 * width, width, bias=False)
        layout |= {f"{name}.attn.{part}": (width,) for part in ("q_bias", "v_bias", "zero_k_bias")}
        layout |= {f"{name}.attn.scale_mul_1H11": (1, heads, 1, 1)} | linear(f"{name}.attn.proj", width, width)
        layout |= linear(f"{name}.ffn.fc1", 4 * width, width) | linear(f"{name}.ffn.fc2", width, 4 * width)
        layout |= {f"{name}.ada_gss": (1, 1, 6, width)} if shared else linear(f"{name}.ada_lin.1", 6 * width, width)
    layout |= linear("shared_ada_lin.1", 6 * width, width) if shared else {}
    return layout | linear("head_nm.ada_lin.1", 2 * width, width) | linear("head", codes, width)


def llamagen_layout(depth: int, width: int, codes: int, classes: int, hidden: int, text=None) -> Layout:
    layout: Layout = {"cls_embedding.embedding_table.weight": (classes + 1, width)}
    if text:
        layout = {"cls_embedding.uncond_embedding": text}
        layout |= linear("cls_embedding.cap_proj.fc1", width, text[1], bias=False)
        layout |= linear("cls_embedding.cap_proj.fc2", width, width, bias=False)
    layout |= {"tok_embeddings.weight": (codes, width)}
    for i in range(depth):
        layout |= linear(f"layers.{i}.attention.wqkv", 3 * width, width, bias=False)
        layout |= linear(f"layers.{i}.attention.wo", width, width, bias=False)
        layout |= linear(f"layers.{i}.feed_forward.w1", hidden, width, bias=False)
        layout |= linear(f"layers.{i}.feed_forward.w3", hidden, width, bias=False)
        layout |= linear(f"layers.{i}.feed_forward.w2", width, hidden, bias=False)
        layout |= {f"layers.{i}.attention_norm.weight": (width,), f"layers.{i}.ffn_norm.weight": (width,)}
    return layout | {"norm.weight": (width,), "output.weight": (codes, width)}


def _residual(name: str, inside: int, out: int) -> Layout:
    layout = linear(f"{name}.norm1", inside, 0) | linear(f"{name}.conv1", out, inside, 3, 3)
    layout |= linear(f"{name}.norm2", out, 0) | linear(f"{name}.conv2", out, out, 3, 3)
    return layout | (linear(f"{name}.nin_shortcut", out, inside, 1, 1) if inside != out else {})


def _attention(name: str, width: int, fused: bool) -> Layout:
    layout = linear(f"{name}.norm", width, 0) | linear(f"{name}.proj_out", width, width, 1, 1)
    if fused:
        return layout | linear(f"{name}.qkv", 3 * width, width, 1, 1)
    return layout | {k: v for part in "qkv" for k, v in linear(f"{name}.{part}", width, width, 1, 1).items()}


def tokenizer_layout(channels, latent: int, codes: int, dim: int, scales=None) -> Layout:
    """Of LlamaGen; with scales of VAR."""
    var = scales is not None
    mids = ("mid.block_1", "mid.attn_1", "mid.block_2") if var else ("mid.0", "mid.1", "mid.2")
    kernel, levels = (3, 3) if var else (1, 1), len(channels)
    layout = linear("quant_conv", dim, latent, *kernel) | linear("post_quant_conv", latent, dim, *kernel)
    layout |= {"quantize.embedding.weight": (codes, dim)}
    if var:
        layout |= {"quantize.ema_vocab_hit_SV": (len(scales), codes)}
        for i in range(4):
            layout |= linear(f"quantize.quant_resi.qresi_ls.{i}", dim, dim, 3, 3)
    else:
        layout |= {"quantize.codebook_used": (65536,)}
    for side, count in (("encoder", 2), ("decoder", 3)):
        encoding, deep = side == "encoder", channels[-1]
        layout |= linear(f"{side}.conv_in", *((channels[0], 3) if encoding else (deep, latent)), 3, 3)
        layout |= linear(f"{side}.conv_out", *((latent, deep) if encoding else (3, channels[0])), 3, 3)
        layout |= linear(f"{side}.norm_out", deep if encoding else channels[0], 0)
        layout |= _residual(f"{side}.{mids[0]}", deep, deep) | _attention(f"{side}.{mids[1]}", deep, var)
        layout |= _residual(f"{side}.{mids[2]}", deep, deep)
        inside = channels[0] if encoding else deep
        for step in range(levels):
            level = step if encoding else levels - 1 - step
            block, attention, scale = (
                (f"{side}.{'down' if encoding else 'up'}.{level}", "attn", "block")
                if var
                else (f"{side}.conv_blocks.{step}", "attn", "res")
            )
            for j in range(count):
                layout |= _residual(f"{block}.{scale}.{j}", inside, channels[level])
                inside = channels[level]
                layout |= _attention(f"{block}.{attention}.{j}", inside, var) if level == levels - 1 else {}
            if step < levels - 1:
                layout |= linear(f"{block}.{'downsample' if encoding else 'upsample'}.conv", inside, inside, 3, 3)
    return {key: tuple(n for n in shape if n) for key, shape in layout.items()}


def var_logits(state: State, heads: int, scales, inputs: Tensor, labels: Tensor) -> Tensor:
    """Logits of all positions: [B, L - s₁², C] and [B] to [B, L, V]."""
    level = torch.cat([torch.full((scale**2,), i) for i, scale in enumerate(scales)])
    condition = state["class_emb.weight"][labels]
    start = condition[:, None] + state["pos_start"]
    x = torch.cat((start, inputs @ state["word_embed.weight"].T + state["word_embed.bias"]), 1)
    x = x + state["lvl_embed.weight"][level] + state["pos_1LC"]
    hidden_from = level[:, None] < level[None]
    depth = max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")) + 1

    def norm(v: Tensor) -> Tensor:
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def affine(v: Tensor, name: str) -> Tensor:
        return v @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    width = x.shape[-1]
    for i in range(depth):
        b = f"blocks.{i}"
        if f"{b}.ada_gss" in state:
            six = affine(F.silu(condition), "shared_ada_lin.1").view(-1, 1, 6, width) + state[f"{b}.ada_gss"]
        else:
            six = affine(F.silu(condition), f"{b}.ada_lin.1").view(-1, 1, 6, width)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (six[:, :, j] for j in range(6))
        qkv = (norm(x) * (1 + scale1) + shift1) @ state[f"{b}.attn.mat_qkv.weight"].T
        query, key, value = qkv.split(width, -1)
        query, value = query + state[f"{b}.attn.q_bias"], value + state[f"{b}.attn.v_bias"]
        outputs = []
        for q, k, v, scale in zip(
            query.chunk(heads, -1),
            key.chunk(heads, -1),
            value.chunk(heads, -1),
            state[f"{b}.attn.scale_mul_1H11"].flatten(),
            strict=True,
        ):
            cosine = torch.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
            weights = (cosine * scale.clamp(max=math.log(100)).exp()).masked_fill(hidden_from, -torch.inf).softmax(-1)
            outputs.append(weights @ v)
        x = x + affine(torch.cat(outputs, -1), f"{b}.attn.proj") * gamma1
        inner = F.gelu(affine(norm(x) * (1 + scale2) + shift2, f"{b}.ffn.fc1"), approximate="tanh")
        x = x + affine(inner, f"{b}.ffn.fc2") * gamma2
    scale, shift = affine(F.silu(condition), "head_nm.ada_lin.1").view(-1, 1, 2, width).unbind(2)
    return affine(norm(x) * (1 + scale) + shift, "head")


def llamagen_logits(state: State, heads: int, grid: int, tokens: Tensor, condition: Tensor) -> Tensor:
    """Logits of all tokens: [B, N] and [B] classes or [B, T, D] texts without padding to [B, N, V]."""
    if condition.ndim == 1:
        prefix = state["cls_embedding.embedding_table.weight"][condition][:, None]
    else:
        inner = F.gelu(condition @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
        prefix = inner @ state["cls_embedding.cap_proj.fc2.weight"].T
    x = torch.cat((prefix, state["tok_embeddings.weight"][tokens[:, :-1]]), 1)
    length, width, first = x.shape[1], x.shape[2], prefix.shape[1]
    head_dim = width // heads

    def norm(v: Tensor, name: str) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]

    def turn(v: Tensor) -> Tensor:
        """[B, S, head_dim] as complex pairs; nothing is left of the condition."""
        pairs = torch.view_as_complex(v.reshape(*v.shape[:2], -1, 2).contiguous())
        factors = torch.zeros(length, head_dim // 2, dtype=torch.complex64)
        for position in range(first, length):
            row, column = divmod(position - first, grid)
            for i in range(head_dim // 4):
                speed = 10000.0 ** (-2 * i / (head_dim / 2))
                factors[position, i] = complex(math.cos(row * speed), math.sin(row * speed))
                factors[position, head_dim // 4 + i] = complex(math.cos(column * speed), math.sin(column * speed))
        return torch.view_as_real(pairs * factors).flatten(-2)

    later = torch.ones(length, length).triu(1).bool()
    depth = max(int(key.split(".")[1]) for key in state if key.startswith("layers.")) + 1
    for i in range(depth):
        name = f"layers.{i}"
        qkv = norm(x, f"{name}.attention_norm") @ state[f"{name}.attention.wqkv.weight"].T
        outputs = []
        for q, k, v in zip(*(part.chunk(heads, -1) for part in qkv.split(width, -1)), strict=True):
            weights = (turn(q) @ turn(k).transpose(1, 2) / math.sqrt(head_dim)).masked_fill(later, -torch.inf)
            outputs.append(weights.softmax(-1) @ v)
        x = x + torch.cat(outputs, -1) @ state[f"{name}.attention.wo.weight"].T
        y = norm(x, f"{name}.ffn_norm")
        w1, w2, w3 = (state[f"{name}.feed_forward.w{j}.weight"].T for j in (1, 2, 3))
        x = x + (F.silu(y @ w1) * (y @ w3)) @ w2
    return norm(x[:, first - 1 :], "norm") @ state["output.weight"].T


class TokenizerOracle:
    """Encoder and decoder of a published tokenizer, one function call at a time."""

    def __init__(self, state: State, levels: int, is_var: bool) -> None:
        self.state, self.levels, self.is_var = state, levels, is_var

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.state[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def residual(self, x: Tensor, name: str) -> Tensor:
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.state else x)

    def attention(self, x: Tensor, name: str) -> Tensor:
        h = self.norm(x, f"{name}.norm")
        if self.is_var:
            q, k, v = self.conv(h, f"{name}.qkv").flatten(2).chunk(3, 1)
        else:
            q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.conv((v @ weights.transpose(1, 2)).view_as(x), f"{name}.proj_out")

    def middle(self, x: Tensor, side: str) -> Tensor:
        names = ("block_1", "attn_1", "block_2") if self.is_var else ("0", "1", "2")
        x = self.attention(self.residual(x, f"{side}.mid.{names[0]}"), f"{side}.mid.{names[1]}")
        return self.residual(x, f"{side}.mid.{names[2]}")

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(x, "encoder.conv_in")
        for level in range(self.levels):
            block = f"encoder.down.{level}" if self.is_var else f"encoder.conv_blocks.{level}"
            for j in range(2):
                x = self.residual(x, f"{block}.{'block' if self.is_var else 'res'}.{j}")
                x = self.attention(x, f"{block}.attn.{j}") if level == self.levels - 1 else x
            if level < self.levels - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"{block}.downsample.conv", stride=2, padding=0)
        x = self.middle(x, "encoder")
        return self.conv(self.conv(F.silu(self.norm(x, "encoder.norm_out")), "encoder.conv_out"), "quant_conv")

    def decode(self, features: Tensor) -> Tensor:
        x = self.middle(self.conv(self.conv(features, "post_quant_conv"), "decoder.conv_in"), "decoder")
        for step in range(self.levels):
            block = f"decoder.up.{self.levels - 1 - step}" if self.is_var else f"decoder.conv_blocks.{step}"
            for j in range(3):
                x = self.residual(x, f"{block}.{'block' if self.is_var else 'res'}.{j}")
                x = self.attention(x, f"{block}.attn.{j}") if step == 0 else x
            if step < self.levels - 1:
                x = self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{block}.upsample.conv")
        return self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out")
