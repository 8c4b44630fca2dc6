"""The ways to quantize that stand in the table, and rows of those that were measured.

Each row is kept at once, so that a resumed run goes on with the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from genlight import io
from genlight.errors import UserError
from genlight.quantization.formats import LayerFormat
from genlight.quantization.recipe import BalanceKind, with_bits
from genlight.search.archive import seal, unseal
from genlight.search.codec import canonical_key

if TYPE_CHECKING:
    from genlight.loops.quantization_calibrate import QuantizationCalibration
    from genlight.loops.quantization_work import QuantizationWork

FILE = "search/variants/history.jsonl"
_KIND, _VERSION = "variant", 1


@dataclass(frozen=True)
class Variant:
    """One way to quantize the network.

    Attributes:
        name: in the table.
        balance: of the inputs.
        rounding: of the weights.
        clip: range of the weights that is kept.
        rank: of a branch that stays in floating point.
        group_size: inputs of a weight that share a range, or half of all where a layer has less than twice as many, for
            one group would be none; None: as the settings say.
        mode: whether ranges of inputs are calibrated or measured as they come; None: as the settings say.
        by_step: calibrated ranges are those of each timestep, instead of one for all.
        bits: of weights, by layer; layers that are not named have those of the settings.
        activation_bits: of inputs, likewise.
        constant_tokens: whether outputs for tokens that never change are kept.
        split: whether two feature maps side by side get scales of their own.
    """

    name: str
    balance: BalanceKind
    rounding: Literal["nearest", "gptq"]
    clip: Literal["none", "mse", "hessian"] = "none"
    rank: int = 0
    group_size: int | None = None
    mode: Literal["dynamic", "static"] | None = None
    by_step: bool = False
    bits: Mapping[str, int] = field(default_factory=dict)
    activation_bits: Mapping[str, int] = field(default_factory=dict)
    constant_tokens: bool = False
    split: bool = False

    @classmethod
    def mixed(
        cls, method: QuantizationCalibration, name: str, bits: Mapping[str, tuple[int, int | None]] | None = None
    ) -> Variant:
        """As the settings say, with bits of the weight and the input of each layer."""
        chosen = bits or {}
        return cls(
            name,
            method.balance,
            method.rounding,
            method.clip,
            method.rank,
            bits={layer: weight for layer, (weight, _) in chosen.items()},
            activation_bits={layer: found for layer, (_, found) in chosen.items() if found is not None},
            constant_tokens=method.constant_tokens != "off",
            split=method.split_shortcuts,
            by_step=method.by_step,
        )

    def form(self, name: str, form: LayerFormat, columns: int) -> LayerFormat:
        """What a layer with so many inputs of an output becomes in this variant, of what the settings say."""
        form = with_bits(form, self.bits.get(name), self.activation_bits.get(name))
        form = replace(form, weight=replace(form.weight, rounding=self.rounding, clip=self.clip))
        if self.group_size is not None:
            size = min(self.group_size, math.ceil(columns / 2))
            form = replace(form, weight=replace(form.weight, granularity="group", group_size=size))
        if self.mode is not None:
            granularity: Literal["tensor", "token"] = "tensor" if self.mode == "static" else "token"
            form = replace(form, activation=replace(form.activation, mode=self.mode, granularity=granularity))
        return form


class VariantRows:
    """The file of a run; rows of other settings, networks or data than those of the run are passed over.

    So are rows that lack a column which is measured now, such as that of a network whose weights were not there before.

    Args:
        work: of the run, with nothing quantized.
        metrics: names of what validate logs.
        columns: what a row must have besides.

    Raises:
        UserError: a line is of an unknown version.
        CorruptFileError: a line is damaged.
    """

    def __init__(self, work: QuantizationWork, metrics: Iterable[str], columns: Iterable[str] = ()) -> None:
        data, self._columns = work.datamodule, frozenset(columns)
        self._path = work.folder / FILE
        self._rows: dict[str, dict[str, Any]] = work.evaluations.agreed(_read(self._path))
        # a variant has its bits, however they were chosen
        method = {f.name: getattr(work.method, f.name) for f in fields(work.method) if f.name != "mixed"}
        self._settings = {
            **work.fingerprint,
            "method": repr(method),
            "metrics": f"{sorted(metrics)} of {data.num_samples} samples, seed {getattr(data, 'seed', 0)}",
            "precision": str(work.evaluations.trainer.precision),
        }
        self._writes = bool(work.evaluations.trainer.is_global_zero)

    def get(self, variant: Variant) -> dict[str, Any] | None:
        """The row of a variant; None where it is still to be measured."""
        row = self._rows.get(self._key(variant))
        return row if row is not None and row.keys() >= self._columns else None

    def keep(self, variant: Variant, row: Mapping[str, Any]) -> None:
        """Add the row of a variant, if it is new, and make it durable; the first process writes."""
        if not self._writes or self.get(variant) is not None:
            return
        content = {"variant": variant.name, "fingerprint": self._key(variant), "row": dict(row), "columns": list(row)}
        io.append_line(self._path, seal({"kind": _KIND, "version": _VERSION, **content}))

    def _key(self, variant: Variant) -> str:
        return canonical_key({**self._settings, "variant": repr(variant)})


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with None in place of numbers that are not finite, as of a rival that overflows: no file holds them."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }


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
