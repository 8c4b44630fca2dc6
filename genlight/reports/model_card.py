"""README.md of an artifact: a Hugging Face model card with the result, the command and how to load it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genlight.io import atomic_write_text, read_json
from genlight.reports.report import Report, to_markdown

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


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# arguments of the call of a pipeline that makes videos
_FRAMES = {"num_frames", "video_length"}
# what a licence's name says of its terms, and what that means for this folder
_TERMS = {
    "nd": "does not allow changed copies to be passed on: do not publish this folder",
    "nc": "does not allow commercial use",
    "other": "has terms of its own: read them before you publish this folder",
}


def write_model_card(
    folder: str | Path,
    report: Report,
    *,
    dataset: str,
    method: str = "none",
    base_model: str | Sequence[str] | None = None,
    license: str | None = None,
    how_to_load: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Writes README.md with metadata that the Hugging Face hub reads, metrics as evaluation results among it.

    Args:
        folder: the artifact.
        report: its measurement; methods name what it was before beside what it is.
        dataset: the data it was trained and measured on.
        method: how it was made cheaper, "training" for a model trained from nothing, "none" for one only measured.
        base_model: hub ids or paths of the models it came from.
        license: SPDX name; None: that which the cards of all base models state, see `stated_license`.
        how_to_load: text for the section "Load". None takes over the example of a README that lies in the folder (an
            export knows its own arguments), or writes a general one.
        tags: more hub tags.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    bases = [base_model] if isinstance(base_model, str) else list(base_model or ())
    stated = {base: {"license": license} if license else stated_license(base) for base in bases}
    every = list(stated.values())
    # one licence for all of them, or none in the metadata: the text then says which has which
    shared = every[0] if every and all(each == every[0] for each in every) else {}
    if not bases and license:
        shared = {"license": license}
    on_hub = [base for base in bases if _HUB_ID.fullmatch(base) and not Path(base).exists()]
    data = ModelCardData(
        model_name=report.experiment,
        base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
        library_name=_library(folder),
        tags=["genlight", method, *tags],
        eval_results=_evaluation(report, dataset, _task(folder)) or None,
        license=shared.get("license"),
        license_name=shared.get("license_name"),
        license_link=shared.get("license_link"),
    )
    facts = [
        f"- Base model: {', '.join(bases) or 'none, trained from random weights'}",
        f"- Method: {method}",
        f"- Data: {dataset}",
        *(_license_facts(stated) if bases else [f"- Licence: {license or 'not stated'}"]),
    ]
    load = how_to_load or _load_example(folder)
    # the report brings its own title and the command
    body = to_markdown(report).split("\n", 1)[1].strip()
    text = f"---\n{data.to_yaml()}\n---\n\n# {report.experiment}\n\n" + "\n".join(facts)
    text += f"\n\n## Load\n\n{load}\n\n## Command\n\n{body}\n"
    atomic_write_text(folder / "README.md", str(ModelCard(text)))


def stated_license(base: str) -> dict[str, str]:
    """What the card of a model says of its licence: `license`, `license_name`, `license_link` of its metadata.

    Args:
        base: a run, an artifact or any folder with a README.md; or a hub id, whose card is looked for where downloads
            are kept, and nowhere else.

    Returns:
        the keys that are there; none where there is no card, or one that says nothing.
    """
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if Path(base).exists():
        places = [Path(base) / "README.md", Path(base) / "artifact" / "README.md"]
    elif _HUB_ID.fullmatch(base):
        places = [Path(str(try_to_load_from_cache(base, "README.md")))]
    else:
        places = []
    for place in places:
        if not place.is_file():
            continue
        try:
            metadata = ModelCard.load(place, ignore_metadata_errors=True).data.to_dict()
        except Exception:  # foreign text: YAML and huggingface_hub each raise their own
            continue
        keys = ("license", "license_name", "license_link")
        found = {key: str(metadata[key]) for key in keys if isinstance(metadata.get(key), str)}
        if found.get("license"):
            return found
    return {}


def _license_facts(stated: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each base model: its licence goes on to what is made of it, and what its terms forbid."""
    lines = []
    for base, found in stated.items():
        name = found.get("license")
        of = f" of {base}" if len(stated) > 1 else ""
        if name is None:
            lines.append(f"- Licence{of}: not stated by the base model; ask for it before you publish this folder")
            continue
        terms = [text for part, text in _TERMS.items() if part in name.lower().split("-")]
        shown = " ".join(filter(None, [found.get("license_name", name), found.get("license_link", "")]))
        lines.append(f"- Licence{of}: {'; it '.join([f'{shown} (inherited from the base model)', *terms])}")
    return lines


def _library(folder: Path) -> str:
    """Which library reads the folder."""
    if (folder / "model_index.json").is_file():
        return "diffusers"
    return "transformers" if _is_language_model(folder) else "genlight"


def _task(folder: Path) -> str:
    """What the folder does, as the hub calls it; it has no name for images of classes, which get one in its manner."""
    if _is_language_model(folder):
        return "text-generation"
    if (folder / "predictor.json").is_file():
        return "tabular-regression"
    index = folder / "model_index.json"
    takes = _call_of(read_json(index).get("_class_name")) if index.is_file() else {}
    if "prompt" in takes:
        return "text-to-image" if _FRAMES.isdisjoint(takes) else "text-to-video"
    labels = takes.get("class_labels")
    told = _told(folder)
    if told.get("text_dim") is not None:
        return "text-to-image"
    is_of_classes = told.get("num_classes") is not None or (labels is not None and labels.default is labels.empty)
    return f"{'class-conditional' if is_of_classes else 'unconditional'}-image-generation"


def _call_of(name: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a pipeline of diffusers; none of one that a folder brings along."""
    if not isinstance(name, str):
        return {}
    import diffusers

    kind = getattr(diffusers, name, None)
    return inspect.signature(kind.__call__).parameters if isinstance(kind, type) else {}


def _told(folder: Path) -> Mapping[str, Any]:
    """What the files of an own folder say of its network: of a pipeline, of a student, of a network of tokens."""
    pipeline, student, tokens = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("genlight.json", "config.json", "autoregressive.json")
    )
    network = student.get("student", {}).get("transformer") or tokens.get("network", {}).get("config")
    return network or pipeline


def _is_language_model(folder: Path) -> bool:
    places = [folder / "config.json", *folder.glob("*/config.json")]
    if (folder / "model_index.json").is_file():
        return False
    return any("architectures" in (read_json(place) or {}) for place in places if place.is_file())


def _evaluation(report: Report, dataset: str, task: str) -> list[Any]:
    """The metrics as the hub's evaluation results, by their names: that of other features than Inception's says so."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " "),
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name.rsplit("/", 1)[-1],
            metric_name=name.removeprefix("val/"),
            metric_value=value,
        )
        for name, value in report.metrics.items()
        if not name.endswith("_std")
    ]


def _load_example(folder: Path) -> str:
    readme = folder / "README.md"
    before, fence, example = (
        readme.read_text(encoding="utf-8").partition("```python") if readme.is_file() else ("",) * 3
    )
    if fence and not before.startswith("---"):
        return (fence + example).strip()
    if (folder / "model_index.json").is_file():
        return _LOAD_SEARCHED if (folder / "scheduler" / "solver_schedule.py").is_file() else _LOAD_PIPELINE
    tensors = sorted(path.name for path in folder.glob("*.safetensors"))
    return _LOAD_TENSORS.replace("{name}", tensors[0]) if tensors else "See the files of this folder."
