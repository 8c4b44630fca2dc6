"""Arrays of a NumPy .npz file, without pickle."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genlight.errors import UserError


def read_npz(path: Path, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """The named arrays of a file, or all.

    Raises:
        UserError: no such file, no .npz file, damaged, or with objects in it, which NumPy stores as pickles.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for name in npz_names(path) if names is None else names:
                with archive.open(f"{name}.npy") as file:
                    found[name] = np.lib.format.read_array(file, allow_pickle=False)
            return found
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz file of numbers ({error})") from error


def npz_names(path: Path) -> list[str]:
    """Names of the arrays of a file.

    Raises:
        UserError: as `read_npz`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz file ({error})") from error
