"""Where each family of transformers keeps its experts and routers, as data.

All families hold the experts of a layer in fused parameters with the experts on axis 0, so that pruning is a selection
and merging one matrix product, whatever the other axes mean. The other axes matter only where single neurons of an
expert are moved.

| family | one expert of `gate_up_proj`, `down_proj` (H hidden, I neurons) | routing weights |
|---|---|---|
| mixtral | [2I, H] gate above up, [H, I] | softmax, renormalised over the chosen |
| qwen2_moe, qwen3_moe, olmoe | the same | softmax, renormalised if `norm_topk_prob` |
| deepseek_v2 | the same | softmax, never renormalised, times `routed_scaling_factor`; groups if `topk_method` says so |
| deepseek_v3 | the same | sigmoid, chosen with a correction bias, always by groups; renormalised if `norm_topk_prob` |
| gpt_oss | [H, 2I] gate and up in turn, [I, H], each with a bias | softmax over the chosen logits, router with a bias |

Shared experts (qwen2_moe, deepseek_v2, deepseek_v3) see every token and are never touched.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertTensor:
    """A fused parameter of the experts module, experts on axis 0.

    Attributes:
        name: its attribute.
        neurons: the axis of the I hidden neurons of an expert; None where there is none (bias of the output).
        pairing: "" for one entry a neuron; for two, gate and up, "halves" (all gates, then all ups) or "interleaved".
    """

    name: str
    neurons: int | None
    pairing: Literal["", "halves", "interleaved"] = ""


@dataclass(frozen=True)
class Family:
    """How one `model_type` of transformers stores and routes.

    Attributes:
        model_type: as in the config.
        count_field: config field with the number of experts.
        tensors: fused parameters of `block.experts`.
        router: attribute of the block that holds the router.
        router_rows: tensors of the router with one row an expert.
        scores: what turns a logit of the router into a score.
        renormalises: whether the chosen scores are divided by their sum; None: as `config.norm_topk_prob` says.
        top_first: the softmax is over the chosen logits only.
        min_group: experts that a group needs for its score (top-2 sum: 2); 0 where routing knows no groups.
        groups_if: `config.topk_method` with which routing is by groups; "": it always is, whatever stands there.
    """

    model_type: str
    count_field: str
    tensors: tuple[ExpertTensor, ...] = (
        ExpertTensor("gate_up_proj", neurons=1, pairing="halves"),
        ExpertTensor("down_proj", neurons=2),
    )
    router: str = "gate"
    router_rows: tuple[str, ...] = ("weight",)
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalises: bool | None = None
    top_first: bool = False
    min_group: int = 0
    groups_if: str = ""


FAMILIES = (
    Family("mixtral", "num_local_experts", renormalises=True),
    Family("qwen2_moe", "num_experts"),
    Family("qwen3_moe", "num_experts"),
    Family("olmoe", "num_experts"),
    Family("deepseek_v2", "n_routed_experts", renormalises=False, min_group=1, groups_if="group_limited_greedy"),
    Family(
        "deepseek_v3",
        "n_routed_experts",
        router_rows=("weight", "e_score_correction_bias"),
        scores="sigmoid",
        min_group=2,
    ),
    Family(
        "gpt_oss",
        "num_local_experts",
        tensors=(
            ExpertTensor("gate_up_proj", neurons=2, pairing="interleaved"),
            ExpertTensor("gate_up_proj_bias", neurons=1, pairing="interleaved"),
            ExpertTensor("down_proj", neurons=1),
            ExpertTensor("down_proj_bias", neurons=None),
        ),
        router="router",
        router_rows=("weight", "bias"),
        renormalises=True,
        top_first=True,
    ),
)


@dataclass(frozen=True)
class Routing:
    """How many experts a token gets, of which groups; one for the whole model, as its config holds one.

    Attributes:
        num_experts_per_tok: k.
        n_group: groups of neighbouring experts; 1 for routing without groups.
        topk_group: groups that a token may choose from.
    """

    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1


def family_of(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        ValueError: none is known for its `model_type`; the message says which are.
    """
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ValueError(
        f"model_type = {model_type!r} is no known mixture of experts; known are {known}. "
        "Describe another one in FAMILIES of genlight/experts/families.py"
    )


def routing_of(config: Any, family: Family) -> Routing:
    """How the model routes as its config stands."""
    per_token = int(config.num_experts_per_tok)
    grouped = family.min_group and (not family.groups_if or config.topk_method == family.groups_if)
    if not grouped or (config.n_group or 1) == 1:
        return Routing(per_token)
    return Routing(per_token, int(config.n_group), int(config.topk_group))


def renormalises(config: Any, family: Family) -> bool:
    """Whether the weights of the chosen experts sum to one (before any scaling factor)."""
    return bool(config.norm_topk_prob) if family.renormalises is None else family.renormalises


def check_count(num_experts: int, routing: Routing, family: Family) -> None:
    """Check that a layer with this many experts can route.

    Raises:
        ValueError: too few experts for k, or they do not fill the groups; the message says what would fit.
    """
    per_token, groups, top = routing.num_experts_per_tok, routing.n_group, routing.topk_group
    if num_experts < max(1, per_token):
        raise ValueError(
            f"num_experts = {num_experts} must be at least num_experts_per_tok = {per_token}; lower that first"
        )
    ungrouped = "" if groups == 1 else ", or route without groups (ungroup)"
    way_out = f"keep as many experts in each group{ungrouped}"
    if num_experts % groups or num_experts // groups < family.min_group:
        raise ValueError(
            f"num_experts = {num_experts} must be a multiple of n_group = {groups} with {family.min_group} or more "
            f"experts in each group for {family.model_type}: {way_out}"
        )
    reachable = top * (num_experts // groups)
    if per_token > reachable:
        raise ValueError(
            f"num_experts = {num_experts} leaves {reachable} experts in the topk_group = {top} groups of a token, "
            f"fewer than num_experts_per_tok = {per_token}: {way_out}"
        )


def find_blocks(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The mixture-of-experts blocks of a model by name, in the order of its layers.

    Dense layers, which the config asks for (`first_k_dense_replace`, `mlp_only_layers`), are passed over.

    Raises:
        ValueError: there is none; the message names the modules seen.
    """
    blocks = {name: module for name, module in model.named_modules() if _is_block(module, family)}
    if not blocks:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"{type(model).__name__} has no {family.model_type} layer with experts and a {family.router!r}; "
            f"its modules are {', '.join(kinds)}"
        )
    return blocks


def _is_block(module: nn.Module, family: Family) -> bool:
    experts, router = getattr(module, "experts", None), getattr(module, family.router, None)
    return all(_tensor(experts, tensor.name) for tensor in family.tensors) and all(
        _tensor(router, name) for name in family.router_rows
    )


def _tensor(module: object, name: str) -> bool:
    return isinstance(getattr(module, name, None), Tensor)
