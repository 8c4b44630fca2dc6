"""Tiny mixture-of-experts models of every family, with random weights large enough that experts differ visibly."""

from typing import Any

import torch
import transformers
from torch import Tensor

from genlight.experts.maps import LayerMaps

_SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    # the usual 0.02 gives nearly equal logits whatever the experts do
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_hidden_layers": 3,
}
_QWEN = {"moe_intermediate_size": 24, "intermediate_size": 48, "num_experts": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 48, "num_local_experts": 8}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_QWEN, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_QWEN, "head_dim": 8, "norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", {"intermediate_size": 24, "num_experts": 8}),
    "deepseek_v2": ("DeepseekV2Config", {**_LATENT_ATTENTION, "routed_scaling_factor": 1.5}),
    "deepseek_v2_groups": (
        "DeepseekV2Config",
        {**_LATENT_ATTENTION, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    ),
    # the published config names its method, which transformers has no field for
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_LATENT_ATTENTION, "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1},
    ),
    "gpt_oss": ("GptOssConfig", {"intermediate_size": 32, "head_dim": 8, "num_local_experts": 8}),
}
NAMES = tuple(CONFIGS)
GROUPED = ("deepseek_v2_groups", "deepseek_v3")
KEPT = [0, 2, 5, 7]  # two of each group
UNGROUPED = tuple(name for name in NAMES if name not in GROUPED)


def tiny_model(name: str, **changes: Any) -> Any:
    """A model of the family, in evaluation mode; the same weights each time. Biases are random too."""
    config_class, own = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**_SHARED, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "bias" in key and ("experts" in key or "router" in key or "gate." in key):
                tensor.normal_(std=0.3)
    return model


def tokens(batch: int = 4, length: int = 12) -> Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    """The model's logits on `tokens()` or other ids."""
    return model(input_ids=tokens() if ids is None else ids, **inputs).logits


def block_inputs(model: Any, editor: Any) -> dict[str, Tensor]:
    """What enters the experts of each layer, [T, H], on `tokens()`."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.experts.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in editor.layers.items()
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


def state(model: Any) -> dict[str, bytes]:
    """Every bit of a model's weights and buffers."""
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def random_maps(seed: int, kept: int = 4) -> LayerMaps:
    """Real-valued maps near the selection of `kept` random experts."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.eye(8)[torch.randperm(8, generator=generator)[:kept].sort()[0]]
    noise = 0.1 * torch.randn(2, kept, 8, generator=generator)
    return LayerMaps(rows + noise[0], rows + noise[1])
