"""Rows of the variants that were measured, each kept at once, so that a resumed run goes on with the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from genlight import io
from genlight.errors import UserError
from genlight.loops.quantization_work import QuantizationWork, Variant
from genlight.search.archive import seal, unseal
from genlight.search.codec import canonical_key

FILE = "search/variants/history.jsonl"
_KIND, _VERSION = "variant", 1


class VariantRows:
    """The file of a run; rows of other settings, networks or data than those of the run are passed over.

    Args:
        work: of the run, with nothing quantized.
        metrics: names of what validate logs.

    Raises:
        UserError: a line is of an unknown version.
        CorruptFileError: a line is damaged.
    """

    def __init__(self, work: QuantizationWork, metrics: Iterable[str]) -> None:
        data = work.datamodule
        self._path = work.folder / FILE
        self._settings = {
            **work.fingerprint,
            "method": repr(work.method),
            "metrics": f"{sorted(metrics)} of {data.num_samples} samples, seed {getattr(data, 'seed', 0)}",
            "precision": str(work.evaluations.trainer.precision),
        }
        self._rows: dict[str, dict[str, Any]] = work.evaluations.agreed(_read(self._path))
        self._writes = bool(work.evaluations.trainer.is_global_zero)

    def get(self, variant: Variant) -> dict[str, Any] | None:
        """The row of a variant; None where it is still to be measured."""
        return self._rows.get(self._key(variant))

    def keep(self, variant: Variant, row: Mapping[str, Any]) -> None:
        """Add the row of a variant, if it is new, and make it durable; the first process writes."""
        if not self._writes or self._key(variant) in self._rows:
            return
        content = {"variant": variant.name, "fingerprint": self._key(variant), "row": dict(row), "columns": list(row)}
        io.append_line(self._path, seal({"kind": _KIND, "version": _VERSION, **content}))

    def _key(self, variant: Variant) -> str:
        return canonical_key({**self._settings, "variant": repr(variant)})


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by their fingerprints."""
    rows = {}
    for number, line in enumerate(io.read_lines(path) if path.exists() else [], start=1):
        where = f"line {number} of {path}"
        content = unseal(line, where)
        found = content.get("kind"), content.get("version")
        if found != (_KIND, _VERSION):
            raise UserError(f"{where} has kind and version {found}; this genlight reads {(_KIND, _VERSION)}")
        # a sealed line has its keys sorted
        row = content["row"]
        rows[content["fingerprint"]] = {name: row[name] for name in content.get("columns", row)}
    return rows
