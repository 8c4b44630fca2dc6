"""Pruning and merging the experts of a live model, again and again, and giving it back bit for bit."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genlight.checkpoints.mixing import free_bytes
from genlight.experts.families import Routing, check_count, family_of, find_blocks, renormalises, routing_of
from genlight.experts.layer import ExpertLayer, LayerEdit
from genlight.experts.maps import LayerMaps, chosen_rows, is_identity, selection_maps

RouterMapping = Literal["logits", "post_softmax"]


class ExpertEditor:
    """Edits the mixture-of-experts layers of a causal language model of transformers in place.

    The weights in the model stay its own; edits act while layers run (see `layer.py`). Besides the model, memory holds
    the merged experts of one layer, the one that runs. With `keep_merged` it holds those of all merged layers, in
    exchange for merging once a candidate instead of once a forward pass: worth it for many short passes (generation).
    Merging in each pass costs as much as about E' E / k tokens. Pruned layers hold nothing and cost nothing.

    The number of experts may differ between layers in every family while the model is live, because each layer's router
    and experts are modules of their own. No family can save that: the config has one number for all layers.

    Attributes:
        model: the model.
        family: how it stores experts.
        layers: its mixture-of-experts layers by name, in order.
        num_experts: E, without edits.
        own_routing: how the model routes without edits.
        routing: how it routes now.
        router_mapping: "logits" mixes rows of the router (can be saved for any matrix), "post_softmax" mixes its
            probabilities, as the paper of EEP does. One-hot rows mean the same in both if weights are renormalised.
    """

    def __init__(
        self, model: nn.Module, *, router_mapping: RouterMapping = "logits", keep_merged: bool = False
    ) -> None:
        """
        Args:
            model: a transformers model with its `config`.
            router_mapping: what W_RM mixes.
            keep_merged: hold the merged experts of all layers.

        Raises:
            ValueError: an unknown family, no such layer, sharded or offloaded weights, an unknown `router_mapping`.
        """
        if router_mapping not in ("logits", "post_softmax"):
            raise ValueError(f"router_mapping = {router_mapping!r} must be 'logits' or 'post_softmax'")
        self.model, self.config, self.router_mapping = model, _config_of(model), router_mapping
        self.family = family_of(self.config)
        self.num_experts = int(getattr(self.config, self.family.count_field))
        self.own_routing = self.routing = routing_of(self.config, self.family)
        self.layers = {
            name: ExpertLayer(name, block, self.family, self.num_experts, keep_merged)
            for name, block in find_blocks(model, self.family).items()
        }
        self._maps: dict[str, LayerMaps] = {}

    @property
    def maps(self) -> Mapping[str, LayerMaps]:
        """The edits that are on, by layer; layers that keep their experts are absent."""
        return dict(self._maps)

    @property
    def edited(self) -> bool:
        """Whether the model does anything but what it did before."""
        return bool(self._maps) or self.routing != self.own_routing

    def read(self, layer: str) -> dict[str, Tensor]:
        """The experts of a layer as its next forward pass uses them, [experts, ...] by name.

        Live tensors, not copies, where the layer is not edited.
        """
        found = self._layer(layer)
        return found.edited_weights() if layer in self._maps else found.weights()

    def prune(self, layer: str, kept: Sequence[int]) -> None:
        """Keep these experts of a layer, numbered as without edits; whatever was on in it is replaced.

        Raises:
            ValueError: an unknown layer, experts that are not there, or too few for the routing.
        """
        self._change({layer: selection_maps(kept, self.num_experts)})

    def merge(self, layer: str, expert_map: Tensor, router_map: Tensor, neuron_orders: Tensor | None = None) -> None:
        """Make new experts of a layer from its old ones, and router rows by a matrix of their own.

        Args:
            layer: its name.
            expert_map: W_EM, [kept, experts].
            router_map: W_RM, [kept, experts].
            neuron_orders: [experts, I], see `LayerMaps`.

        Raises:
            ValueError: an unknown layer, matrices that do not fit, or too few experts for the routing.
        """
        self._change({layer: LayerMaps(expert_map, router_map, neuron_orders)})

    def restore(self, layer: str | None = None) -> None:
        """Give back one layer, or the whole model with its own routing: exactly what it was."""
        if layer is None:
            self.apply({})
        else:
            self._layer(layer)
            self._set({name: maps for name, maps in self._maps.items() if name != layer}, self.routing)

    def route(self, *, num_experts_per_tok: int | None = None, ungroup: bool = False) -> None:
        """Change how many experts a token gets, or let it choose from all groups, in all layers.

        Args:
            num_experts_per_tok: k; the model's own if None.
            ungroup: route without groups.

        Raises:
            ValueError: a layer has fewer experts than that.
        """
        self._set(self._maps, self._routing(num_experts_per_tok, ungroup))

    def apply(
        self, maps: Mapping[str, LayerMaps], *, num_experts_per_tok: int | None = None, ungroup: bool = False
    ) -> list[str]:
        """Make the model what a candidate says, from whatever it was; layers without maps get their own experts.

        Only layers that differ from what is on are touched. Nothing changes where an error is raised.

        Returns:
            The names of the layers that were touched.

        Raises:
            ValueError: an unknown layer, or maps that do not fit it or the routing.
        """
        return self._set(maps, self._routing(num_experts_per_tok, ungroup))

    @contextmanager
    def keeping_merged(self) -> Iterator[None]:
        """Merge each layer once for many passes, such as the tokens of an answer, where a device has room for that.

        As much again is left for the passes. Afterwards the merged experts are let go.
        """
        needed: Counter[torch.device] = Counter()
        for layer in self.layers.values():
            needed[layer.device] += layer.merged_bytes
        with ExitStack() as ending:
            if all(device.type in ("cpu", "cuda") and 2 * n <= free_bytes(device) for device, n in needed.items()):
                for layer in self.layers.values():
                    ending.callback(layer.keep, layer.keep_merged)
                    layer.keep(True)
            yield

    def experts_left(self) -> dict[str, int]:
        """E' of every layer."""
        return {name: self._maps[name].num_experts if name in self._maps else self.num_experts for name in self.layers}

    def num_parameters(self) -> int:
        """Parameters that the model has once its edits are saved."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        for name, left in self.experts_left().items():
            tensors = [*self.layers[name].weights().values(), *self.layers[name].router_rows().values()]
            each = sum(tensor[0].numel() for tensor in tensors if isinstance(tensor, nn.Parameter))
            total -= (self.num_experts - left) * each
        return total

    def edit_of(self, maps: LayerMaps | None) -> LayerEdit | None:
        """What a layer does with these maps and the routing that is on; None for nothing but what it always does."""
        if maps is None and self.routing == self.own_routing:
            return None
        maps = selection_maps(range(self.num_experts), self.num_experts) if maps is None else maps
        return LayerEdit(maps, self.routing, self.mixes_probabilities(maps), renormalises(self.config, self.family))

    def mixes_probabilities(self, maps: LayerMaps) -> bool:
        """Whether these maps need the router's probabilities, so that no changed row of the router does the same.

        One-hot rows only delete experts. Deleting rows of the router deletes them too, if the weights of the chosen
        are renormalised: ratios of a softmax do not depend on what is left out.
        """
        renormalised = renormalises(self.config, self.family) or self.family.scores == "sigmoid"
        deletes = is_identity(maps) or (renormalised and chosen_rows(maps.router_map) is not None)
        return self.router_mapping == "post_softmax" and not deletes

    def _routing(self, num_experts_per_tok: int | None, ungroup: bool) -> Routing:
        own = self.own_routing
        per_token = own.num_experts_per_tok if num_experts_per_tok is None else num_experts_per_tok
        if per_token < 1:
            raise ValueError(f"num_experts_per_tok = {per_token} must be at least 1")
        return Routing(per_token) if ungroup else Routing(per_token, own.n_group, own.topk_group)

    def _layer(self, name: str) -> ExpertLayer:
        if name not in self.layers:
            raise ValueError(f"{name!r} is no layer with experts; there are {', '.join(self.layers)}")
        return self.layers[name]

    def _change(self, changes: Mapping[str, LayerMaps]) -> None:
        self._set({**self._maps, **changes}, self.routing)

    def _set(self, maps: Mapping[str, LayerMaps], routing: Routing) -> list[str]:
        for name, one in maps.items():
            self._layer(name)
            self._check(name, one, routing)
        for name in self.layers.keys() - maps.keys():
            self._check_count(name, self.num_experts, routing)
        wanted = {name: one for name, one in maps.items() if not is_identity(one)}
        touched = [
            name for name in self.layers if routing != self.routing or not _same(wanted.get(name), self._maps.get(name))
        ]
        self._maps, self.routing = wanted, routing
        for name in touched:
            self.layers[name].set(self.edit_of(wanted.get(name)))
        return touched

    def _check(self, name: str, maps: LayerMaps, routing: Routing) -> None:
        experts = maps.expert_map.shape[1]
        if experts != self.num_experts:
            raise ValueError(f"{name}: maps are of {experts} experts, the layer has {self.num_experts}")
        self._check_count(name, maps.num_experts, routing)
        neurons = self._neurons(name)
        if maps.neuron_orders is not None and maps.neuron_orders.shape[1] != neurons:
            raise ValueError(f"{name}: neuron_orders has {maps.neuron_orders.shape[1]} columns, experts {neurons}")
        rows = chosen_rows(maps.router_map)
        if rows is not None and routing.n_group > 1:
            old = rows // (self.num_experts // routing.n_group)
            new = torch.arange(maps.num_experts) // (maps.num_experts // routing.n_group)
            if not torch.equal(old, new):
                counts = torch.bincount(old, minlength=routing.n_group).tolist()
                raise ValueError(
                    f"{name}: {counts} experts are kept of the {routing.n_group} groups: keep as many in each, in "
                    "order, or route without groups (ungroup)"
                )
        if self.mixes_probabilities(maps) and (
            self.family.scores != "softmax" or self.family.top_first or routing.n_group > 1
        ):
            raise ValueError(
                f"router_mapping = 'post_softmax' is not defined for {self.family.model_type}: it does not choose by "
                "a softmax over all experts; use 'logits'"
            )

    def _check_count(self, name: str, num_experts: int, routing: Routing) -> None:
        try:
            check_count(num_experts, routing, self.family)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _neurons(self, name: str) -> int:
        tensor = next(d for d in self.family.tensors if d.neurons is not None and not d.pairing)
        assert tensor.neurons is not None
        return self.layers[name].weights()[tensor.name].shape[tensor.neurons]


def _same(one: LayerMaps | None, other: LayerMaps | None) -> bool:
    return (one is None and other is None) or (one is not None and one.same(other))


def _config_of(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config: experts are edited in models of transformers")
    return config
