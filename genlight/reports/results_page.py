"""The page of results: what each paper claims beside what was measured here, then every bar of every proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from genlight.errors import UserError
from genlight.io import atomic_write_text, read_json
from genlight.reports.proof import Bar, Proof, read_proof
from genlight.reports.report import STRICT, cell, duration, escaped, table_lines

CLAIMS = "claims.json"
_NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and where to look for what was measured of it.

    Attributes:
        method: as the page calls it.
        claim: what the paper says, in words.
        paper: its figures.
        setting: model, data and metric behind them.
        source: paper, table, or whoever quotes it.
        proof: name of the file with the bars; the same program's on another machine is `<proof>-<machine>`.
        bars: ids of the bars that speak to the claim; none where no bar does.
        open: what those bars do not show.
        checkpoint: what it would take to show it.
        gpu: of proofs that need a GPU, by name, the bars that speak to the claim.
    """

    __pydantic_config__ = STRICT
    method: str
    claim: str
    paper: str
    setting: str
    source: str
    proof: str
    bars: list[str]
    open: str
    checkpoint: str
    gpu: dict[str, list[str]] = field(default_factory=dict)


@cache
def _adapter() -> TypeAdapter[list[Claim]]:
    return TypeAdapter(list[Claim])


def read_claims(path: str | Path) -> list[Claim]:
    """Reads docs/results/claims.json.

    Raises:
        UserError: an entry lacks a field, or has one that is unknown.
    """
    try:
        return _adapter().validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


def read_proofs(folder: str | Path) -> dict[str, Proof]:
    """All proofs of a folder, by name."""
    return {path.stem: read_proof(path) for path in sorted(Path(folder).glob("*.json")) if path.name != CLAIMS}


def results_page(folder: str | Path) -> str:
    """The page of a folder: one row for each claim, if it has any; one for each bar; then each table.

    Raises:
        UserError: a file that is no proof, or a claim whose bar its proof does not have.
    """
    folder, proofs = Path(folder), read_proofs(folder)
    lines = ["# Results", "", f"Made from the JSON files in this folder{_LINK if (folder / CLAIMS).is_file() else ''}."]
    if (folder / CLAIMS).is_file():
        lines += _claim_lines(read_claims(folder / CLAIMS), proofs)
    lines += [
        "",
        "## Bars",
        "",
        "What each proof wanted, and what it found; a bar that fails stays as it fell.",
        "",
        "| proof | bar | what | value | wanted | holds |",
        "|---|---|---|---|---|---|",
    ]
    for name, proof in proofs.items():
        lines += [_row(f"[{name}]({name}.json)", *_bar_cells(bar)) for bar in proof.bars]
    for name, proof in proofs.items():
        lines += ["", f"## {name}", "", f"    {proof.command}", "", _circumstances(proof)]
        if proof.table:
            lines += ["", *table_lines(proof.table)]
    return "\n".join(lines) + "\n"


def write_results_page(folder: str | Path) -> None:
    """Writes README.md of a folder of proofs."""
    atomic_write_text(Path(folder) / "README.md", results_page(folder))


_LINK = f" ([{CLAIMS}]({CLAIMS}) for what the papers say)"
_PREFACE = """\
## What the papers claim, and what was measured here

The papers' models and data are not those of the small proofs, so that figures of two columns are of different things: a
row says whether an effect was seen, not whether a figure was reached. "Not measured" is meant literally.
"""


def _claim_lines(claims: Sequence[Claim], proofs: Mapping[str, Proof]) -> list[str]:
    columns = ("method", "claim", "in the paper", "small proof", "on a GPU", "not yet shown", "what would show it")
    lines = ["", *_PREFACE.splitlines(), "", _row(*columns), "|" + "---|" * len(columns)]
    for claim in claims:
        paper = f"{claim.paper}: {claim.setting} ({claim.source})"
        here, there = (_joined(_measured(claim, proofs, gpu=gpu)) for gpu in (False, True))
        cells = (claim.method, claim.claim, paper, here, there, claim.open, claim.checkpoint)
        lines.append(_row(*cells))
    return lines


def _measured(claim: Claim, proofs: Mapping[str, Proof], *, gpu: bool) -> list[str]:
    """What was found with a GPU or without, proof by proof.

    A proof that the claim names has all of the bars; the same program's on another machine those that it has.
    """
    found = []
    for name, proof in proofs.items():
        again = name.startswith(f"{claim.proof}-")
        bars = claim.bars if again or name == claim.proof else claim.gpu.get(name, [])
        if bool(proof.machine.get("gpus")) != gpu:
            continue
        known = {bar.id: bar for bar in proof.bars}
        if missing := [bar for bar in bars if bar not in known and not again]:
            raise UserError(f"{CLAIMS}: {claim.method}, {claim.claim!r}: {name}.json has no bar {missing[0]!r}")
        found.append("; ".join(_shown(known[bar]) for bar in bars if bar in known))
    return found


def _shown(bar: Bar) -> str:
    return f"{bar.what}: {cell(bar.value)} (wanted {bar.bar}{'' if bar.holds else '; **missed**'})"


def _joined(parts: Sequence[str]) -> str:
    return "; ".join(part for part in parts if part) or _NOT_MEASURED


def _bar_cells(bar: Bar) -> tuple[str, ...]:
    return f"`{bar.id}`", bar.what, cell(bar.value), bar.bar, "yes" if bar.holds else "**no**"


def _row(*cells: str) -> str:
    return "| " + " | ".join(escaped(each) for each in cells) + " |"


def _circumstances(proof: Proof) -> str:
    revision = f"revision {proof.git_revision[:12]}" if proof.git_revision else "no revision"
    machine = f"{proof.machine.get('cpu')}, {proof.machine.get('cores')} cores"
    gpus = proof.machine.get("gpus")
    if isinstance(gpus, list) and gpus:
        machine += ", " + ", ".join(str(gpu) for gpu in gpus)
    seeds = f", seeds {', '.join(str(seed) for seed in proof.seeds)}" if proof.seeds else ""
    return f"{proof.date[:10]}, {revision}, {machine}, {duration(proof.wall_seconds)}{seeds}."
