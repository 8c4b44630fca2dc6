"""Where the weights came from that a run began with, recorded without reading them whole."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from genlight.reports.report import WeightsRecord

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_ENDINGS = (".safetensors", ".ckpt")
_PIECES, _PIECE_BYTES = 64, 4096


def weights_record(source: str) -> WeightsRecord:
    """What tells the weights of a source from others.

    Args:
        source: a hub id, whose commit stands for its files; or a file or folder, of which samples are hashed.
    """
    place = Path(source)
    if place.exists():
        return WeightsRecord(source, sampled_sha256=sampled_sha256(place))
    return WeightsRecord(source, hub_commit=_hub_commit(source))


def sampled_sha256(place: Path) -> str | None:
    """SHA-256 over name, size and 64 evenly spaced pieces of 4 KiB of each file of weights; None where there is none.

    Files up to 256 KiB are read whole. It tells trained weights apart, and does not vouch for every byte. A run stands
    for its artifact, or for its checkpoints where it has none.
    """
    artifact = place / "artifact"
    folder = artifact if artifact.is_dir() else place
    found = [place] if place.is_file() else sorted(folder.rglob("*"))
    files = [file for file in found if file.suffix in _ENDINGS and file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}/{size}/".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(_PIECE_BYTES, size // _PIECES)):
                opened.seek(start)
                digest.update(opened.read(_PIECE_BYTES))
    return digest.hexdigest() if files else None


def _hub_commit(source: str) -> str | None:
    """The commit of a hub id that lies where downloads are kept; None for what does not."""
    from huggingface_hub import try_to_load_from_cache

    if not HUB_ID.fullmatch(source):
        return None
    found = (try_to_load_from_cache(source, name) for name in ("model_index.json", "config.json"))
    return next((Path(file).parent.name for file in found if isinstance(file, str)), None)
