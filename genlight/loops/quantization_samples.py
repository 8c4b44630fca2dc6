"""Samples of full precision and of the quantized network as files, for programs that judge pictures and videos."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from genlight import io
from genlight.errors import UserError
from genlight.loops.evaluation import in_turn, noise_of
from genlight.loops.quantization_work import QuantizationWork
from genlight.quantization.trajectory import Reference

SAMPLES = "samples"  # folder in that of the run, and in the account of time
_FULL, _QUANTIZED = "full_precision", "quantized"
_LONGEST = 200  # characters of a file's name, for some systems allow 255 bytes
_FRAMES_A_SECOND = 8


def check_samples(work: QuantizationWork) -> None:
    """UserError where the samples are videos, and what writes those is not installed."""
    if work.reference("search", 1).images.ndim == 5 and find_spec("imageio_ffmpeg") is None:
        raise UserError("method.samples_out=true writes videos with imageio: pip install imageio imageio-ffmpeg")


def write_samples(work: QuantizationWork, layers: Mapping[str, nn.Module]) -> None:
    """The report draw of both networks, below `samples/` of the run's folder; several processes write by turns.

    A file is called `<prompt>-<i>.png`, or `.mp4` of a video, where i counts the samples of a prompt, which is how
    VBench finds them. `prompts.json` beside them has the prompt of each.

    Args:
        work: of the run, with nothing quantized.
        layers: of the quantized network.
    """
    data = work.datamodule
    noise, conditions = noise_of(data, "report", data.num_samples)
    label, size = conditions.get("label"), int(data.eval_batch_size)
    prompts = _prompts(work.module, label, len(noise))
    names = sample_names(prompts)
    for place, made in ((_FULL, {}), (_QUANTIZED, layers)):
        folder, pieces = work.folder / SAMPLES / place, []
        for start in range(0, len(noise), size):
            rows = slice(start, start + size)
            batch = Reference(noise[rows], None if label is None else label[rows], [], torch.empty(0))
            pieces.append(partial(_write_batch, work, batch, folder, names[rows], prompts[rows]))
        with work.replaced(made):
            parts = in_turn(work.evaluations, pieces)
        if work.evaluations.trainer.is_global_zero:
            written = {name: prompt for part in parts for name, prompt in part.items()}
            io.atomic_write_json(folder / "prompts.json", written)


def samples_each(work: QuantizationWork) -> int:
    """How many samples of both networks a process writes at most."""
    count, size = int(work.datamodule.num_samples), int(work.datamodule.eval_batch_size)
    return 2 * min(count, size * work.evaluations.rounds(-(-count // size)))


def sample_names(prompts: Sequence[str]) -> list[str]:
    """A name for each sample, without what a file's name cannot hold."""
    seen, names = Counter[str](), []
    for prompt in prompts:
        name = re.sub(r"[/\\\0\n\r]", " ", prompt).strip()[:_LONGEST]
        names.append(f"{name}-{seen[name]}")
        seen[name] += 1
    return names


def _prompts(module: Any, label: Tensor | None, count: int) -> list[str]:
    if hasattr(module, "prompts_of") and label is not None:
        return list(module.prompts_of(label))
    return ["sample"] * count if label is None else [f"class {number}" for number in label.tolist()]


def _write_batch(
    work: QuantizationWork, batch: Reference, folder: Path, names: Sequence[str], prompts: Sequence[str]
) -> dict[str, str]:
    """Write what the network, as it is, makes of the noise of a batch; returns prompts by the names of the files."""
    samples = zip(names, prompts, work.images(batch), strict=True)
    return {_write(folder, name, sample): prompt for name, prompt, sample in samples}


def _write(folder: Path, name: str, sample: Tensor) -> str:
    """Write an image [C, H, W], or a video [F, C, H, W], in [-1, 1]; returns the name of the file."""
    frames = (sample if sample.ndim == 4 else sample[None]).clamp(-1, 1)
    frames = frames.expand(-1, 3, -1, -1) if frames.shape[1] == 1 else frames
    levels = ((frames.permute(0, 2, 3, 1).float() + 1) * 127.5).round().byte().numpy()
    pictures = [Image.fromarray(frame) for frame in levels]
    if sample.ndim == 4:
        from diffusers.utils.export_utils import export_to_video

        with tempfile.TemporaryDirectory() as place:
            made = Path(place) / "video.mp4"
            export_to_video(pictures, str(made), fps=_FRAMES_A_SECOND, quality=10, macro_block_size=1)
            io.atomic_write_bytes(folder / f"{name}.mp4", made.read_bytes())
        return f"{name}.mp4"
    data = BytesIO()
    pictures[0].save(data, format="PNG")
    io.atomic_write_bytes(folder / f"{name}.png", data.getvalue())
    return f"{name}.png"
