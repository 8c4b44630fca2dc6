"""The published tables: tokens mean what the README says, columns and splits are checked."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genlight.data.nasbench import BENCHMARKS, NASBenchDataModule
from genlight.data.npz import npz_names, read_npz
from genlight.errors import UserError

FIRST = {"nasbench201": ("cifar10", "test_acc_200"), "nasbench301": (None, "val_acc"),
         "transnasbench101": ("jigsaw", "val_metric"), "nasbench101": (None, "val_accuracy"),
         "nasbench_macro": (None, "mean_acc")}  # fmt: skip


def module(benchmark: str = "nasbench201", **options: Any) -> NASBenchDataModule:
    dataset, target = FIRST[benchmark]
    settings: dict[str, Any] = {"dataset": dataset, "target": target, "low_fidelity": [], "labels": 24}
    return NASBenchDataModule(benchmark, **{**settings, "pretrain_steps": 0, **options})


@pytest.fixture
def folder(real_data: str) -> str:
    if not (Path(real_data) / "nasbench" / "nasbench201.npz").is_file():
        pytest.skip("GENLIGHT_DATA has no nasbench/nasbench201.npz")
    return real_data


@pytest.mark.parametrize("benchmark", list(BENCHMARKS))
def test_every_table_is_read_and_its_tokens_fill_their_vocabulary(benchmark: str, folder: str) -> None:
    data = module(benchmark, root=folder)
    table = data.read_table()
    assert table.tokens.shape == (len(table.target), len(table.vocabulary))
    largest = table.tokens.amax(0) + 1
    assert bool((largest <= torch.tensor(table.vocabulary)).all())
    if benchmark != "nasbench101":  # some entries of the adjacency matrix are zero always
        assert largest.tolist() == list(table.vocabulary)
    known = table.target.isfinite()
    assert abs(int((table.in_pool & known).sum()) - int(known.sum()) / 2) <= 1
    assert data.prepared.held_out_targets.isfinite().all()


def test_tokens_give_parameters_and_flops_of_the_table(folder: str) -> None:
    """The published linear formula, on 100 cells."""
    table = module(low_fidelity=["params_m", "flops_m"], root=folder).read_table()
    rows = torch.randperm(len(table.tokens), generator=torch.Generator().manual_seed(0))[:100]
    params, flops = torch.tensor([0, 0, 0.028, 0.24304, 0]), torch.tensor([0, 0, 4.36224, 35.81952, 1.29024])
    assert torch.allclose(0.073306 + params[table.tokens[rows]].sum(1), table.low_fidelity[rows, 0], atol=1e-5)
    assert torch.allclose(7.943872 + flops[table.tokens[rows]].sum(1), table.low_fidelity[rows, 1], atol=1e-4)


def test_the_order_of_edges_is_that_of_the_benchmark(folder: str) -> None:
    """Cells whose output gets nothing do not learn. The last three tokens are the edges into the output."""
    table = module(root=folder).read_table()
    cut_off = (table.tokens[:, 3:] == 0).all(1)
    assert bool((table.target[cut_off] == 10.0).all()) and int(cut_off.sum()) == 125
    first = (table.tokens[:, [0, 1, 3]] == 0).all(1)  # nothing leaves the input
    assert bool((table.target[first] == 10.0).all())
    swapped = table.tokens[:, [0, 1, 3, 2, 4, 5]]
    assert not bool((table.target[(swapped[:, 3:] == 0).all(1)] == 10.0).all())


def test_the_official_split_of_unique_cells(folder: str) -> None:
    data = module(split="official", subset="unique", root=folder).prepared
    assert len(data.pool.tokens) == 4675 and len(data.held_out) == 4770
    assert float(data.held_out_targets.max()) == pytest.approx(94.11, abs=0.3)
    whole = module(split="official", root=folder).prepared
    assert len(whole.pool.tokens) == 7813 and len(whole.held_out) == 7812


def test_wrong_columns_files_and_values_are_named(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data.low_fidelity: .* no column cifar10__params; did you mean 'params_m'"):
        module(low_fidelity=["params"], root=folder).prepared  # noqa: B018
    with pytest.raises(UserError, match=r"data.target: .* no column cifar10__arch_ops"):
        module(target="arch_ops", root=folder).prepared  # noqa: B018
    monkeypatch.delenv("GENLIGHT_DATA", raising=False)
    with pytest.raises(UserError, match=r"expected <folder>/nasbench/nasbench201.npz, .*GENLIGHT_DATA"):
        module().prepared  # noqa: B018


@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [
        ("nasbench201", {"dataset": "mnist"}, "data.dataset = mnist must be cifar10 or cifar100"),
        ("nasbench301", {"dataset": "cifar10"}, "data.dataset = cifar10 must be null"),
        ("nasbench301", {"split": "official"}, "of nasbench201, not of nasbench301"),
        ("nasbench201", {"split": "half"}, "data.split = half"),
        ("nasbench201", {"pool_share": 1.0}, "data.pool_share = 1.0"),
    ],
)
def test_bad_settings_are_refused(benchmark: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(benchmark, **options)


def test_objects_in_a_file_are_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    np.savez(path, numbers=np.arange(3), objects=np.array([{"a": 1}], dtype=object))
    assert npz_names(path) == ["numbers", "objects"]
    assert read_npz(path, ["numbers"])["numbers"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"table.npz: not a readable"):
        read_npz(path)
    with pytest.raises(UserError, match="not a readable"):
        read_npz(path, ["missing"])
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="not a readable"):
        npz_names(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("numbers.npy", b"no array")
    with pytest.raises(UserError, match="not a readable"):
        read_npz(path)
