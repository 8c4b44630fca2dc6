"""What a folder holds, told by its own JSON before a weight is read: why one method cannot read what another left."""

from __future__ import annotations

from pathlib import Path

from genlight.errors import UserError
from genlight.io import read_json

STUDENT = "distilled_decoding_student"


def schedule_files(folder: str | Path) -> list[Path]:
    """The model schedules of an artifact of OMS, from the smallest budget to the largest; [] for any other folder."""
    found = Path(folder).glob("model_schedule_*.json")
    return sorted(found, key=lambda path: float(path.stem.removeprefix("model_schedule_")))


def check_one_model(source: str | Path) -> None:
    """UserError for an artifact of OMS where one model is asked for: its primary member alone would be read."""
    if schedule_files(source):
        raise UserError(
            f"{source} holds several members and schedules of OMS, of which no other method reads all: give the folder "
            "of one member as it was before"
        )


def told_kind(folder: Path) -> str:
    """What a folder is, as the end of a message that it is not what was asked for: "; it is …", or "" if not known."""
    if (folder / "model_index.json").is_file():
        return "; it is a pipeline of diffusers, which module=diffusion_pretrained or module=pipeline reads"
    if (folder / "autoregressive.json").is_file():
        return "; it is an autoregressive network over tokens, which module=distilled_decoding takes as module.teacher"
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    if not isinstance(config, dict):
        return ""
    if config.get("kind") == STUDENT:
        return (
            "; it is a student of Distilled Decoding, which says all tokens in one pass: it has no path to integrate, "
            "no denoiser and no experts; method=dd writes it in few bits, from its fit, with method.quantized"
        )
    if config.get("model_type") == "imagegpt":
        return "; it is an ImageGPT of transformers, which module=distilled_decoding takes as module.teacher"
    if isinstance(config.get("model_type"), str):
        return f"; it is a model of transformers ({config['model_type']}), which module=causal_lm reads"
    return ""
