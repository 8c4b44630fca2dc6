"""What each key of the config means: its comment in `conf/`, or the docstring of the argument that it becomes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from genlight import signatures
from genlight.config_check import GROUPS, nearest
from genlight.config_errors import CONF, options_of
from genlight.errors import UserError
from genlight.help import first_comment

# arguments of classes that are not genlight's, in the words of this project
TERMS = {
    "accumulate_grad_batches": "batches whose gradients are added up for one optimizer step",
    "attention_head_dim": "channels of one attention head",
    "beta_end": "noise of the last step",
    "beta_schedule": "how the noise grows: linear, scaled_linear or squaredcos_cap_v2",
    "benchmark": "let cuDNN try its algorithms first; null: as Lightning decides",
    "beta_start": "noise of the first step",
    "betas": "decay rates of the two moments of Adam",
    "block_out_channels": "channels at each resolution",
    "check_val_every_n_epoch": "epochs between two validations of a fit; null: counted in batches",
    "detect_anomaly": "look for NaN in every backward pass; slow",
    "decay": "share of the average that stays at a step",
    "deterministic": "true: deterministic kernels only; warn: where there are some; null: as torch decides",
    "devices": "processes on this machine, one for each device",
    "dropout": "share of activations that training leaves out",
    "enable_model_summary": "print the layers before the training",
    "gradient_clip_algorithm": "norm: all gradients together; value: each one",
    "gradient_clip_val": "largest norm, or value, of the gradients; null: not clipped",
    "in_channels": "channels of the input",
    "layers_per_block": "residual blocks at each resolution",
    "limit_train_batches": "batches of an epoch: a number, or a fraction; null: all",
    "log_every_n_steps": "optimizer steps between two rows of the log",
    "latent_channels": "channels of the latent images",
    "lr": "learning rate",
    "max_epochs": "length of the training in epochs; -1: by max_steps",
    "max_steps": "length of the training, in optimizer steps",
    "mid_block_add_attention": "self-attention at the lowest resolution",
    "norm_num_groups": "groups of the group normalisation",
    "num_attention_heads": "heads of the attention",
    "num_layers": "layers of the network",
    "num_nodes": "machines of the training",
    "num_sanity_val_steps": "batches of validation before the training",
    "optimizer": "optimizer of torch and its options",
    "out_channels": "channels of the output",
    "project": "project of Weights & Biases",
    "down_block_types": "kinds of blocks on the way down, one for each resolution",
    "up_block_types": "kinds of blocks on the way up, one for each resolution",
    "save_dir": "folder of the log",
    "scaling_factor": "by which latents are multiplied, so that their deviation is about 1",
    "stage": "what is split over the processes: 1 optimizer state, 2 gradients too, 3 parameters too",
    "timestep_spacing": "how the scheduler places its times: linspace, leading or trailing",
    "weight_decay": "decay of the weights per step, times the learning rate",
}


@dataclass(frozen=True)
class Option:
    """One key of an option of a config group: its path below the group, default as YAML, accepted type, meaning."""

    file: str
    path: str
    default: str
    kind: str
    text: str


@cache
def options(file: str) -> tuple[Option, ...]:
    """The keys of `conf/<file>` in their order, those of nested sections after them.

    Args:
        file: such as "search/s3.yaml".
    """
    import yaml

    text = (CONF / file).read_text()
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    found = _options(file, text.splitlines(), root, "")
    # a file that begins with another one of its group need not repeat what that says
    earlier = {o.path: o for name in _defaults(root) for o in options(f"{file.partition('/')[0]}/{name}.yaml")}
    return tuple(
        replace(o, text=o.text or earlier[o.path].text, kind=o.kind or earlier[o.path].kind) if o.path in earlier else o
        for o in found
    )


def _defaults(root: Any) -> list[str]:
    """Names of options of the same group in the defaults list of a file of a group."""
    found: list[Any] = next((value.value for key, value in root.value if key.value == "defaults"), [])
    return [str(node.value) for node in found if isinstance(node.value, str) and node.value != "_self_"]


def _options(file: str, lines: list[str], node: Any, prefix: str) -> Iterator[Option]:
    import yaml

    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    target = next((value.value for key, value in pairs if key.value == "_target_"), None)
    signature = signatures.static_signature(target) if target else None
    above = ""
    for key, value in pairs:
        name = str(key.value)
        if name.startswith("_") or (not prefix and name in ("defaults", "hydra")):
            continue
        comment = _comment(lines, key.start_mark.line)
        # a comment over several lines without a space serves them all
        above = comment or (above if _follows(lines, key.start_mark.line) else "")
        parameter = signature.parameters.get(name) if signature else None
        is_section = isinstance(value, yaml.MappingNode) and bool(value.value)
        default = "" if is_section else " ".join("".join(_source(lines, value)).split())
        kind = "" if parameter is None else signatures.describe(signatures.expanded(parameter))
        meaning = comment or _documented(target, name) or TERMS.get(name, "") or _summary(value) or above
        yield Option(file, prefix + name, default, kind, meaning)
        yield from _options(file, lines, value, f"{prefix}{name}.")


def _source(lines: list[str], node: Any) -> Iterator[str]:
    """The lines of a value, without comments: the last of them are above the next key."""
    first, last = node.start_mark, node.end_mark
    for number in range(first.line, last.line + 1):
        line = lines[number] if number < len(lines) else ""
        if line.strip().startswith("#"):
            continue
        yield line[first.column if number == first.line else 0 : last.column if number == last.line else None] + " "


def _comment(lines: list[str], line: int) -> str:
    """The comment directly above a line; the first one of a file describes the file, not its first key."""
    found: list[str] = []
    while line > 0 and lines[line - 1].strip().startswith("#"):
        line -= 1
        found.insert(0, lines[line].strip().lstrip("# ").strip())
    return "" if line == 0 else " ".join(found)


def _follows(lines: list[str], line: int) -> bool:
    before = lines[line - 1].strip() if line else ""
    return bool(before) and not before.endswith(":")


def _summary(node: Any) -> str:
    """The first sentence of the class that a section builds."""
    pairs = node.value if isinstance(getattr(node, "value", None), list) else []
    pairs = [pair for pair in pairs if isinstance(pair, tuple)]
    target = next((value.value for key, value in pairs if key.value == "_target_"), "")
    docstrings = _docstrings(target) if target.startswith("genlight.") else ()
    return docstrings[0].split("\n\n")[0].replace("\n", " ") if docstrings else target


def _documented(target: str | None, name: str) -> str:
    """What the docstring of a class of genlight says about an argument, or an empty text."""
    for text in _docstrings(target or ""):
        found = re.search(rf"^ +(?:\w+, )*{re.escape(name)}(?:, \w+)*: (.+(?:\n {{8,}}.+)*)", text, re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    return ""


@cache
def _docstrings(target: str) -> tuple[str, ...]:
    """Docstrings of a class of genlight and of those that it is derived from, with their constructors; or of a
    function."""
    found = []
    for node in signatures.definitions(target) if target.startswith("genlight.") else ():
        parts = [node, *(item for item in getattr(node, "body", []) if getattr(item, "name", "") == "__init__")]
        found += [ast.get_docstring(part) or "" for part in parts]
    return tuple(text for text in found if text)


def files() -> list[str]:
    """The main config, then every option of every group; experiments only choose among these."""
    return ["config.yaml", *(f"{group}/{option}.yaml" for group in GROUPS for option in options_of(group))]


def explained(word: str) -> str:
    """What `--help <word>` prints: a group (search), an option of it (search/s3), or a key (search.budget).

    Raises:
        UserError: there is no such thing.
    """
    group, _, rest = word.partition(".")
    if rest or word not in (*GROUPS, *(file.removesuffix(".yaml") for file in files())):
        found = [o for file in files() if file.startswith((f"{group}/", "config.yaml")) for o in options(file)]
        named = [o for o in found if (o.path if o.file == "config.yaml" else f"{group}.{o.path}") == word]
        if not named:
            known = [o.path if o.file == "config.yaml" else f"{group}.{o.path}" for o in found]
            raise UserError(f"there is no key '{word}'{nearest(word, [*known, *GROUPS])}")
        lines = dict.fromkeys(f"{word}: {o.text} ({o.kind})" if o.kind else f"{word}: {o.text}" for o in named)
        places = [f"  {o.file:<32} {o.default}" for o in named]
        return "\n".join([*lines, "default in", *places, ""])
    chosen = [f"{word}/{option}.yaml" for option in options_of(word)] if word in GROUPS else [f"{word}.yaml"]
    return "\n".join(line for file in chosen for line in _page(file, markdown=False)) + "\n"


def reference() -> str:
    """The page of all keys, in Markdown."""
    head = [
        "# All keys",
        "",
        "Made by `python tools/record_options.py` from the comments in `conf/` and the docstrings of the classes that",
        "the configs name. `python -m genlight --help search.budget` prints one key, `--help search/s3` an option.",
        "",
    ]
    return "\n".join([*head, *(line for file in files() for line in _page(file, markdown=True))]).rstrip() + "\n"


def _begins_with(file: str) -> list[str]:
    import yaml

    return [] if file == "config.yaml" else _defaults(yaml.compose((CONF / file).read_text()))


def _page(file: str, markdown: bool) -> Iterator[str]:
    title, about = file.removesuffix(".yaml"), first_comment(Path(CONF) / file)
    title = title.replace("/", "=") if "/" in title else "Keys that belong to no group"
    yield from ([f"## {title}", "", about, ""] if markdown else [f"{title}  {about}"])
    found = options(file)
    names = [name for name in _begins_with(file) if name]
    if names:
        yield from [f"As {', '.join(names)}, with:", ""] if markdown else [f"  as {', '.join(names)}, with:"]
    if markdown and found:
        yield from ["| key | default | type | meaning |", "|---|---|---|---|"]
    for o in found:
        if markdown:
            cells = (f"`{o.path}`", f"`{o.default}`" if o.default else "", o.kind, o.text)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        else:
            yield f"  {o.path} = {o.default}  {o.text}" if o.default else f"  {o.path}  {o.text}"
    yield ""
