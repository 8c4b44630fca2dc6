"""Which experts to keep, or to merge, without a search: what a searched model is always compared with."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor
from torch.nn.functional import one_hot

from genlight.experts.alignment import neuron_orders
from genlight.experts.editor import ExpertEditor
from genlight.experts.families import check_count
from genlight.experts.layer import ExpertLayer, LayerEdit
from genlight.experts.maps import LayerMaps, selection_maps
from genlight.experts.statistics import LayerStatistics, output_distances, router_similarity

_CHUNK_BYTES = 1 << 26

SCORES: dict[str, Callable[[LayerStatistics], Tensor]] = {
    "frequency": lambda statistics: statistics.frequency,
    "soft_activation": lambda statistics: statistics.soft_activation,
    "ean": lambda statistics: statistics.output_norm,
    "reap": lambda statistics: statistics.reap,
}
BASELINES = ("random", *SCORES, "naee", "m_smoe", "hc_smoe")


@dataclass(frozen=True)
class _Task:
    """One layer, with what a baseline may know of it."""

    editor: ExpertEditor
    layer: ExpertLayer
    statistics: LayerStatistics
    left: int
    seed: int
    max_subsets: int

    @property
    def groups(self) -> int:
        return self.editor.routing.n_group


def baseline(
    name: str,
    editor: ExpertEditor,
    statistics: Mapping[str, LayerStatistics],
    num_experts: int,
    *,
    seed: int = 0,
    max_subsets: int = 5000,
) -> dict[str, LayerMaps]:
    """Edits of every layer that leave it `num_experts` experts.

    | name | keeps or merges |
    |---|---|
    | random | any experts |
    | frequency | those that most tokens are routed to |
    | soft_activation | the largest sums of router scores |
    | ean | the largest sums of output norms over routed tokens |
    | reap | the largest means of routing weight times output norm over routed tokens |
    | naee | the set with which the layer's output changes least, of all sets or of `max_subsets` random ones |
    | m_smoe | experts used most take in those whose router logits are most like theirs; neurons are matched first |
    | hc_smoe | merges clusters of mean outputs, by average linkage |

    Sources: EEP, appendix A.2, for the first three; REAP and EAN: Lasby et al. 2025, arXiv:2510.13999; NAEE: Lu et al.
    2024, arXiv:2402.14800; M-SMoE: Li et al. 2023, arXiv:2310.01334; HC-SMoE: Chen et al. 2024, arXiv:2410.08589.

    Merged experts are means weighted by frequency. Router rows are merged by the same weights, or, where probabilities
    are mixed, added up. With group-limited routing every choice is made within each group. Ties go to lower numbers.

    Args:
        name: one of `BASELINES`.
        editor: of the model, whose edits must be off; its routing counts.
        statistics: by layer, from `RoutingStatistics`.
        num_experts: E', for all layers.
        seed: of random sets, by layer.
        max_subsets: most sets that NAEE tries a layer.

    Raises:
        ValueError: an unknown name, a number of experts that cannot route, a layer without statistics or, where they
            are needed, without sampled inputs.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline = {name!r} must be one of {', '.join(BASELINES)}")
    if editor.maps:
        raise ValueError("baselines are chosen for the model without edits: restore() it first")
    if num_experts > editor.num_experts:
        raise ValueError(f"num_experts = {num_experts} must be at most {editor.num_experts}, as the model has")
    check_count(num_experts, editor.routing, editor.family)
    found = {}
    for number, (layer_name, layer) in enumerate(editor.layers.items()):
        if layer_name not in statistics:
            raise ValueError(f"there are no statistics of {layer_name}")
        one = statistics[layer_name]
        if name in ("naee", "m_smoe", "hc_smoe") and not len(one.inputs):
            raise ValueError(f"{name} needs inputs of {layer_name}: collect statistics with more input_bytes")
        task = _Task(editor, layer, one, num_experts, seed + 1_000_003 * number, max_subsets)
        found[layer_name] = _edit_of(name, task)
    return found


def _edit_of(name: str, task: _Task) -> LayerMaps:
    experts = task.layer.num_experts
    if name in SCORES:
        return selection_maps(best_experts(SCORES[name](task.statistics), task.left, task.groups), experts)
    if name == "random":
        return selection_maps(next(_random_sets(task)), experts)
    if name == "naee":
        sets = list(_sets(task))
        losses = reconstruction_losses(task.editor, task.layer, task.statistics.inputs, sets)
        return selection_maps(sets[int(losses.argmin())], experts)
    if name == "m_smoe":
        return _m_smoe(task)
    return _hc_smoe(task)


def best_experts(scores: Tensor, num_experts: int, groups: int = 1) -> list[int]:
    """Experts with the largest scores, as many of each group, ascending; of equal ones the first.

    Args:
        scores: [E].
        num_experts: to be chosen.
        groups: of neighbouring experts.
    """
    rows = scores.view(groups, -1)
    order = rows.argsort(dim=1, descending=True, stable=True)[:, : num_experts // groups]
    return sorted((order + rows.shape[1] * torch.arange(groups)[:, None]).flatten().tolist())


@torch.no_grad()
def reconstruction_losses(
    editor: ExpertEditor, layer: ExpertLayer, inputs: Tensor, sets: Sequence[Sequence[int]]
) -> Tensor:
    """Squared Frobenius norm of the change of a layer's output, for each set of experts to keep, float64 [sets].

    The layer routes with its own router, cut to the set. A token's output is Σ_e w_e f_e, so its change d Fᵀ has the
    square d F Fᵀ d: the experts run once, and a set costs one pass of the router and [E, E] numbers a token.

    Args:
        editor: of the model.
        layer: without edits.
        inputs: tokens [n, H].
        sets: numbers of kept experts.
    """
    losses = torch.zeros(len(sets), dtype=torch.float64)
    experts = layer.num_experts
    step = max(1, _CHUNK_BYTES // (4 * experts * (inputs.shape[1] + experts)))
    for part in torch.split(inputs, step):
        tokens = part.to(layer.device)
        outputs = torch.stack([layer.expert_output(e, tokens).float() for e in range(experts)], dim=1)
        products = outputs @ outputs.transpose(1, 2)
        full = _dense_weights(layer, tokens, None)
        for number, kept in enumerate(sets):
            change = _dense_weights(layer, tokens, editor.edit_of(selection_maps(kept, experts))) - full
            losses[number] += float(torch.einsum("te,tef,tf->t", change, products, change).double().sum())
    return losses


def _dense_weights(layer: ExpertLayer, tokens: Tensor, edit: LayerEdit | None) -> Tensor:
    """Routing weight of every expert under an edit that selects, float32 [n, E]; 0 for those not chosen."""
    before = layer.edit
    layer.set(edit)
    try:
        _, weights, index = layer.router(tokens)
    finally:
        layer.set(before)
    return torch.zeros(len(tokens), layer.num_experts, device=tokens.device).scatter_add_(1, index, weights.float())


def _sets(task: _Task) -> Iterator[list[int]]:
    """All sets with as many experts of each group, or distinct random ones if there are more than `max_subsets`."""
    size, left = task.layer.num_experts // task.groups, task.left // task.groups
    if math.comb(size, left) ** task.groups > task.max_subsets:
        yield from itertools.islice(_random_sets(task), task.max_subsets)
        return
    for choice in itertools.product(itertools.combinations(range(size), left), repeat=task.groups):
        yield [size * group + member for group, members in enumerate(choice) for member in members]


def _random_sets(task: _Task) -> Iterator[list[int]]:
    rng, seen = np.random.default_rng(task.seed), set()
    while True:
        scores = torch.from_numpy(rng.random(task.layer.num_experts))
        kept = best_experts(scores, task.left, task.groups)
        if tuple(kept) not in seen:
            seen.add(tuple(kept))
            yield kept


def _m_smoe(task: _Task) -> LayerMaps:
    experts = task.layer.num_experts
    size = experts // task.groups
    dominant = best_experts(task.statistics.frequency, task.left, task.groups)
    alike = router_similarity(task.layer, task.statistics.inputs)
    targets = []
    for expert in range(experts):
        choices = [d for d in dominant if d // size == expert // size]
        # a copy of another dominant expert would leave that one without a row
        nearest = choices[int(alike[expert, choices].argmax())]
        targets.append(expert if expert in dominant else nearest)
    maps = _cluster_maps(task, [[e for e in range(experts) if targets[e] == d] for d in dominant])
    return LayerMaps(maps.expert_map, maps.router_map, neuron_orders(task.layer, targets))


def _hc_smoe(task: _Task) -> LayerMaps:
    size, left = task.layer.num_experts // task.groups, task.left // task.groups
    distances = output_distances(task.layer, task.statistics.inputs).numpy()
    clusters = []
    for start in range(0, task.layer.num_experts, size):
        own = distances[start : start + size, start : start + size]
        labels = clusters_of(own, left)
        clusters += [[start + e for e in range(size) if labels[e] == label] for label in dict.fromkeys(labels)]
    return _cluster_maps(task, clusters)


def clusters_of(distances: np.ndarray, number: int) -> list[int]:
    """Labels of `number` clusters of average linkage, from distances [n, n]."""
    if number == len(distances):
        return list(range(number))
    method = AgglomerativeClustering(n_clusters=number, metric="precomputed", linkage="average")
    return [int(label) for label in method.fit_predict(distances)]


def _cluster_maps(task: _Task, clusters: Sequence[Sequence[int]]) -> LayerMaps:
    experts = task.layer.num_experts
    members = torch.stack([one_hot(torch.tensor(c), experts).sum(dim=0) for c in clusters]).double()
    frequency = task.statistics.frequency.double()
    weights = members * frequency
    # experts that no token saw count alike among themselves
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, members)
    expert_map = (weights / weights.sum(dim=1, keepdim=True)).float()
    mixes_probabilities = task.editor.router_mapping == "post_softmax"
    return LayerMaps(expert_map, members.float() if mixes_probabilities else expert_map)
