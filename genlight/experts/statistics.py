"""What experts do on calibration data: one pass through the model, with hooks on its routers and experts.

Sums are kept a layer, and a random sample of the tokens that entered it. Padding counts nowhere. What is defined on the
outputs of all experts (similarities, reconstruction) is computed from the sample afterwards.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, one_hot

from genlight.experts.editor import ExpertEditor
from genlight.experts.layer import ExpertLayer
from genlight.experts.maps import chosen_rows


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums over the tokens of one layer, on the CPU.

    Attributes:
        tokens: int64 []: real tokens that entered the layer.
        frequency: int64 [E]: tokens that were routed to an expert.
        soft_activation: float64 [E]: sum of the router's score, over all tokens; softmax of all logits, or sigmoid.
        output_norm: float64 [E]: sum of ‖f_e(x)‖₂ over the tokens routed to e (EAN).
        gated_norm: float64 [E]: the same times the token's routing weight.
        inputs: [n, H]: a uniform sample of the tokens.
        priorities: float64 [n]: random numbers by which the sample was taken, ascending.
    """

    tokens: Tensor
    frequency: Tensor
    soft_activation: Tensor
    output_norm: Tensor
    gated_norm: Tensor
    inputs: Tensor
    priorities: Tensor

    @property
    def reap(self) -> Tensor:
        """Mean of routing weight times output norm over the tokens routed to an expert, [E]; 0 if there are none.

        Router-weighted Expert Activation Pruning (Lasby et al. 2025, arXiv:2510.13999).
        """
        return self.gated_norm / self.frequency.clamp_min(1)

    def plus(self, other: "LayerStatistics", kept: int) -> "LayerStatistics":
        """Statistics of both passes, as one pass over all their tokens; the sample has up to `kept` tokens.

        The passes must have been made with different seeds, so that their priorities are independent.
        """
        priorities = torch.cat([self.priorities, other.priorities])
        chosen = priorities.argsort(stable=True)[:kept]
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)[:5]}
        inputs = torch.cat([self.inputs, other.inputs])
        return LayerStatistics(**sums, inputs=inputs[chosen], priorities=priorities[chosen])


class RoutingStatistics:
    """Collects statistics of all layers while the model runs inside the `with` block.

    The tokens that count are those that the `attention_mask` [B, T] given to the model marks; all, if it has none. The
    sample is the same tokens in every layer, and depends on seed and order of the real tokens only: not on padding or
    batch size. A call of the model that raises counts nowhere. Each pass runs the experts twice, the second time
    without weights and sum.

    Attributes:
        kept_tokens: tokens a layer in the sample.
    """

    def __init__(self, editor: ExpertEditor, *, input_bytes: int = 1 << 28, seed: int = 0) -> None:
        """
        Args:
            editor: of the model, without edits.
            input_bytes: for the samples of all layers together, in host memory; 0 for none.
            seed: of the sample.

        Raises:
            ValueError: the model is edited, or `input_bytes` is negative.
        """
        if editor.edited:
            raise ValueError("statistics are those of the model without edits: restore() it first")
        if input_bytes < 0:
            raise ValueError(f"input_bytes = {input_bytes} must not be negative")
        self.editor = editor
        rows = next(iter(editor.layers.values())).router_rows()["weight"]
        dtype = next(iter(editor.model.parameters())).dtype
        self.kept_tokens = input_bytes // (len(editor.layers) * rows.shape[1] * dtype.itemsize)
        self._generator = torch.Generator().manual_seed(seed)
        self._results: dict[str, LayerStatistics] = {}
        self._handles: list[Any] = []
        self._pending: dict[str, LayerStatistics] = {}
        self._random_before: Tensor | None = None  # of a call that has not come to its end
        self._mask: Tensor | None = None
        self._priorities: Tensor | None = None
        self._routed: dict[str, Tensor] = {}

    def __enter__(self) -> "RoutingStatistics":
        model = self.editor.model
        self._handles = [
            model.register_forward_pre_hook(self._see_mask, with_kwargs=True),
            model.register_forward_hook(self._see_end),
        ]
        for name, layer in self.editor.layers.items():
            self._handles += [
                layer.router.register_forward_hook(lambda _, __, output, name=name: self._see_logits(name, output[0])),
                layer.experts.register_forward_hook(lambda _, inputs, __, name=name: self._see_experts(name, *inputs)),
            ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def results(self) -> dict[str, LayerStatistics]:
        """What was collected so far, by layer.

        Raises:
            ValueError: no token was seen.
        """
        if not self._results:
            raise ValueError("no token was seen: run the model inside the with block")
        return dict(self._results)

    def _see_mask(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask of shape {list(mask.shape)} must be [batch, tokens] to count tokens")
        self._mask, self._priorities = mask, None
        if self._random_before is not None:  # the call before failed
            self._generator.set_state(self._random_before)
        self._random_before, self._pending = self._generator.get_state(), {}

    def _see_end(self, *_: Any) -> None:
        for name, found in self._pending.items():
            before = self._results.get(name)
            self._results[name] = found if before is None else before.plus(found, self.kept_tokens)
        self._random_before = None

    def _see_logits(self, name: str, logits: Tensor) -> None:
        self._routed[name] = logits.detach()

    def _see_experts(self, name: str, inputs: Tensor, index: Tensor, weights: Tensor) -> None:
        layer, logits = self.editor.layers[name], self._routed.pop(name)
        with torch.no_grad():
            real = self._real_tokens(len(inputs), inputs.device)
            ones = torch.ones_like(weights[:, :1])
            norms = torch.stack(
                [
                    layer.experts.forward(inputs, index[:, s : s + 1], ones).float().norm(dim=1)
                    for s in range(index.shape[1])
                ],
                dim=1,
            )
            inputs, index, norms = inputs[real], index[real], norms[real]
            # products with one-hot rows, because sums by index are not reproducible on GPUs
            hits = one_hot(index, layer.num_experts).to(norms.dtype)
            softmax = layer.family.scores == "softmax"
            scores = logits[real].float().softmax(dim=1) if softmax else logits[real].float().sigmoid()
            sums = {
                "tokens": torch.tensor(len(inputs)),
                "frequency": hits.sum(dim=(0, 1)).cpu().round().long(),
                "soft_activation": scores.sum(dim=0).cpu().double(),
                "output_norm": torch.einsum("tke,tk->e", hits, norms).cpu().double(),
                "gated_norm": torch.einsum("tke,tk->e", hits, norms * weights[real].float()).cpu().double(),
            }
            # every layer sees the same tokens, so one draw of priorities serves a whole pass
            if self._priorities is None:
                self._priorities = torch.rand(len(inputs), generator=self._generator, dtype=torch.float64)
            chosen = self._priorities.argsort(stable=True)[: self.kept_tokens]
            sample = inputs[chosen.to(inputs.device)].detach().cpu()
        self._pending[name] = LayerStatistics(**sums, inputs=sample, priorities=self._priorities[chosen])

    def _real_tokens(self, tokens: int, device: torch.device) -> Tensor:
        if self._mask is None:
            return torch.arange(tokens, device=device)
        # with a cache of earlier tokens the mask is longer than what runs
        mask = self._mask[:, -(tokens // len(self._mask)) :]
        return mask.reshape(-1).to(device).bool().nonzero().squeeze(1)


@torch.no_grad()
def routing_load(editor: ExpertEditor, run: Callable[[], object]) -> dict[str, Tensor]:
    """How often each expert is chosen in all layers while `run` calls the model, int64 [E] by layer, on the CPU.

    Under an edit, an expert that is only kept counts under its old number, a merged one under that of the old expert
    it has most of. Padding, as the `attention_mask` marks it, does not count, nor does a call that raises.
    """
    counts = {name: torch.zeros(editor.num_experts, dtype=torch.int64) for name in editor.layers}
    masks: list[Tensor | None] = [None]
    pending: list[tuple[str, Tensor]] = []

    def see_mask(_: nn.Module, __: Any, kwargs: Mapping[str, Any]) -> None:
        masks[0] = kwargs.get("attention_mask")
        pending.clear()

    def see_end(*_: Any) -> None:
        for name, found in pending:
            counts[name] += found

    def see_index(name: str, index: Tensor) -> None:
        chosen = index.cpu()
        if masks[0] is not None:
            chosen = chosen[masks[0].reshape(-1).cpu().bool()]
        maps = editor.maps.get(name)
        if maps is not None and chosen_rows(maps.expert_map) is None:
            chosen = maps.expert_map.argmax(dim=1)[chosen]
        pending.append((name, torch.bincount(chosen.flatten(), minlength=editor.num_experts)))

    handles: list[Any] = [editor.model.register_forward_pre_hook(see_mask, with_kwargs=True)]
    handles.append(editor.model.register_forward_hook(see_end))
    for name, layer in editor.layers.items():
        handles.append(layer.experts.register_forward_pre_hook(lambda _, inputs, name=name: see_index(name, inputs[1])))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


@torch.no_grad()
def router_similarity(layer: ExpertLayer, inputs: Tensor) -> Tensor:
    """Cosine of the logits of each pair of experts over tokens, float32 [E, E] on the CPU (M-SMoE, section 3).

    Args:
        layer: without edits.
        inputs: sampled tokens [n, H].
    """
    logits = layer.router(inputs.to(layer.device))[0].float().T
    return cosine_similarity(logits[:, None], logits[None], dim=-1).cpu()


@torch.no_grad()
def output_distances(layer: ExpertLayer, inputs: Tensor) -> Tensor:
    """Euclidean distance of the mean outputs of each pair of experts, float64 [E, E] on the CPU (HC-SMoE, section 3).

    The mean is over all tokens, whether they are routed to the expert or not.

    Args:
        layer: without edits.
        inputs: sampled tokens [n, H].
    """
    inputs = inputs.to(layer.device)
    means = torch.stack([layer.expert_output(e, inputs).double().mean(dim=0) for e in range(layer.num_experts)])
    return torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").cpu()
