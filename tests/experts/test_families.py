"""Families: what is found in real models, what is refused, and that their descriptions say how experts compute."""

import pytest
import torch
import transformers
from experts.tiny_models import NAMES, block_inputs, tiny_model

from genlight.experts.editor import ExpertEditor
from genlight.experts.families import Routing, check_count, family_of, routing_of
from genlight.experts.mixing import neuron_features


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_found_in_order_and_dense_ones_passed_over(name: str) -> None:
    model = tiny_model(name)
    editor = ExpertEditor(model)
    dense = name.startswith(("deepseek", "qwen2"))
    assert list(editor.layers) == [f"model.layers.{i}.mlp" for i in range(dense, model.config.num_hidden_layers)]
    assert editor.num_experts == 8
    assert all(len(tensor) == 8 for layer in editor.layers for tensor in editor.read(layer).values())


def test_groups_are_read_where_routing_uses_them() -> None:
    expected = {"deepseek_v2": Routing(2), "deepseek_v2_groups": Routing(2, 2, 1), "deepseek_v3": Routing(2, 2, 1)}
    for name, routing in expected.items():
        config = tiny_model(name).config
        assert routing_of(config, family_of(config)) == routing


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_say_where_gate_up_and_down_of_a_neuron_are(name: str) -> None:
    """An expert computed from the features of its neurons, one by one, equals the model's own."""
    editor = ExpertEditor(tiny_model(name))
    layer_name, layer = next(iter(editor.layers.items()))
    inputs = block_inputs(editor.model, editor)[layer_name]
    hidden = inputs.shape[1]
    features = neuron_features(layer.family.tensors, layer.weights())
    has_bias = features.shape[2] == 3 * hidden + 2
    for expert in (0, 5):
        gate_weight, up_weight = features[expert, :, :hidden], features[expert, :, hidden : 2 * hidden]
        gate, up = inputs @ gate_weight.T, inputs @ up_weight.T
        if has_bias:  # gpt_oss, with its clamped gate
            gate, up = gate + features[expert, :, 2 * hidden], up + features[expert, :, 2 * hidden + 1]
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            inner, output_bias = (up + 1) * gate * torch.sigmoid(1.702 * gate), layer.experts.down_proj_bias[expert]
        else:
            inner, output_bias = torch.nn.functional.silu(gate) * up, 0
        expected = inner @ features[expert, :, -hidden:] + output_bias
        torch.testing.assert_close(layer.expert_output(expert, inputs), expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_family_is_named_with_the_known_ones() -> None:
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match=r"'llama'.*mixtral.*gpt_oss.*families\.py"):
        ExpertEditor(transformers.AutoModelForCausalLM.from_config(config))


def test_a_model_without_experts_is_refused_with_its_modules() -> None:
    with pytest.raises(ValueError, match=r"no qwen3_moe layer.*Qwen3MoeMLP"):
        ExpertEditor(tiny_model("qwen3_moe", mlp_only_layers=[0, 1]))


def test_weights_that_are_not_there_are_refused() -> None:
    with torch.device("meta"):
        config = tiny_model("mixtral").config
        model = transformers.MixtralForCausalLM(config)
    with pytest.raises(ValueError, match="does not hold all 8 experts"):
        ExpertEditor(model)
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj[:4].clone())
    with pytest.raises(ValueError, match="does not hold all 8 experts"):
        ExpertEditor(model)


@pytest.mark.parametrize(
    ("num_experts", "routing", "family", "message"),
    [
        (1, Routing(2), "mixtral", "at least num_experts_per_tok = 2"),
        (5, Routing(2, 2, 1), "deepseek_v3", "multiple of n_group = 2"),
        (2, Routing(1, 2, 1), "deepseek_v3", "2 or more experts in each group"),
        (1, Routing(1), "deepseek_v3", "2 or more experts in each group for deepseek_v3: keep as many .* group$"),
        (4, Routing(3, 4, 2), "deepseek_v2", "leaves 2 experts in the topk_group = 2 groups"),
    ],
)
def test_counts_that_cannot_route_are_refused(num_experts: int, routing: Routing, family: str, message: str) -> None:
    known = {"mixtral": "mixtral", "deepseek_v2": "deepseek_v2_groups", "deepseek_v3": "deepseek_v3"}
    with pytest.raises(ValueError, match=message):
        check_count(num_experts, routing, family_of(tiny_model(known[family]).config))
