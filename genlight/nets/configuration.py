"""What a network was made with, so that a saved one can be made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def constructor_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor as JSON has them: of its ``locals()``, all but the object itself and modules."""
    given = {name: value for name, value in values.items() if name not in ("self", "__class__")}
    return {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in given.items()
        if not isinstance(value, nn.Module)
    }
