"""Quantized networks as diffusers saves and loads them: `quant_method: viditq` in the config of the network.

The config says what each layer is, the safetensors file holds its codes, scales and signs. With genlight imported,
`from_pretrained(folder)` of diffusers, of a network or of a whole pipeline, gives the quantized network back, bit for
bit, with no further argument.
"""

# diffusers gives its classes no types
# mypy: disable-error-code="no-untyped-call,misc,assignment,attr-defined"

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from genlight.quantization.context import SamplingSteps
from genlight.quantization.convert import quantized_layers, replace_layers
from genlight.quantization.saving import LayerPlan, layer_from, plans_of
from genlight.quantization.steps import follow_steps, steps_of

METHOD = "viditq"
VERSION = 1
_PLANS: TypeAdapter[dict[str, LayerPlan]] = TypeAdapter(dict[str, LayerPlan])
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float32, torch.float16, torch.bfloat16, torch.float64,
)}  # fmt: skip


class _Method(StrEnum):
    """diffusers reads `.value` of it."""

    VIDITQ = METHOD


class ViDiTQConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a network's config.

    Args:
        layers: what each quantized layer is (`LayerPlan`), by name.
        tensors: type and shape of the entries of each layer's `state_dict`, by name.
        settings: how the network was quantized, for people to read; of these `dtype`, the type of what was not
            quantized, is the one that it is loaded in where nothing else is asked for.
        version: of this format.
        quant_method: "viditq".
        timesteps: of the steps for each of which inputs have a range of their own; none where one range serves all.

    Raises:
        ValueError: another version, or entries that are not what is said here.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        tensors: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
        timesteps: Sequence[float] = (),
        **unknown: Any,
    ) -> None:
        if version != VERSION or quant_method != METHOD or unknown:
            found = f"{quant_method!r} of version {version!r}" + (f" with {', '.join(unknown)}" if unknown else "")
            raise ValueError(f"quantization_config is {found}; this genlight reads {METHOD!r} of version {VERSION}")
        self.quant_method = _Method.VIDITQ
        self.version = version
        self.layers, self.tensors, self.settings = dict(layers), dict(tensors), dict(settings or {})
        if self.layers.keys() != self.tensors.keys():
            raise ValueError("quantization_config: layers and tensors must name the same layers")
        if self.settings.get("dtype") not in (None, *_TYPES):
            raise ValueError(f"quantization_config.settings.dtype: {self.settings['dtype']!r} is no type known here")
        if not isinstance(timesteps, list | tuple) or not all(isinstance(time, int | float) for time in timesteps):
            raise ValueError(f"quantization_config.timesteps: {timesteps!r} must be numbers")
        if timesteps:  # no entry of a config that has none
            self.timesteps = list(timesteps)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of what was not quantized; None in a config of an earlier genlight."""
        return _TYPES.get(self.settings.get("dtype", ""))

    @classmethod
    def of(cls, network: Any, settings: Mapping[str, Any]) -> ViDiTQConfig:
        """The config of a network of diffusers as it is.

        Raises:
            ValueError: it has no quantized layer, or ranges by step and no timesteps.
        """
        layers = quantized_layers(network)
        if not layers:
            raise ValueError("the network has no quantized layer: save it as what it is")
        tensors = {
            name: {
                key: [str(tensor.dtype).removeprefix("torch."), *tensor.shape]
                for key, tensor in layer.state_dict().items()
            }
            for name, layer in layers.items()
        }
        settings = {**settings, "dtype": str(network.dtype).removeprefix("torch.")}
        steps = steps_of(network)
        timesteps = () if steps is None else steps.timesteps.tolist()
        return cls(_PLANS.dump_python(plans_of(network), mode="json"), tensors, settings, timesteps=timesteps)

    def skeleton(self) -> dict[str, nn.Module]:
        """The layers without their numbers, on the device "meta".

        Raises:
            ValueError: a plan or a tensor that does not hold; the message names the layer.
        """
        try:
            plans = _PLANS.validate_python(self.layers)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"quantization_config.layers.{where}: {first['msg']}") from None
        made: dict[str, nn.Module] = {}
        for name, plan in plans.items():
            try:
                empty = {
                    key: torch.empty(*shape, dtype=_TYPES[kind], device="meta")
                    for key, (kind, *shape) in self.tensors[name].items()
                }
                made[name] = layer_from(plan, empty)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"quantization_config.tensors.{name}: {error}") from None
        return made

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: nothing has a default."""
        return copy.deepcopy(self.__dict__)


class ViDiTQQuantizer(DiffusersQuantizer):
    """Loads and saves networks with a `ViDiTQConfig`. It quantizes nothing: calibration does."""

    requires_calibration = True
    # layers keep the types that they were saved in, whatever is asked for the others
    use_keep_in_fp32_modules = True

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """What is asked for, else the type that the network had: diffusers itself would take float32."""
        if torch_dtype is None:
            return self.quantization_config.dtype
        self.quantization_config.settings["dtype"] = str(torch_dtype).removeprefix("torch.")
        return torch_dtype

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        """Whether a tensor belongs to a quantized layer."""
        return param_name.rpartition(".")[0] in self.quantization_config.layers

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        """Shapes that differ from those of the config.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{param_name} has shape {list(loaded.shape)}; its config says {list(current.shape)}")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Tensor],
        *_: Any,
        **__: Any,
    ) -> Any:
        """Put a tensor in its layer, in the type that it was saved in."""
        layer, _, key = param_name.rpartition(".")
        setattr(model.get_submodule(layer), key, state_dict[param_name].to(target_device))

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        replace_layers(model, self.quantization_config.skeleton())
        model.register_to_config(quantization_config=self.quantization_config)  # type: ignore[operator]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for name, layer in quantized_layers(model).items():
            missing = [key for key, tensor in layer.state_dict().items() if tensor.is_meta]
            if missing:
                raise ValueError(f"the weights of the network lack {name}.{missing[0]}, which its config names")
            layer.derive()
        timesteps = getattr(self.quantization_config, "timesteps", ())
        if timesteps:
            follow_steps(model, SamplingSteps(timesteps, next(model.buffers()).device))
        steps_of(model)  # which refuses ranges by step without timesteps

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors that layers share are written for each of them: the file knows no sharing."""
        seen: set[int] = set()
        found = {}
        for name, tensor in state_dict.items():
            found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
        return found, {}

    @property
    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


@contextmanager
def marked_quantized(network: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """In the block, `save_pretrained` of the network, or of a pipeline with it, writes it as quantized.

    Args:
        network: of diffusers, with quantized layers.
        settings: how it was quantized.
    """
    config = ViDiTQConfig.of(network, settings)
    before = network.config
    network.register_to_config(quantization_config=config)
    network.hf_quantizer = ViDiTQQuantizer(config, pre_quantized=True)
    try:
        yield
    finally:
        del network.hf_quantizer
        network._internal_dict = before


def register() -> None:
    """Make diffusers know the method; a second time changes nothing."""
    from diffusers.quantizers import auto

    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, ViDiTQQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, ViDiTQConfig)


# not by `genlight.diffusers_hook`: where this file is what imports diffusers, it is half made when that is done
register()
