"""Saving an edited model as a folder that plain transformers loads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from genlight.experts.editor import ExpertEditor
from genlight.experts.families import renormalises
from genlight.io import atomic_folder


def export(editor: ExpertEditor, folder: str | Path, *, replace: bool = False) -> None:
    """Write the edited model with `save_pretrained`: safetensors and a config with the new number of experts.

    The live model is given back as it was. Merged layers are written from host memory, one after the other, so that the
    device holds the model and one layer.

    Args:
        editor: with the edits to be saved.
        folder: to create; the tokenizer is the caller's to add.
        replace: swap out a folder that is there.

    Raises:
        ValueError: the edits cannot be saved (see `check_exportable`).
        FileExistsError: the folder exists and `replace` is false.
    """
    check_exportable(editor)
    with atomic_folder(folder, replace=replace) as temporary:
        save_edited(editor, temporary)


def save_edited(editor: ExpertEditor, folder: str | Path) -> None:
    """As `export`, into a folder that is there already, whose owner sees to it that it is whole."""
    check_exportable(editor)
    model: Any = editor.model
    with _as_saved(editor):
        model.save_pretrained(folder)


def check_exportable(editor: ExpertEditor) -> None:
    """Check that plain transformers can do what the edited model does.

    Raises:
        ValueError: layers with different numbers of experts, or mixed probabilities, which no router of transformers
            computes.
    """
    left = editor.experts_left()
    if len(set(left.values())) > 1:
        raise ValueError(
            f"layers have different numbers of experts, {left}: {editor.family.count_field} in the config of "
            f"{editor.family.model_type} is one number for all"
        )
    mixing = [name for name, maps in editor.maps.items() if editor.mixes_probabilities(maps)]
    if mixing:
        why = "" if renormalises(editor.config, editor.family) else " and does not renormalise the chosen weights"
        raise ValueError(
            f"router_mapping = 'post_softmax' mixes probabilities in {mixing[0]}, but a router of "
            f"{editor.family.model_type} only takes the softmax of its own logits{why}: use router_mapping = 'logits'"
        )


def config_changes(editor: ExpertEditor) -> dict[str, int]:
    """Fields of the config that the edits change, with their new values."""
    family, config, routing = editor.family, editor.config, editor.routing
    fields = {
        family.count_field: next(iter(editor.experts_left().values())),
        "num_experts_per_tok": routing.num_experts_per_tok,
    }
    if routing.n_group != editor.own_routing.n_group:
        fields |= {"n_group": routing.n_group, "topk_group": routing.topk_group}
    return {name: value for name, value in fields.items() if getattr(config, name) != value}


@contextmanager
def _as_saved(editor: ExpertEditor) -> Iterator[None]:
    own: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        own.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        for field, value in config_changes(editor).items():
            put(editor.config, field, value)
        for name in editor.maps:
            layer = editor.layers[name]
            # one tensor at a time goes to the host before the next is made
            rows = layer.edited_router_rows()
            edited = [(layer.experts, key, layer.edited_weight(key).cpu()) for key in layer.weights()]
            edited += [(layer.router, key, row.cpu()) for key, row in rows.items()]
            for module, key, tensor in edited:
                is_parameter = isinstance(getattr(module, key), nn.Parameter)
                put(module, key, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        yield
    finally:
        for owner, name, value in reversed(own):
            setattr(owner, name, value)
