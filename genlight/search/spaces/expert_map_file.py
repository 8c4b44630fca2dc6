"""The file that EEP leaves: what its best candidates keep and merge, to be applied to the whole model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from genlight.errors import UserError
from genlight.experts.editor import ExpertEditor
from genlight.io import read_json
from genlight.search.archive import MAX_BYTES, MAX_ENTRIES
from genlight.search.spaces.expert_maps import ExpertMaps, ExpertMapSpace

FILE, KIND, VERSION = "expert_maps.json", "expert_maps", 1


@dataclass(frozen=True)
class SavedMaps:
    """What stands in the file.

    Attributes:
        num_experts: E and E'.
        num_experts_per_tok: k of the candidates.
        router_mapping: what W_RM mixes.
        candidates: the best that only prunes and the best that merges, by name ("EEP prune", "EEP merge").
        chosen: the name of the one that was better on the select draw.
    """

    num_experts: tuple[int, int]
    num_experts_per_tok: int
    router_mapping: Literal["logits", "post_softmax"]
    candidates: Mapping[str, ExpertMaps]
    chosen: str

    def apply(self, editor: ExpertEditor, name: str | None = None) -> None:
        """Edit the whole model as a candidate says; `genlight.experts.export.export` then saves it, where that can be.

        Args:
            editor: of the model that was searched.
            name: of the candidate; None: the chosen one.

        Raises:
            ValueError: there is no such candidate, it was merged in aligned neurons, whose order the file does not
                hold, or it does not fit the model.
        """
        name = name or self.chosen
        if name not in self.candidates:
            raise ValueError(f"there is no candidate {name!r}; there are {', '.join(self.candidates)}")
        candidate, (before, left) = self.candidates[name], self.num_experts
        if candidate.neuron_orders:
            raise ValueError(f"{name} is merged in neurons aligned by {candidate.neuron_orders}, which the file lacks")
        if editor.num_experts != before:
            raise ValueError(f"the model has {editor.num_experts} experts a layer, the one that was searched {before}")
        groups = len(candidate.kept or candidate.expert_maps)
        maps = ExpertMapSpace(tuple(editor.layers), before, left, groups).layer_maps(candidate)
        editor.router_mapping = self.router_mapping
        editor.apply(maps, num_experts_per_tok=self.num_experts_per_tok)


_ADAPTER = TypeAdapter(SavedMaps)


def read_expert_maps(path: str | Path) -> SavedMaps:
    """The maps of an ``expert_maps.json``.

    Raises:
        FileNotFoundError, CorruptFileError: as `genlight.io.read_json`.
        UserError: another kind of file, an unknown version, or values that cannot be.
    """
    content = read_json(path, max_bytes=MAX_BYTES, max_entries=MAX_ENTRIES)
    found = (content.get("kind"), content.get("version")) if isinstance(content, dict) else None
    if found != (KIND, VERSION):
        raise UserError(f"{path} is no {KIND} of version {VERSION}: kind and version are {found}")
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
