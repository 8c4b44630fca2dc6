"""report.json and report.md: the result of a run, what it was measured in, and what it may be compared with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from genlight.errors import UserError
from genlight.io import atomic_write_json, atomic_write_text, read_json

if TYPE_CHECKING:
    from rich.table import Table

VERSION = 1
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_TITLES = {
    "fid": "FID",
    "mifid": "memorisation-informed FID",
    "fd": "Fréchet distance",
    "kid": "kernel distance",
    "is": "Inception Score",
    "mifd": "memorisation-informed Fréchet distance",
}
_FRECHET = {"fid", "mifid"}
_INTERVAL = ("low", "high")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
# shown with the total, or of no use to a reader
_PARTS_OF_OTHERS = ("low_seconds", "high_seconds", "disk_free_bytes")


@dataclass(frozen=True)
class FloorRecord:
    """The same metrics between two sets of real images."""

    __pydantic_config__ = STRICT
    metrics: dict[str, float]
    images: str
    num_images: int
    reference: str
    num_reference: int


@dataclass(frozen=True)
class FeaturesRecord:
    """The space in which the metrics were measured, and their settings."""

    __pydantic_config__ = STRICT
    name: str
    kind: Literal["inception", "classifier"]
    num_features: int
    fingerprint: str
    metrics: list[str] = field(default_factory=list)
    reference_split: str | None = None
    num_reference: int | None = None
    reference_data: str | None = None
    kid_subsets: int | None = None
    kid_subset_size: int | None = None
    is_splits: int | None = None


@dataclass(frozen=True)
class WeightsRecord:
    """Where weights came from: the commit of a hub id, or the hash of `genlight.reports.origin.sampled_sha256`."""

    __pydantic_config__ = STRICT
    source: str
    hub_commit: str | None = None
    sampled_sha256: str | None = None


@dataclass(frozen=True)
class Report:
    """One measured result.

    Attributes:
        draw: the evaluation noise; "search" is refused, because a winner chosen on it is also the luckiest.
        metrics: name to value; names "fid" and "mifid" only with Inception features.
        predicted: what the dry run said (seconds, bytes), or None.
        real: what it took, under the same keys.
        table: before and after: one row for each variant that was measured.
        files: paths below the run folder, worth looking at first.
        data: fingerprint of the data set, or None where it has none.
        weights: those that the run began with, from each source.
        deterministic: `trainer.deterministic`: true where torch was held to deterministic kernels.
        not_finite: names of metrics that came out as NaN or infinity, which are not in `metrics`.
    """

    __pydantic_config__ = STRICT
    command: str
    experiment: str
    config_hash: str
    git_revision: str | None
    git_dirty: bool | None
    versions: dict[str, str]
    machine: dict[str, JsonValue]
    seed: int
    draw: Literal["select", "report"]
    metrics: dict[str, float]
    floor: FloorRecord | None
    features: FeaturesRecord | None
    num_samples: int
    predicted: dict[str, JsonValue] | None
    real: dict[str, JsonValue]
    files: list[str]
    notes: list[str]
    table: list[dict[str, JsonValue]] = field(default_factory=list)
    data: str | None = None
    weights: list[WeightsRecord] = field(default_factory=list)
    deterministic: bool | Literal["warn"] | None = None
    not_finite: list[str] = field(default_factory=list)
    date: str = ""
    kind: Literal["report"] = "report"
    version: Literal[1] = 1


@cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def parse_report(record: Mapping[str, Any], where: str = "report") -> Report:
    """Checks a record and makes it a Report.

    Raises:
        ValueError: a key is unknown, missing or of a wrong kind; a number is not finite; the draw is "search"; a
            Fréchet number of other features is called FID.
    """
    if record.get("draw") == "search":
        raise ValueError(
            f'{where}: the "search" draw chose the candidate and cannot judge it; measure on draw "report" instead'
        )
    try:
        # the same strings in and out: what does not survive JSON has no place in a record
        report = _adapter().validate_json(json.dumps(dict(record)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {key}: {first['msg']} (got {first.get('input')!r:.80})") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} does not fit into JSON: {error}") from None
    _check_numbers(record, where)
    _check_names(report, where)
    return report


def write_report(folder: str | Path, record: Mapping[str, Any] | Report) -> Report:
    """Writes report.json and report.md into a folder.

    Raises:
        ValueError: see ``parse_report``; nothing is written then.
    """
    report = parse_report(asdict(record) if isinstance(record, Report) else record)
    folder = Path(folder)
    atomic_write_json(folder / "report.json", asdict(report))
    atomic_write_text(folder / "report.md", to_markdown(report))
    return report


def read_report(path: str | Path) -> Report:
    """Reads a report.json.

    Raises:
        UserError: it is no report of this version.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path} is not a report: it holds a {type(record).__name__}")
    if (record.get("kind"), record.get("version")) != ("report", VERSION):
        found = f"kind {record.get('kind')!r}, version {record.get('version')!r}"
        raise UserError(f"{path} has {found}; this genlight reads kind 'report', version {VERSION}")
    try:
        return parse_report(record, str(path))
    except ValueError as error:
        raise UserError(str(error)) from None


def to_markdown(report: Report) -> str:
    """The report as a page that a person reads in a minute."""
    sections = [
        f"# {report.experiment}\n\n    {report.command}",
        _result(report),
        _before_and_after(report),
        _measured_in(report),
        _cost(report),
        "## Files\n\n" + "\n".join(f"- [{name}]({name})" for name in report.files) if report.files else "",
        "## Notes\n\n" + "\n".join(f"- {note}" for note in report.notes) if report.notes else "",
        _made_by(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def title_of(metric: str, features: FeaturesRecord | None) -> str:
    """A metric's name in words; with the features in brackets unless they are Inception's."""
    plain = metric.rsplit("/", 1)[-1]
    stem, deviation = (plain[:-4], ", standard deviation") if plain.endswith("_std") else (plain, "")
    short = stem.split("_", 1)[0]
    if short not in _TITLES:
        return plain
    space = "" if features is None or features.kind == "inception" else f" ({features.name} features)"
    return f"{_TITLES[short]}{space}{deviation}"


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def seconds_of(text: str) -> float:
    """The seconds that `duration` has put in words.

    Raises:
        ValueError: other words.
    """
    parts = text.split()
    if len(parts) % 2 or not parts or any(unit not in _SECONDS for unit in parts[1::2]):
        raise ValueError(f"{text!r} is not a duration such as 3 min 20 s")
    return sum(float(number) * _SECONDS[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True))


def size(count: float) -> str:
    """Bytes in words: 3.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _result(report: Report) -> str:
    if not report.metrics and not report.not_finite:
        return "## Result\n\nNothing was measured: samples only."
    floors = report.floor.metrics if report.floor else {}
    rows = ["| metric | value | real against real | ratio |", "|---|---|---|---|"]
    for name, value in report.metrics.items():
        if name.endswith("_std"):
            continue
        deviation = report.metrics.get(f"{name}_std")
        spread = "" if deviation is None else f" ± {deviation:.3g}"
        floor = floors.get(name.rsplit("/", 1)[-1])
        # a ratio means something only for distances; an unbiased kernel distance may lie at or below zero
        is_distance = "distance" in _title_stem(name) or "FID" in _title_stem(name)
        ratio = f"{value / floor:.2f}×" if floor is not None and is_distance and floor > 0 else "–"
        title = title_of(name, report.features)
        label = f"`{name}`" if title == name else f"{title} `{name}`"
        rows.append(f"| {label} | {value:.4g}{spread} | {'–' if floor is None else f'{floor:.4g}'} | {ratio} |")
    rows += [f"| `{name}` | not a number | – | – |" for name in report.not_finite]
    return "## Result\n\n" + "\n".join(rows)


def _before_and_after(report: Report) -> str:
    return "## Before and after\n\n" + "\n".join(table_lines(report.table)) if report.table else ""


def result_table(rows: Sequence[Mapping[str, Any]], width: int | None = None) -> Table:
    """Rows for the terminal, without the ends of intervals, and of `width` characters only the first that fit."""
    from rich.table import Table

    every = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in every if key.rsplit("_", 1)[-1] not in _INTERVAL]
    if width is not None:
        widths = [max(len(text) for text in (key, *(cell(row.get(key)) for row in rows))) for key in columns]
        ends = accumulate(size + 2 for size in widths)
        columns = [key for key, end in zip(columns, ends, strict=True) if end - 2 <= width]
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if any(isinstance(row.get(column), str) for row in rows) else "right")
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    return table


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as a Markdown table; the columns are those of all rows, in the order in which they appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(escaped(column) for column in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(escaped(cell(row.get(column))) for column in columns) + " |")
    return lines


def cell(value: Any) -> str:
    """A value as a cell of a table: four digits of a number, a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def escaped(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _title_stem(name: str) -> str:
    return title_of(name, None)


def _measured_in(report: Report) -> str:
    if not report.num_samples:
        return f"Seed {report.seed}. No samples were measured here; `validate` does that."
    lines = [f"- {report.num_samples} samples, draw `{report.draw}`, seed {report.seed}."]
    if features := report.features:
        against = f", against {features.num_reference} real images" if features.num_reference else ""
        split = f" ({features.reference_split} split)" if against and features.reference_split else ""
        kind = "Inception v3" if features.kind == "inception" else f'the classifier "{features.name}"'
        lines.append(f"- Features: {kind}, {features.num_features} numbers per image{against}{split}.")
        if features.kind != "inception":
            lines.append("- Comparable only with numbers in the same features, and not with published ones.")
    if floor := report.floor:
        lines.append(
            f"- Real against real: {floor.images} ({floor.num_images} images) against {floor.reference} "
            f"({floor.num_reference} images)."
        )
    return "## Measured in\n\n" + "\n".join(lines)


def _cost(report: Report) -> str:
    predicted, rows = report.predicted or {}, []
    for key in dict.fromkeys([*predicted, *report.real]):
        expected, found = predicted.get(key), report.real.get(key)
        if key in _PARTS_OF_OTHERS or not any(_is_number(value) for value in (expected, found)):
            continue
        shown = _amount(key, expected)
        if key == "total_seconds" and _is_number(predicted.get("low_seconds")):
            shown += f" ({_amount(key, predicted['low_seconds'])} to {_amount(key, predicted.get('high_seconds'))})"
        name = key.removesuffix("_bytes").replace("total_seconds", "time").removesuffix("_seconds").replace("_", " ")
        rows.append(f"| {name} | {shown} | {_amount(key, found)} |")
    parts, real = (values.get("phase_seconds") for values in (predicted, report.real))
    if isinstance(parts, dict) and isinstance(real, dict):
        for name in dict.fromkeys([*parts, *real]):
            shown, took = (_amount("seconds", values.get(name)) for values in (parts, real))
            rows.append(f"| {escaped(name)} | {shown} | {took} |")
    if not rows:
        return ""
    return "\n".join(["## Cost", "", "| | predicted | real |", "|---|---|---|", *rows])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _amount(key: str, value: Any) -> str:
    if not _is_number(value):
        return "–"
    if key.endswith("seconds"):
        return duration(value)
    return size(value) if key.endswith("bytes") else f"{value:,.4g}"


def _made_by(report: Report) -> str:
    revision = report.git_revision[:12] if report.git_revision else "not in a repository"
    changed = " with local changes" if report.git_dirty else ""
    machine = report.machine
    gpus = machine.get("gpus")
    devices = f", {', '.join(str(gpu) for gpu in gpus)}" if isinstance(gpus, list) and gpus else ""
    data = f"data {report.data[:12]} · " if report.data else ""
    weights = [f"weights {w.source} {(w.hub_commit or w.sampled_sha256 or 'unknown')[:12]} · " for w in report.weights]
    packages = ", ".join(f"{name} {report.versions[name]}" for name in ("python", "torch") if name in report.versions)
    kernels = " · deterministic" if report.deterministic is True else ""
    return (
        f"---\n{report.date or 'undated'} · revision {revision}{changed} · config {report.config_hash[:12]} · {data}"
        f"{''.join(weights)}"
        f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores{devices} · {packages}{kernels}"
    )


def _check_numbers(value: Any, where: str) -> None:
    """JSON written by Python may hold NaN and infinity, and the free-form parts of a record are not typed."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: a report holds finite numbers only")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_numbers(inner, f"{where}: {key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_numbers(inner, where)


def _check_names(report: Report, where: str) -> None:
    names = [*report.metrics, *(report.floor.metrics if report.floor else {})]
    wrong = [name for name in names if not _FRECHET.isdisjoint(re.split("[^a-z]+", name.lower()))]
    if wrong and (report.features is None or report.features.kind != "inception"):
        space = report.features.name if report.features else "unknown"
        raise ValueError(f'{where}: {wrong} are measured in "{space}" features; only Inception features make an FID')
