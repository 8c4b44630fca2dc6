"""A user's own table of candidates: columns of categories, a true score, cheap scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genlight.config_check import nearest
from genlight.data.architectures import ArchitectureDataModule, ArchitectureTable, random_pool, single_precision
from genlight.errors import UserError


class ScoreTableDataModule(ArchitectureDataModule):
    """Candidates from a CSV or Parquet file, one a row, which `token_columns` describe by one category each.

    A category is a whole number from 0, or any text: texts are numbered in alphabetical order over the whole column.
    An empty target is unknown, and such a row is in the pool; so is a random share of the others.

    Args:
        path: of the file, .csv or .parquet.
        token_columns: names of the columns of categories, in the order of the sequence.
        target, low_fidelity, labels, higher_is_better, label_seed: as in `ArchitectureDataModule`.
        vocabulary: number of values of each token column; None: as many as the file shows.
        pool_share: share of the rows with a target that are in the pool; the others are held out.
        pretrain_steps, batch_size, eval_batch_size, seed: as in `ArchitectureDataModule`.

    Raises:
        ValueError: a value out of range, a column in two roles, or a file of another kind.
    """

    name = "score_table"

    def __init__(
        self,
        path: str | None,
        token_columns: Sequence[str],
        target: str,
        low_fidelity: Sequence[str],
        labels: int,
        higher_is_better: bool | None = None,
        label_seed: int = 0,
        vocabulary: Sequence[int] | None = None,
        pool_share: float = 0.5,
        pretrain_steps: int = 540,
        batch_size: int = 512,
        eval_batch_size: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(
            target,
            low_fidelity,
            labels,
            higher_is_better,
            label_seed,
            pretrain_steps,
            batch_size,
            eval_batch_size,
            seed,
        )
        self.token_columns = tuple(token_columns)
        if not 0 < pool_share < 1:
            raise ValueError(f"data.pool_share = {pool_share} must lie between 0 and 1")
        if vocabulary is not None and len(vocabulary) != len(self.token_columns):
            raise ValueError(
                f"data.vocabulary has {len(vocabulary)} sizes for {len(self.token_columns)} data.token_columns"
            )
        roles = [*self.token_columns, target, *self.low_fidelity]
        if twice := sorted({name for name in roles if roles.count(name) > 1}):
            raise ValueError(f"data: the column {', '.join(twice)} stands in two places")
        if path is not None and Path(path).suffix not in (".csv", ".parquet"):
            raise ValueError(f"data.path = {path} must be a .csv or .parquet file; pickles are not read")
        self.path, self.vocabulary, self.pool_share = path, vocabulary, pool_share

    def read_table(self) -> ArchitectureTable:
        """The columns; UserError where file or column are missing, or a value is of the wrong kind."""
        if self.path is None or not self.token_columns:
            raise UserError("data.path and data.token_columns must name a .csv or .parquet file and its categories")
        columns = _read(Path(self.path))
        names = (*self.token_columns, self.target, *self.low_fidelity)
        for name in names:
            if name not in columns:
                raise UserError(f"{self.path}: no column {name}{nearest(name, list(columns))}")
        found = [_categories(columns[name], f"{self.path}: {name}") for name in self.token_columns]
        tokens = torch.from_numpy(np.stack([numbers for numbers, _ in found], axis=1))
        target, *scores = (_numbers(columns[name], f"{self.path}: {name}") for name in names[len(self.token_columns) :])
        shown = [int(column.max()) + 1 for column in tokens.T]
        return ArchitectureTable(
            tokens,
            tuple(self.vocabulary or shown),
            target,
            torch.stack(scores, dim=1) if scores else torch.empty(len(tokens), 0),
            random_pool(target.isfinite(), self.pool_share),
            tuple(texts for _, texts in found),
        )


def _read(path: Path) -> dict[str, Any]:
    """Columns of a file by name, as of pyarrow; UserError where it cannot be read or is empty."""
    from pyarrow import ArrowException, csv
    from pyarrow.parquet import read_table

    if not path.is_file():
        raise UserError(f"data.path={path}: there is no such file")
    try:
        table = csv.read_csv(path) if path.suffix == ".csv" else read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(
            f"data.path={path}: not a readable {path.suffix} file ({str(error).splitlines()[0]})"
        ) from error
    if not table.num_rows:
        raise UserError(f"data.path={path} holds no rows")
    return dict(zip(table.column_names, table.columns))


def _categories(column: Any, where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """A column as numbers from 0, and the texts that these stand for; UserError for a missing or negative one, or a
    fraction."""
    import pyarrow as pa

    kind = column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    # to pyarrow an empty text of a CSV file is not missing
    empty = sum(not (each or "").strip() for each in column.to_pylist()) if text else column.null_count
    if empty:
        raise UserError(f"{where} is empty in {empty} rows: all candidates need as many categories")
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        values: NDArray[np.int64] = column.to_numpy().astype(np.int64)
        if values.min() < 0:
            raise UserError(f"{where} holds {values.min()}; categories are numbered from 0")
        return values, ()
    if text:
        texts, numbers = np.unique(column.to_numpy().astype(str), return_inverse=True)
        return numbers.astype(np.int64), tuple(texts.tolist())
    raise UserError(f"{where} holds {kind} values; a category is a whole number or a text")


def _numbers(column: Any, where: str) -> torch.Tensor:
    """A column as float32, NaN where it is empty; UserError for texts, or a number that is too large."""
    import pyarrow as pa

    kind = column.type
    if not (
        pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):
        raise UserError(f"{where} holds {kind} values; a score is a number")
    return single_precision(column.cast(pa.float64()).to_numpy(), where)
