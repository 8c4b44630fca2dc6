"""Pipelines that are too large for a GPU: their networks lie in the memory of the host, and run on it one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from genlight.errors import UserError


class OffloadedNetworks:
    """Mixin for LightningModules around a pipeline of diffusers, `pipe`.

    Attributes:
        offload: diffusers moves each network to the GPU when it runs (`enable_model_cpu_offload`); Lightning, which
            would move all of them at once, moves none and changes no type.
    """

    offload: bool = False
    _hooked: Any = None  # the pipeline that was told so

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        return self if self.offload else super()._apply(fn, recurse)  # type: ignore[misc]

    def on_validation_epoch_start(self) -> None:
        """Tell the pipeline on which GPU it runs, once; warn where there is none.

        Raises UserError for a pipeline whose networks cannot be moved one at a time.
        """
        pipe: Any = self.pipe  # type: ignore[attr-defined]
        if self.offload and self._hooked is not pipe:
            self._hooked, device = pipe, self.device  # type: ignore[attr-defined]
            if device.type == "cpu":
                warnings.warn("module.offload=true does nothing on a CPU, where all networks are", stacklevel=2)
            else:
                try:
                    pipe.enable_model_cpu_offload(device=device)
                except ValueError as error:
                    raise UserError(f"module.offload=true: {type(pipe).__name__}: {error}") from error
        super().on_validation_epoch_start()  # type: ignore[misc]
