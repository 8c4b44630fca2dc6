"""One mixture-of-experts layer, edited without touching its weights.

An edit lives in forward hooks: while the router or the experts run, they see the edited tensors, and afterwards the
model has its own again. So the weights never drift, restoring is removing hooks, and a layer that is only pruned costs
no copy at all: the router is cut to the kept rows, and its choices are translated to the numbers of the old experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genlight.experts.families import Family, Routing
from genlight.experts.maps import LayerMaps, chosen_rows
from genlight.experts.mixing import mix, reorder_neurons

_SMALLEST_SUM = 1e-6


@dataclass(frozen=True)
class LayerEdit:
    """What a layer shall do.

    Attributes:
        maps: its experts and router.
        routing: of the model.
        post_softmax: mix the router's probabilities instead of its rows (EEP, equation 6).
        renormalises: post_softmax only: divide the chosen probabilities by their sum.
    """

    maps: LayerMaps
    routing: Routing
    post_softmax: bool = False
    renormalises: bool = True


class ExpertLayer:
    """Router and experts of one layer, and the edit that is on.

    Attributes:
        name: of the block in the model.
        family: how it stores them.
        router: the router module; answers (logits, weights, indices) for tokens [T, H].
        experts: the module with the fused parameters.
        num_experts: E, without edits.
        edit: what is on now; None for the layer as it is.
        keep_merged: hold merged experts from their first use until the edit changes, instead of merging in each pass.
    """

    def __init__(self, name: str, block: nn.Module, family: Family, num_experts: int, keep_merged: bool) -> None:
        """
        Raises:
            ValueError: a tensor is not whole on this process (sharded, offloaded), or there are others beside those
                that the family names, such as the scales of quantized experts.
        """
        self.name, self.family, self.num_experts, self.keep_merged = name, family, num_experts, keep_merged
        self.router: nn.Module = getattr(block, family.router)
        self.experts: nn.Module = block.get_submodule("experts")
        for tensor_name, tensor in {**self.weights(), **self.router_rows()}.items():
            _check_whole(f"{name}: {tensor_name}", tensor, num_experts)
        self._check_named()
        self.edit: LayerEdit | None = None
        self._handles: list[Any] = []
        self._own: dict[nn.Module, dict[str, Any]] = {}
        self._merged: dict[str, Tensor] | None = None
        # the old expert behind each new one, int64 [E'], where no weights are mixed
        self._origin: Tensor | None = None

    def _check_named(self) -> None:
        held = {**dict(self.experts.named_parameters(recurse=False)), **dict(self.experts.named_buffers(recurse=False))}
        others = [key for key, value in held.items() if value.ndim and len(value) == self.num_experts]
        if unknown := sorted(set(others) - set(self.weights())):
            raise ValueError(
                f"{self.name}: its experts hold {', '.join(unknown)} too, which {self.family.model_type} does not "
                "name: quantized experts cannot be edited; load the model with its weights unpacked"
            )

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return next(iter(self.weights().values())).device

    def weights(self) -> dict[str, Tensor]:
        """The fused parameters, [E, ...] each: live tensors, not copies."""
        return {tensor.name: getattr(self.experts, tensor.name) for tensor in self.family.tensors}

    def router_rows(self) -> dict[str, Tensor]:
        """The tensors of the router with one row an expert, [E, ...] each: live tensors, not copies."""
        return {name: getattr(self.router, name) for name in self.family.router_rows}

    def edited_weights(self) -> dict[str, Tensor]:
        """The experts as the edit makes them, [E', ...]; the live tensors where none is on."""
        return {name: self.edited_weight(name) for name in self.weights()}

    def edited_router_rows(self) -> dict[str, Tensor]:
        """The router as the edit makes it, [E', ...]; unchanged where probabilities are mixed."""
        if self.edit is None or self.edit.post_softmax:
            return self.router_rows()
        router_map = self.edit.maps.router_map
        with torch.inference_mode(False), torch.no_grad():
            return {name: mix(router_map, rows.detach()) for name, rows in self.router_rows().items()}

    def set(self, edit: LayerEdit | None) -> None:
        """Let the next forward passes do as `edit` says; None gives the layer back as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._merged, self.edit = [], None, edit
        if edit is None:
            return
        self._origin = chosen_rows(edit.maps.expert_map)
        # prepended, so that recorded router logits are those handed on
        always = {"always_call": True, "prepend": True}
        self._handles = [
            self.router.register_forward_pre_hook(self._enter_router),
            self.router.register_forward_hook(self._leave_router, **always),
        ]
        if self._origin is None:
            self._handles += [
                self.experts.register_forward_pre_hook(self._enter_experts),
                self.experts.register_forward_hook(self._leave_experts, **always),
            ]

    @property
    def merged_bytes(self) -> int:
        """Of the merged experts; 0 where none are merged."""
        if self.edit is None or self._origin is not None:
            return 0
        whole = sum(tensor.nbytes for tensor in self.weights().values())
        return whole * self.edit.maps.num_experts // self.num_experts

    def keep(self, merged: bool) -> None:
        """Hold merged experts from now on, or let them go."""
        self.keep_merged = merged
        if not merged:
            self._merged = None

    def expert_output(self, expert: int, inputs: Tensor) -> Tensor:
        """What one expert, without edits, makes of every token: [T, H] from inputs [T, H]."""
        index = torch.full((len(inputs), 1), expert, device=inputs.device)
        output: Tensor = self.experts.forward(inputs, index, torch.ones_like(index, dtype=inputs.dtype))
        return output

    def edited_weight(self, name: str) -> Tensor:
        """One fused parameter as the edit makes it, [E', ...]."""
        if self.edit is None:
            return self.weights()[name]
        maps, tensor = self.edit.maps, getattr(self.experts, name).detach()
        with torch.inference_mode(False), torch.no_grad():
            if maps.neuron_orders is not None:
                description = next(d for d in self.family.tensors if d.name == name)
                tensor = reorder_neurons(description, tensor, maps.neuron_orders)
            return mix(maps.expert_map, tensor)

    def _enter_router(self, router: nn.Module, _: Any) -> None:
        assert self.edit is not None
        if self.edit.post_softmax:
            return
        routing = self.edit.routing
        attributes = {
            "num_experts": self.edit.maps.num_experts,
            "top_k": routing.num_experts_per_tok,
            "num_group": routing.n_group,
            "topk_group": routing.topk_group,
        }
        known = {name: value for name, value in attributes.items() if hasattr(router, name)}
        self._swap(router, {**self.edited_router_rows(), **known})

    def _leave_router(self, router: nn.Module, _: Any, output: Any) -> Any:
        assert self.edit is not None
        self._put_back(router)
        if output is None:  # the router raised
            return None
        logits, weights, index = output
        if self.edit.post_softmax:
            scaled, index = mapped_routing(
                logits, self.edit.maps.router_map, self.edit.routing.num_experts_per_tok, self.edit.renormalises
            )
            weights = (scaled * getattr(router, "routed_scaling_factor", 1.0)).to(weights.dtype)
        # the load-balancing loss of transformers counts on E columns
        missing = self.num_experts - logits.shape[-1]
        logits = torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits
        return logits, weights, index if self._origin is None else self._origin.to(index.device)[index]

    def _enter_experts(self, experts: nn.Module, _: Any) -> None:
        assert self.edit is not None
        merged, live = self._merged, next(iter(self.weights().values()))
        held = None if merged is None else next(iter(merged.values()))
        if merged is None or held is None or (held.device, held.dtype) != (live.device, live.dtype):
            merged = self.edited_weights()
        self._merged = merged if self.keep_merged else None
        self._swap(experts, {**merged, "num_experts": self.edit.maps.num_experts})

    def _leave_experts(self, experts: nn.Module, _: Any, __: Any) -> None:
        self._put_back(experts)

    def _swap(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        own = self._own.setdefault(module, {})
        for name, value in values.items():
            own[name] = getattr(module, name)
            is_parameter = isinstance(own[name], nn.Parameter)
            setattr(module, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)

    def _put_back(self, module: nn.Module) -> None:
        for name, value in self._own.pop(module, {}).items():
            setattr(module, name, value)


def mapped_routing(logits: Tensor, router_map: Tensor, top_k: int, renormalises: bool) -> tuple[Tensor, Tensor]:
    """Routing through mixed probabilities: top-k of softmax(logits) W_RMᵀ (EEP, equation 6).

    Rows may be negative, so the sum of the chosen is kept from vanishing.

    Args:
        logits: of the full router, [T, E].
        router_map: W_RM, [E', E].
        top_k: experts a token.
        renormalises: divide the chosen by their sum.

    Returns:
        Weights float32 [T, top_k] and indices int64 [T, top_k] among the E' new experts.
    """
    mapped = logits.float().softmax(dim=-1) @ router_map.to(logits.device, torch.float32).T
    weights, index = mapped.topk(top_k, dim=-1)
    if renormalises:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(_SMALLEST_SUM)
    return weights, index


def _check_whole(name: str, tensor: Tensor, num_experts: int) -> None:
    # DeepSpeed marks partitioned parameters with ds_id, DTensor has a device_mesh
    if tensor.is_meta or hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh") or len(tensor) != num_experts:
        raise ValueError(
            f"{name} of shape {list(tensor.shape)} on {tensor.device} does not hold all {num_experts} experts: sharded "
            "or offloaded models cannot be edited; load the model whole on one device or whole layers on several"
        )
