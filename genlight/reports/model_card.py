"""README.md of an artifact: a Hugging Face model card with the result, the command and how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genlight.io import atomic_write_text
from genlight.reports.report import Report, title_of, to_markdown

_LOAD_PIPELINE = """\
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
```"""
_LOAD_SEARCHED = """\
```python
from diffusers import DiffusionPipeline

# the scheduler is the file scheduler/solver_schedule.py of this folder, which imports torch, numpy and diffusers only
pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
print(pipeline.scheduler.available_steps)  # values of num_inference_steps that a schedule was searched for
```"""
_LOAD_TENSORS = """\
```python
from safetensors.torch import load_file

weights = load_file("{name}")
```"""


def write_model_card(
    folder: str | Path,
    report: Report,
    *,
    dataset: str,
    method: str = "none",
    base_model: str | None = None,
    license: str | None = None,
    how_to_load: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Writes README.md with metadata that the Hugging Face hub reads, metrics as evaluation results among it.

    Args:
        folder: the artifact.
        report: its measurement.
        dataset: the data it was trained and measured on.
        method: how it was made cheaper, "training" for a model trained from nothing, "none" for one only measured.
        base_model: hub id or path of the model it came from.
        license: SPDX name; None says that none is known. That of the base model goes on to what is made of it.
        how_to_load: text for the section "Load". None takes over the example of a README that lies in the folder (an
            export knows its own arguments), or writes a general one.
        tags: more hub tags.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    is_pipeline = (folder / "model_index.json").is_file()
    data = ModelCardData(
        model_name=report.experiment,
        base_model=base_model,
        license=license,
        library_name="diffusers" if is_pipeline else "genlight",
        tags=["genlight", method, *tags],
        eval_results=_evaluation(report, dataset) or None,
    )
    facts = [
        f"- Base model: {base_model or 'none, trained from random weights'}",
        f"- Method: {method}",
        f"- Data: {dataset}",
        f"- Licence: {license or 'not stated'}"
        + (" (inherited from the base model)" if base_model and license else ""),
    ]
    load = how_to_load or _load_example(folder, is_pipeline)
    # the report brings its own title and the command
    body = to_markdown(report).split("\n", 1)[1].strip()
    text = f"---\n{data.to_yaml()}\n---\n\n# {report.experiment}\n\n" + "\n".join(facts)
    text += f"\n\n## Load\n\n{load}\n\n## Command\n\n{body}\n"
    atomic_write_text(folder / "README.md", str(ModelCard(text)))


def _evaluation(report: Report, dataset: str) -> list[Any]:
    """The metrics as the hub's evaluation results; a name of other features than Inception's says so itself."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="image generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name.rsplit("/", 1)[-1],
            metric_name=title_of(name, report.features),
            metric_value=value,
        )
        for name, value in report.metrics.items()
        if not name.endswith("_std")
    ]


def _load_example(folder: Path, is_pipeline: bool) -> str:
    readme = folder / "README.md"
    before, fence, example = (
        readme.read_text(encoding="utf-8").partition("```python") if readme.is_file() else ("",) * 3
    )
    if fence and not before.startswith("---"):
        return (fence + example).strip()
    if is_pipeline:
        return _LOAD_SEARCHED if (folder / "scheduler" / "solver_schedule.py").is_file() else _LOAD_PIPELINE
    tensors = sorted(path.name for path in folder.glob("*.safetensors"))
    return _LOAD_TENSORS.replace("{name}", tensors[0]) if tensors else "See the files of this folder."
