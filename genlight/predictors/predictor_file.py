"""A trained predictor as files: predictor.safetensors and predictor.json, read without Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlight.errors import UserError
from genlight.io import (
    CorruptFileError,
    atomic_write_json,
    load_tensors,
    read_json,
    save_tensors,
    verify_if_described,
)
from genlight.predictors.expert_heads import FittedExpertScores, FittedFusion, ScoreScale, all_scores
from genlight.predictors.experts import ExpertEnsemble, ExpertSettings
from genlight.predictors.feature_heads import fit_head
from genlight.predictors.pool import Categories, Standardiser

WEIGHTS, RECORD = "predictor.safetensors", "predictor.json"
FUSION = "fusion"
_KIND, _VERSION = "predictor", 1
_NETWORK = "network."


@dataclass(frozen=True)
class TrainedExperts:
    """A network with what its predictions need beside it.

    Attributes:
        network: after training.
        scale: of its scores on the pool.
        names: of the low-fidelity scores that its experts learned.
        head: "fusion" for the network's own gate, or a regression on frozen experts: "gp", "ridge", "forest".
        tokens, targets: what was measured, int64 [n, T] and float [n].
        categories: as in `Pool`.
    """

    network: ExpertEnsemble
    scale: ScoreScale
    names: tuple[str, ...]
    head: str
    tokens: Tensor
    targets: Tensor
    categories: Categories = ()

    def numbered(self, candidates: Sequence[Sequence[str | int]]) -> Tensor:
        """Candidates whose categories are texts or numbers, [n, T], as tokens int64 [n, T].

        Raises:
            ValueError: a text that the table of the training did not have, or another T.
        """
        names = self.categories or ((),) * len(self.network.vocabulary)
        found = []
        for candidate in candidates:
            if len(candidate) != len(names):
                raise ValueError(f"{list(candidate)} has {len(candidate)} categories, not {len(names)}")
            for place, (value, known) in enumerate(zip(candidate, names)):
                if known and value not in known:
                    raise ValueError(f"category {place} is {value!r}; it must be one of {', '.join(known)}")
            found.append([known.index(value) if known else int(value) for value, known in zip(candidate, names)])
        return torch.tensor(found)

    def fitted(self) -> FittedFusion | FittedExpertScores:
        """What predicts; a regression is fitted here, which takes milliseconds."""
        if self.head == FUSION:
            return FittedFusion((self.network,), (self.scale,))
        features = self.scale.experts(all_scores(self.network, self.tokens)[1].T)
        return FittedExpertScores(self.network, self.scale.experts, fit_head(self.head, features, self.targets))


def save_predictor(folder: str | Path, trained: TrainedExperts, facts: Mapping[str, Any]) -> None:
    """Write both files into a folder; `facts` are plain values that go into the record as they are."""
    folder = Path(folder)
    tensors = {
        _NETWORK + name: value.detach().cpu().contiguous() for name, value in trained.network.state_dict().items()
    }
    for part in ("score", "experts"):
        scale = getattr(trained.scale, part)
        tensors |= {f"scale.{part}.mean": scale.mean, f"scale.{part}.std": scale.std}
    tensors |= {"measured.tokens": trained.tokens, "measured.targets": trained.targets}
    record = {"kind": _KIND, "version": _VERSION, **describe(trained.network, trained.names), "head": trained.head}
    record |= {"categories": [list(names) for names in trained.categories]}
    save_tensors(folder / WEIGHTS, tensors, {"kind": _KIND})
    atomic_write_json(folder / RECORD, {**record, "facts": dict(facts)})


def load_predictor(folder: str | Path) -> TrainedExperts:
    """Read what `save_predictor` wrote; ``.fitted().predict(tokens)`` gives mean and deviation.

    Raises:
        UserError: a file is missing, of another kind or of a newer version.
        CorruptFileError: damaged, or not what the record describes.
    """
    folder = Path(folder)
    for name in (WEIGHTS, RECORD):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: it is not the folder of a predictor")
    verify_if_described(folder)
    record, (tensors, _) = read_json(folder / RECORD), load_tensors(folder / WEIGHTS)
    if not isinstance(record, dict) or record.get("kind") != _KIND or record.get("version") != _VERSION:
        raise UserError(f"{folder / RECORD} is not the record of a predictor of version {_VERSION}")
    try:
        network, names = rebuild(record)
        state = {name.removeprefix(_NETWORK): value for name, value in tensors.items() if name.startswith(_NETWORK)}
        network.load_state_dict(state)
        scales = [
            Standardiser(tensors[f"scale.{part}.mean"], tensors[f"scale.{part}.std"]) for part in ("score", "experts")
        ]
        measured = tensors["measured.tokens"], tensors["measured.targets"]
        categories = categories_of(record)
        return TrainedExperts(network.eval(), ScoreScale(*scales), names, str(record["head"]), *measured, categories)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptFileError(f"{folder}: record and weights of the predictor do not fit together: {error}") from error


def describe(network: ExpertEnsemble, names: Sequence[str]) -> dict[str, Any]:
    """What the weights mean, as plain values: shape of the network, vocabulary, the experts' scores."""
    return {
        "network": {**asdict(network.settings), "head": list(network.settings.head)},
        "vocabulary": list(network.vocabulary),
        "low_fidelity": list(names),
    }


def categories_of(record: Mapping[str, Any]) -> Categories:
    """As in `Pool`, from a record; those of before they were noted have none."""
    return tuple(tuple(map(str, names)) for names in record.get("categories", ()))


def rebuild(description: Mapping[str, Any]) -> tuple[ExpertEnsemble, tuple[str, ...]]:
    """An untrained network as `describe` tells it, and the names of its experts' scores.

    Raises:
        KeyError, TypeError, ValueError: the description is not of that form.
    """
    names = tuple(str(name) for name in description["low_fidelity"])
    settings = ExpertSettings(**description["network"])
    with torch.random.fork_rng(devices=[]):
        return ExpertEnsemble(settings, description["vocabulary"], max(1, len(names))), names
