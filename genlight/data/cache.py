"""Decoded images on disk, so that a second start does not decode again; and a progress bar for the first."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from genlight.errors import UserError

log = logging.getLogger(__name__)
Item = TypeVar("Item")

BAR_AFTER_SECONDS = 2.0


def default_cache_folder() -> Path:
    """GENLIGHT_CACHE, or the cache folder that the system gives to a user's programs."""
    if folder := os.environ.get("GENLIGHT_CACHE"):
        return Path(folder)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("genlight"))


def fingerprint_of(facts: Any) -> str:
    """SHA-256 of plain values, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cached_tensors(folder: Path, name: str, facts: Any, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `build` makes from what `facts` describe, read from `folder` when they were made before.

    A damaged file is made anew. A folder that cannot be written costs a warning and the time of decoding again.
    """
    from genlight.io import load_tensors, save_tensors

    key = fingerprint_of(facts)
    path = folder / "images" / f"{name}-{key[:24]}.safetensors"
    if path.exists():
        try:
            tensors, metadata = load_tensors(path)
            if metadata.get("key") == key:
                return tensors
        except (UserError, OSError) as error:
            log.warning("decoding again: %s", error)
    tensors = build()
    try:
        save_tensors(path, tensors, {"key": key})
    except (UserError, OSError) as error:
        log.warning("decoded images are not kept, cache folder %s: %s", folder, error)
    return tensors


def with_progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, with a progress bar on standard error once they have taken more than two seconds."""
    start = time.monotonic()
    iterator = iter(items)
    done = 0
    for item in iterator:
        yield item
        done += 1
        if time.monotonic() - start > BAR_AFTER_SECONDS:
            break
    else:
        return
    from rich.console import Console
    from rich.file_proxy import FileProxy
    from rich.progress import track

    if isinstance(sys.stderr, FileProxy):  # below a bar that is there already
        yield from iterator
        return
    console = Console(stderr=True)
    yield from track(iterator, what, total=total, completed=done, console=console, transient=True)
