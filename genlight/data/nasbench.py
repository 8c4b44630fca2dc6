"""Published tables of neural architecture search, as .npz files: architectures, accuracies, low-fidelity scores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from genlight.config_check import nearest
from genlight.data.architectures import ArchitectureDataModule, ArchitectureTable, random_pool, single_precision
from genlight.data.npz import npz_names, read_npz
from genlight.errors import UserError

_OFFICIAL_POOL = 7813  # of NAS-Bench-201: training indices of GATES, TA-GATES and DELE
_UNIQUE = "in_unique_9445"


@dataclass(frozen=True)
class Benchmark:
    """A table.

    Attributes:
        file: its name.
        architectures: the array of tokens, with one row for each architecture.
        vocabulary: number of values of each token.
        datasets: what the names of columns may begin with, as in ``cifar10__test_acc_200``; none: no such beginning.
    """

    file: str
    architectures: str
    vocabulary: tuple[int, ...]
    datasets: tuple[str, ...] = ()


_TASKS = ("class_scene", "class_object", "autoencoder", "normal", "jigsaw", "room_layout", "segmentsemantic")
# two cells of four nodes with two inputs each: which node, and which of seven operations
_DARTS_CELLS = tuple(size for _ in range(2) for pair in range(8) for size in (2 + pair // 2, 7))
BENCHMARKS: Mapping[str, Benchmark] = {
    "nasbench201": Benchmark("nasbench201.npz", "arch_ops", (5,) * 6, ("cifar10", "cifar100", "imagenet16_120")),
    "nasbench301": Benchmark("nasbench301.npz", "arch_cells", _DARTS_CELLS),
    "transnasbench101": Benchmark("transnasbench101_micro.npz", "arch_ops", (4,) * 6, _TASKS),
    # adjacency matrix of seven nodes, then their operations
    "nasbench101": Benchmark("nasbench101_500.npz", "arch_flat", (2,) * 49 + (5,) * 7),
    "nasbench_macro": Benchmark("nasbench_macro.npz", "arch_ops", (3,) * 8),
}


class NASBenchDataModule(ArchitectureDataModule):
    """A published table below `root`, or below `root/nasbench`.

    - nasbench201: 15,625 cells (Dong & Yang 2020), tokens are the operations on the six edges;
    - nasbench301: cells of the DARTS space (Zela et al. 2022), a part of them with an accuracy;
    - transnasbench101: 4,096 cells on seven tasks (Duan et al. 2021);
    - nasbench101: 500 cells (Ying et al. 2019);
    - nasbench_macro: 6,561 networks (Su et al. 2021).

    Args:
        benchmark: one of these names.
        dataset: data set or task of the columns; None where the table has one only.
        target, low_fidelity, labels, higher_is_better, label_seed: as in `ArchitectureDataModule`.
        split: "official", for nasbench201: indices below 7,813 are the pool, the others are held out; "random".
        pool_share: share of the architectures with a target that a random split puts into the pool, with all others.
        subset: "unique", for nasbench201: one of each class of cells that compute the same; "all".
        pretrain_steps, batch_size, eval_batch_size, seed: as in `ArchitectureDataModule`.
        root: folder of the tables; None means the environment variable GENLIGHT_DATA.

    Raises:
        ValueError: a value out of range, or a split or subset that the benchmark does not have.
    """

    def __init__(
        self,
        benchmark: str,
        dataset: str | None,
        target: str,
        low_fidelity: Sequence[str],
        labels: int,
        higher_is_better: bool | None = True,
        label_seed: int = 0,
        split: str = "random",
        pool_share: float = 0.5,
        subset: str = "all",
        pretrain_steps: int = 540,
        batch_size: int = 512,
        eval_batch_size: int = 4096,
        seed: int = 0,
        root: str | None = None,
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
        if benchmark not in BENCHMARKS:
            raise ValueError(f"data.benchmark = {benchmark} must be one of {', '.join(BENCHMARKS)}")
        known = BENCHMARKS[benchmark].datasets
        if dataset not in (known or (None,)):
            raise ValueError(f"data.dataset = {dataset} must be {' or '.join(known) or 'null'} for {benchmark}")
        if split not in ("official", "random") or subset not in ("unique", "all"):
            raise ValueError(f"data.split = {split} must be official or random, data.subset = {subset} unique or all")
        if benchmark != "nasbench201" and (split, subset) != ("random", "all"):
            raise ValueError(f"data.split = official and data.subset = unique are of nasbench201, not of {benchmark}")
        if not 0 < pool_share < 1:
            raise ValueError(f"data.pool_share = {pool_share} must lie between 0 and 1")
        self.name = benchmark
        self.benchmark, self.dataset, self.root = benchmark, dataset, root
        self.split, self.pool_share, self.subset = split, pool_share, subset

    @property
    def path(self) -> Path:
        """The file; UserError where it is missing."""
        root = self.root or os.environ.get("GENLIGHT_DATA")
        file = BENCHMARKS[self.benchmark].file
        if root:
            for path in (Path(root) / "nasbench" / file, Path(root) / file):
                if path.is_file():
                    return path
        raise UserError(
            f"{self.benchmark}: expected <folder>/nasbench/{file}, <folder> named by data.root or GENLIGHT_DATA"
            + (f"; {root} has none" if root else "")
        )

    def read_table(self) -> ArchitectureTable:
        """The columns of the data set; UserError for a missing or damaged file, or a column that it does not have."""
        benchmark, path = BENCHMARKS[self.benchmark], self.path
        prefix = f"{self.dataset}__" if self.dataset else ""
        columns = [name.removeprefix(prefix) for name in npz_names(path) if name.startswith(prefix)]
        for key, names in (("target", (self.target,)), ("low_fidelity", self.low_fidelity)):
            for name in names:
                if name not in columns:
                    raise UserError(f"data.{key}: {path.name} has no column {prefix}{name}{nearest(name, columns)}")
        wanted = [prefix + name for name in (self.target, *self.low_fidelity)]
        unique = [_UNIQUE] if self.subset == "unique" else []
        arrays = read_npz(path, [benchmark.architectures, *unique, *wanted])
        tokens = torch.from_numpy(arrays[benchmark.architectures].astype(np.int64)).flatten(1)
        if any(arrays[name].shape != (len(tokens),) or arrays[name].dtype.kind != "f" for name in wanted):
            raise UserError(f"{path.name}: the columns {', '.join(wanted)} must be one number for each architecture")
        target, *scores = (single_precision(arrays[name], f"{path.name}: {name}") for name in wanted)
        low_fidelity = torch.stack(scores, dim=1) if scores else torch.empty(len(tokens), 0)
        if self.split == "official":
            in_pool = torch.arange(len(tokens)) < _OFFICIAL_POOL
        else:
            in_pool = random_pool(target.isfinite(), self.pool_share)
        kept = torch.from_numpy(arrays[_UNIQUE]) if unique else torch.ones(len(tokens), dtype=torch.bool)
        return ArchitectureTable(tokens[kept], benchmark.vocabulary, target[kept], low_fidelity[kept], in_pool[kept])
