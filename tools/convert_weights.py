"""Turn published pickled weights (.pth, .pt) into safetensors, once:

    python tools/convert_weights.py var_d16.pth var_d16.safetensors

Reads by ``torch.load(weights_only=True)``, which builds tensors and plain containers only. Where the file holds more
than one set of weights, ``--entry`` says which, for instance ``trainer.ema_parameters``.
"""

import argparse
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from genlight.errors import UserError
from genlight.io import save_tensors


def main(arguments: list[str] | None = None) -> None:
    """Read, choose and write; UserError as `convert`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--entry", help="where the weights are in the file, names joined by dots")
    options = parser.parse_args(arguments)
    print(f"wrote {convert(options.source, options.target, options.entry)} tensors to {options.target}")


def convert(source: Path, target: Path, entry: str | None = None) -> int:
    """Write the tensors of one set of weights; their number.

    Raises:
        UserError: the file cannot be read without running code; no weights there, or more than one set of them.
    """
    try:
        # trainers store their settings beside the weights as a Namespace, which is a plain container too
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source} cannot be read as weights alone: {reason}") from error
    found = dict(_weights(content, ""))
    if entry is None and len(found) == 1:
        (entry,) = found
    if entry not in found:
        names = ", ".join(repr(name) for name in found) or "none"
        raise UserError(f"{source} needs --entry, one of the sets of weights in it: {names}")
    save_tensors(target, found[entry])
    return len(found[entry])


def _weights(content: Any, name: str) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Dictionaries that hold tensors only, by their place; such as optimizers keep lie below numbers, not names."""
    if not isinstance(content, dict) or not content:
        return
    if all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()):
        yield name, content
        return
    for key, value in content.items():
        if isinstance(key, str):
            yield from _weights(value, f"{name}.{key}" if name else key)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
