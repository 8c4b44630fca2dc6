"""Tokens that never change: kept exactly, without a word in the range of the others, and guarded."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from genlight.quantization.constant_tokens import ConstantTokenLinear, with_constant_rows
from genlight.quantization.convert import quantize_layer, replace_layers
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.saving import load_quantized, save_quantized

STATIC = ActivationFormat(8, False, "static", "tensor")


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 16, bias=bias)


def text(batch: int = 3) -> torch.Tensor:
    found = torch.randn(batch, 7, 24, generator=torch.Generator().manual_seed(1))
    found[:, 0] = torch.linspace(-2, 2, 24)
    found[:, 0, 5] = 1e4
    return found


def made(form: LayerFormat, mismatch: str = "warn", plain: nn.Linear | None = None) -> ConstantTokenLinear:
    plain, values = plain or layer(), text()
    ranges = None
    if form.activation.mode == "static" and form.activation.bits != 16:
        ranges = torch.stack(values[:, 1:].aminmax()).reshape(1, 1, 2)
    quantized = quantize_layer(plain, form, activation_range=ranges)
    return with_constant_rows(quantized, plain, (0,), values[0, :1], mismatch)


def test_the_row_is_that_of_full_precision_in_the_fewest_bits() -> None:
    plain, found = layer(), made(LayerFormat(WeightFormat(2), STATIC))(text())
    assert torch.allclose(found[:, 0], plain(text())[:, 0], rtol=1e-5)
    assert not torch.allclose(found[:, 1], plain(text())[:, 1], rtol=1e-2)


def test_other_tokens_are_as_if_it_were_not_there() -> None:
    """The outlier has no part in their scale: eight bits of a range of some units, not of ten thousand."""
    plain, form = layer(), LayerFormat(WeightFormat(16), STATIC)
    own = quantize_layer(plain, form, activation_range=torch.stack(text()[:, 1:].aminmax()).reshape(1, 1, 2))
    found = made(form)(text())
    assert torch.equal(found[:, 1:], own(text()[:, 1:]))
    naive = quantize_layer(plain, form, activation_range=torch.stack(text().aminmax()).reshape(1, 1, 2))
    error, before = ((out(text()) - plain(text()))[:, 1:].square().mean() for out in (made(form), naive))
    assert error < 1e-4 * before


def test_floating_point_stays_what_it_was() -> None:
    form = LayerFormat(WeightFormat(16), ActivationFormat(16))
    assert torch.allclose(made(form)(text()), layer()(text()), rtol=1e-6, atol=1e-6)


def test_another_token_is_noticed_in_its_row_alone() -> None:
    given = text()
    given[1, 0] = torch.linspace(1, 3, 24)
    plain, found = layer(), made(LayerFormat(WeightFormat(8), STATIC))
    with pytest.warns(UserWarning, match="the same for every prompt"):
        output = found(given)
    assert torch.allclose(output[[0, 2], 0], plain(given)[[0, 2], 0], rtol=1e-5)
    expected = given[1, 0] @ found.effective_weight().t() + plain.bias
    assert torch.allclose(output[1, 0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="quantize with this text encoder"):
        made(LayerFormat(WeightFormat(8), STATIC), "raise")(given)
    with pytest.raises(ValueError, match="no tokens at the positions"):
        found(given[0, 0])


@pytest.mark.parametrize("bias", [True, False])
def test_compiled_code_gives_the_same_and_multiplies_only_where_a_token_is_another(bias: bool) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    found = made(LayerFormat(WeightFormat(8), STATIC), plain=layer(bias))
    compiled = torch.compile(found, backend=backend, fullgraph=True)
    other, none = text(), text()
    other[1, 0], none[1] = torch.linspace(1, 3, 24), 0
    for given in (text(), none):
        assert torch.equal(compiled(given), found(given))
    with pytest.warns(UserWarning, match="the same for every prompt"):
        expected = found(other)
    assert torch.equal(compiled(other), expected)
    (graph,) = graphs
    assert torch.ops.higher_order.cond in {node.target for node in graph.graph.nodes}


@pytest.mark.parametrize("bias", [True, False])
def test_no_text_is_known(bias: bool) -> None:
    """Zeros, which pipelines write for no negative prompt, are no foreign token: they give the bias, or 0."""
    given = text()
    given[1] = 0
    plain, found = layer(bias), made(LayerFormat(WeightFormat(4), STATIC), "raise", layer(bias))
    output = found(given)
    assert torch.equal(output[1], torch.zeros(7, 16) if plain.bias is None else plain.bias.expand(7, -1))
    assert torch.equal(output[[0, 2]], found(text())[[0, 2]])


def test_rounding_of_half_precision_is_no_other_token() -> None:
    found = made(LayerFormat(WeightFormat(8), STATIC)).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output = found(text().to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert torch.equal(output[0, 0], found.constant_outputs[0])


def test_rows_are_saved_and_loaded(tmp_path: Path) -> None:
    model, again = nn.Sequential(layer(False)), nn.Sequential(layer(False))
    replace_layers(model, {"0": made(LayerFormat(WeightFormat(4), STATIC), "raise", model[0])})
    save_quantized(tmp_path / "model.safetensors", model)
    load_quantized(tmp_path / "model.safetensors", again)
    assert isinstance(again[0], ConstantTokenLinear)
    assert (again[0].positions, again[0].mismatch) == ((0,), "raise")
    assert torch.equal(again(text()), model(text()))
    assert json.dumps(list(again.state_dict())) == json.dumps(list(model.state_dict()))


def test_rows_that_do_not_fit_are_refused() -> None:
    quantized = quantize_layer(layer(), LayerFormat(WeightFormat(8), ActivationFormat(16)))
    with pytest.raises(ValueError, match="one for each of the positions"):
        with_constant_rows(quantized, layer(), (0, 1), text()[0, :1])
