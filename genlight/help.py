"""The text of `--help`: commands, config groups with their options, experiments with a line each."""

from __future__ import annotations

import re
from pathlib import Path

from genlight.config_check import GROUPS
from genlight.config_errors import CONF, options_of

COMMANDS = {
    "fit": "train: gradients (a generator, a student, a predictor, a feature extractor)",
    "validate": "measure, search, calibrate: no gradients",
    "inspect": "show the layers of a model, and what a method would do with each: nothing runs or is written",
}


def first_comment(file: Path) -> str:
    """The first comment line of a YAML file that is no package directive: its description."""
    for line in file.read_text().splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            return line.lstrip("# ").strip()
    return ""


def help_text() -> str:
    """What a person sees who types `python -m genlight --help`."""
    lines = [
        "genlight: make an existing generator cheaper (fewer steps, fewer bits, fewer experts, less training)",
        "",
        "  python -m genlight fit|validate|inspect [key=value ...]",
        "",
        "commands",
        *(f"  {name:<10} {text}" for name, text in COMMANDS.items()),
        "",
        "experiments, chosen by experiment=<name>",
        *_descriptions("experiment"),
        "",
        "config groups, chosen by <group>=<option>; single values by key=value (data.batch_size=64)",
        *(f"  {group:<10} {', '.join(options_of(group))}" for group in GROUPS),
        "",
        "a model before it is compressed: inspect module.pretrained=<folder or hub id> method=viditq",
        "",
        "for every command",
        "  run.name=<name>      results go to runs/<name>/<command>; run.overwrite=true replaces them",
        "  ckpt_path=<path>     weights to measure: a run folder, a .ckpt, a diffusers folder",
        "  resume=true          continue an interrupted run; dry_run=true: a few steps and an estimate of the cost",
        "  --cfg job            print the composed config; --multirun seed=0,1,2: one run for each value",
        "  traceback=true       show where in the code an error arose",
        "  --rerun runs/a/fit   repeat a finished run in a folder of its own, and compare metrics and weights",
        "  --help search.budget what a key means; --help search/s3: all keys of an option (docs/reference/options.md)",
        "  --versions           genlight and every package that it needs, as installed",
        "  --hydra-help         flags of Hydra, which composes the config",
        "",
    ]
    return "\n".join(lines)


def versions_text() -> str:
    """What `--versions` prints: genlight and every installed package that it needs, directly or through others."""
    from importlib import metadata

    waiting, found = ["genlight"], dict[str, str]()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        needed = [text for text in metadata.requires(name) or [] if "extra ==" not in text]
        waiting += [re.split(r"[^\w.-]", text.strip())[0] for text in needed]
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


def _descriptions(group: str) -> list[str]:
    names = options_of(group)
    width = max(map(len, names), default=0)
    return [f"  {name:<{width}}  {first_comment(CONF / group / f'{name}.yaml')}" for name in names]
