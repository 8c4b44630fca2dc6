"""The files of a DeepSpeed checkpoint without pickle.

DeepSpeed writes every shard by ``torch.save`` and reads it by ``torch.load(weights_only=False)``, which runs whatever
code a file holds, and a changed byte goes unnoticed. The engine below replaces both: each shard is one safetensors
file with its structure and checksum in the header (`genlight.io.save_state`). DeepSpeed chooses the names of the
shards, so they still end in ``.pt``.

What DeepSpeed puts into a shard is nested containers, tensors and plain values, and a few small objects of its own;
`encode` and `decode` give these a plain form. Nothing else is accepted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genlight.io import load_state, save_state

if TYPE_CHECKING:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

SHARD_KIND = "deepspeed-shard"
# marks an encoded object among the keys of a dict; no state that DeepSpeed or torch writes has such a key
_TAG = "__deepspeed__"


def encode(value: Any) -> Any:
    """Returns `value` as nested dicts, lists, tuples, scalars and tensors.

    Raises:
        TypeError: for a kind of object that has no plain form here.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, int) and isinstance(value, enum.Enum):
        return int(value)
    if value is None or isinstance(value, (bool, int, float, str, torch.Size)):
        return value
    if type(value) in (list, tuple):
        return type(value)(encode(item) for item in value)
    if isinstance(value, Mapping):
        if _TAG in value:
            raise TypeError(f"a state to save holds the reserved key {_TAG!r}")
        return {key: encode(item) for key, item in value.items()}
    return _encode_object(value)


def decode(value: Any) -> Any:
    """The inverse of `encode`, up to the kind of container: every mapping comes back as a dict.

    Raises:
        ValueError: if a tagged object is of an unknown kind.
    """
    if type(value) in (list, tuple):
        return type(value)(decode(item) for item in value)
    if isinstance(value, dict):
        if _TAG in value:
            return _decode_object(value)
        return {key: decode(item) for key, item in value.items()}
    return value


def _refused(value: Any) -> TypeError:
    return TypeError(
        f"cannot save {value!r:.80} of type {type(value).__module__}.{type(value).__qualname__} in a DeepSpeed shard: "
        "only tensors, plain containers, plain values, loss scalers and fragment addresses are written"
    )


def _encode_object(value: Any) -> dict[str, Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    if type(value) is fragment_address:
        return {_TAG: "fragment_address", "numel": int(value.numel), "start": int(value.start)}
    if type(value) in (LossScaler, DynamicLossScaler):
        return {_TAG: type(value).__name__, **{name: encode(item) for name, item in vars(value).items()}}
    if isinstance(value, torch.dtype):
        return {_TAG: "dtype", "name": str(value).removeprefix("torch.")}
    raise _refused(value)


def _decode_object(value: dict[str, Any]) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    fields = {name: item for name, item in value.items() if name != _TAG}
    kind = value[_TAG]
    if kind == "fragment_address":
        return fragment_address(**fields)
    if kind == "LossScaler":
        scaler = LossScaler()
    elif kind == "DynamicLossScaler":
        # every field is overwritten below
        scaler = DynamicLossScaler(1.0, scale_window=1000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
    elif kind == "dtype":
        return _dtype(fields["name"])
    else:
        raise ValueError(f"a DeepSpeed shard holds an object of unknown kind {kind!r}")
    for name, item in fields.items():
        if name not in vars(scaler):
            raise ValueError(f"a DeepSpeed shard holds a {kind} with an unknown field {name!r}")
        setattr(scaler, name, decode(item))
    return scaler


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a DeepSpeed shard holds an unknown dtype {name!r}")
    return dtype


def safe_checkpoint_engine() -> CheckpointEngine:
    """An engine to set as ``DeepSpeedEngine.checkpoint_engine`` after ``deepspeed.initialize``.

    Its `save` never raises: a process that left DeepSpeed's ``save_checkpoint`` early would leave the others waiting at
    the next barrier. The first error is kept in ``.error`` and raised by the strategy once all processes are through.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class SafeCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.name = "SafeCheckpointEngine"
            self.error: Exception | None = None

        def create(self, info: Any) -> None:
            self.error = None

        def save(self, state_dict: Mapping[str, Any], path: str) -> None:
            try:
                # the configuration of the run is not state: the strategy sets it up anew
                state = {key: value for key, value in state_dict.items() if key != "ds_config"}
                save_state(path, encode(state), kind=SHARD_KIND)
            except Exception as error:
                self.error = self.error or error

        def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
            shard: dict[str, Any] = decode(load_state(path, kind=SHARD_KIND))
            return shard

        def commit(self, info: Any) -> bool:
            return self.error is None

        def preserves_storage_sharing(self) -> bool:
            # every tensor is written by itself, never the larger storage that it is a view of
            return False

    return SafeCheckpointEngine()
