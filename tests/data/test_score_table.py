"""A table of one's own from CSV and Parquet, and what is told about tables that do not fit."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genlight.data.score_table import ScoreTableDataModule
from genlight.errors import UserError


def columns() -> dict[str, list[Any]]:
    rng = np.random.default_rng(0)
    rows = list(itertools.product(range(3), range(4), range(5)))
    kind, size, step = zip(*(rows[number] for number in rng.permutation(60)))
    score = [k + s / 10 + 0.001 * i for i, (k, s) in enumerate(zip(kind, size))]
    return {
        "kind": [("conv", "pool", "skip")[k] for k in kind],
        "size": size,
        "step": step,
        "score": [None if i % 6 == 5 else s for i, s in enumerate(score)],
        "cheap": [s + rng.normal() for s in score],
    }


def write(path: Path, table: dict[str, list[Any]]) -> str:
    import pyarrow as pa
    from pyarrow import csv
    from pyarrow.parquet import write_table

    (csv.write_csv if path.suffix == ".csv" else write_table)(pa.table(table), path)
    return str(path)


def module(path: str | None, **options: Any) -> ScoreTableDataModule:
    settings = {"token_columns": ["kind", "size", "step"], "target": "score", "low_fidelity": ["cheap"], "labels": 10}
    return ScoreTableDataModule(path, **{**settings, "higher_is_better": True, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_both_kinds_of_file_give_the_table(suffix: str, tmp_path: Path) -> None:
    given = columns()
    table = module(write(tmp_path / f"t{suffix}", given)).read_table()
    assert table.vocabulary == (3, 4, 5) and table.categories == (("conv", "pool", "skip"), (), ())
    assert table.tokens[:, 0].tolist() == [("conv", "pool", "skip").index(k) for k in given["kind"]]
    assert table.tokens[:, 1].tolist() == list(given["size"])
    unknown = torch.arange(60) % 6 == 5
    assert torch.equal(table.target.isnan(), unknown) and bool(table.in_pool[unknown].all())
    assert torch.allclose(table.target[~unknown], torch.tensor([s for s in given["score"] if s is not None]))
    assert int((~table.in_pool).sum()) == 25


def test_a_given_vocabulary_is_kept_and_must_hold_all_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", columns())
    assert module(path, vocabulary=[3, 9, 5]).prepared.pool.vocabulary == (3, 9, 5)
    with pytest.raises(UserError, match=r"token 1 of row .* vocabulary is 0 to 2"):
        module(path, vocabulary=[3, 3, 5]).prepared  # noqa: B018


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"size": [None] + [1] * 59}, {}, "size is empty in 1 rows: all candidates need as many"),
        ({"size": [-1] * 60}, {}, "size holds -1"),
        ({"size": [0.5] * 60}, {}, "size holds double values"),
        ({"kind": [" ", "", *["conv"] * 58]}, {}, "kind is empty in 2 rows"),
        ({"cheap": [1e67, *[1.0] * 59]}, {}, r"cheap holds 1e\+67.* take its logarithm"),
        ({"step": [0] * 60}, {}, "rows hold a candidate that others hold too"),
        ({"cheap": ["a"] * 60}, {}, "cheap holds string values; a score is a number"),
        ({}, {"target": "scor"}, "no column scor; did you mean 'score'"),
        ({}, {"higher_is_better": None}, "data.higher_is_better is null"),
    ]
    for number, (changes, options, message) in enumerate(cases):
        path = write(tmp_path / f"{number}.parquet", {**columns(), **changes})
        with pytest.raises(UserError, match=message):
            module(path, **options).prepared  # noqa: B018
    with pytest.raises(UserError, match="there is no such file"):
        module(str(tmp_path / "none.csv")).prepared  # noqa: B018
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"not a readable .parquet file"):
        module(str(tmp_path / "bad.parquet")).prepared  # noqa: B018
    (tmp_path / "empty.csv").write_text("kind,size,step,score,cheap\n,1,0,2,3\nb,1,1,2,3\n")
    with pytest.raises(UserError, match="kind is empty in 1 rows"):
        module(str(tmp_path / "empty.csv")).prepared  # noqa: B018
    (tmp_path / "ragged.csv").write_text("kind,size,score,cheap\na,1,2,3\nb,1,2\n")
    with pytest.raises(UserError, match=r"not a readable .csv file"):
        module(str(tmp_path / "ragged.csv")).prepared  # noqa: B018
    with pytest.raises(UserError, match=r"data.path and data.token_columns"):
        module(None).prepared  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "table.pkl"}, "pickles are not read"),
        ({"token_columns": ["cheap", "size"]}, "the column cheap stands in two places"),
        ({"vocabulary": [3]}, "data.vocabulary has 1 sizes for 3"),
        ({"pool_share": 0.0}, "data.pool_share = 0.0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**{"path": None, **options})
