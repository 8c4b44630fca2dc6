"""What the weights of a module mean, and a fingerprint of both; a checkpoint of another model is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genlight.errors import UserError
from genlight.modules.networks import differences, first_of


def add_weights(digest: hashlib._Hash, state: Mapping[str, Tensor]) -> None:
    """Names and bytes of tensors, by name."""
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


class DescribedWeights:
    """Mixin for LightningModules that have ``description()``, plain values that JSON has."""

    def fingerprint(self, state: Mapping[str, Tensor] | None = None) -> str:
        """SHA-256 over the description and the weights; of ``state`` where the module holds a part of them only."""
        own: Any = self
        digest = hashlib.sha256(json.dumps(own.description(), sort_keys=True).encode())
        add_weights(digest, state or own.state_dict())
        return digest.hexdigest()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["genlight_module"] = self.description()  # type: ignore[attr-defined]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """UserError naming the first differing keys if the checkpoint is of another model."""
        found = checkpoint.get("genlight_module")
        own: Any = self
        if found is not None and (different := differences(found, own.description())):
            raise UserError(f"the checkpoint is of another model than the module: {first_of(different)}")
