"""Rows of files, and what is said of files that have none."""

import json
import sys

import pytest

from genlight.data.text_sources import read_hub_rows, read_rows_file
from genlight.errors import UserError

ROWS = [{"q": "a, b?\u2028", "n": "1"}, {"q": 'say "c"', "n": "2"}]


def test_jsonl_and_csv_give_the_same_rows(tmp_path) -> None:
    one, two = tmp_path / "x.jsonl", tmp_path / "x.csv"
    one.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", "utf-8")
    two.write_text('\ufeffq,n\n"a, b?\\u2028",1\n"say ""c""",2\n'.replace("\\u2028", ""), "utf-8")
    assert read_rows_file(one, "k") == ROWS
    assert read_rows_file(two, "k") == [{"q": "a, b?", "n": "1"}, ROWS[1]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a", r"k=\S+x\.txt must be a \.jsonl or \.csv file"),
        ("x.jsonl", b"\n \n", "holds no rows"),
        ("x.csv", b"a,b\n", "holds no rows"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', "line 2 is no JSON object"),
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "line 2"),
        ("x.jsonl", b'{"a": NaN}', "line 1"),
        ("x.jsonl", b'{"a": "\xff"}', "is no text in UTF-8"),
        ("x.csv", b"a,b\n1\n", "line 2 has another number of columns"),
        ("x.csv", b"a,b\n1,2,3\n", "line 2 has another number of columns"),
        ("x.csv", b'a,b\n"1,2\n', "is no CSV"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows_file(tmp_path / name, "k")


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"data\.tasks\.t\.path=\S+: there is no such file"):
        read_rows_file(tmp_path / "x.csv", "data.tasks.t.path")


def test_datasets_reads_a_folder_and_its_faults_are_named(tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    assert read_hub_rows(str(tmp_path / "set"), None, "train", "k") == ROWS
    with pytest.raises(UserError, match=r"k=\S+, subset None, split test cannot be read"):
        read_hub_rows(str(tmp_path / "set"), None, "test", "k")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="k=x needs the package datasets: pip install datasets"):
        read_hub_rows("x", None, "train", "k")
