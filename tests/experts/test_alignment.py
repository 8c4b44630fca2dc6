"""Neurons put in another order are found again, in every layout."""

import pytest
import torch
from experts.tiny_models import UNGROUPED, block_inputs, logits, tiny_model

from genlight.experts.alignment import neuron_orders
from genlight.experts.editor import ExpertEditor
from genlight.experts.maps import LayerMaps
from genlight.experts.mixing import reorder_neurons


@pytest.mark.parametrize("name", UNGROUPED)
def test_a_shuffled_copy_is_matched_and_then_merges_without_loss(name: str) -> None:
    model = tiny_model(name)
    editor = ExpertEditor(model)
    layer_name, layer = next(iter(editor.layers.items()))
    inputs = block_inputs(model, editor)[layer_name]
    neurons = layer.experts.down_proj.shape[1 if name == "gpt_oss" else 2]
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for description in layer.family.tensors:
            tensor = getattr(layer.experts, description.name)
            tensor[1] = reorder_neurons(description, tensor[:1].detach(), order[None])[0]
    found = neuron_orders(layer, [0, 0, *range(2, 8)])
    assert torch.equal(order[found[1]], torch.arange(neurons))
    assert torch.equal(found[0], torch.arange(neurons))
    expected = layer.expert_output(0, inputs)
    rows = torch.eye(8)[:7]
    rows[1, :2] = 0.5
    for orders, equal in ((found, True), (None, False)):
        editor.apply({layer_name: LayerMaps(rows, torch.eye(8)[1:], orders)})
        merged = {key: tensor[1] for key, tensor in editor.read(layer_name).items()}
        editor.restore()
        for key, tensor in merged.items():
            same = torch.allclose(tensor, layer.weights()[key][0], rtol=1e-5, atol=1e-6)
            assert same == (equal or key == "down_proj_bias")
    assert torch.equal(layer.expert_output(0, inputs), expected) and bool(torch.isfinite(logits(model)).all())
