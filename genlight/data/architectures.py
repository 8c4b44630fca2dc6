"""Tables of architectures, or of any candidates made of categories: a pool with low-fidelity scores, few labels in it,
and candidates held out."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor

from genlight.data.cache import fingerprint_of
from genlight.data.loaders import FixedLoader, TrainLoader
from genlight.data.sampling import LABEL_ORDER, POOL_ORDER, BatchOrder, Indices, even_batches, generator
from genlight.errors import UserError, in_config
from genlight.predictors.losses import kendall_tau
from genlight.predictors.pool import Categories, Pool, check_tokens, cleaned, useful_columns

log = logging.getLogger(__name__)
_SPLIT_SEED = 201  # fixed: what is held out must not move with the seed of a run
_FEW_LABELS, _ENOUGH_TO_TELL = 10, 10


@dataclass(frozen=True)
class ArchitectureTable:
    """What a file holds of N candidates.

    Attributes:
        tokens: int64 [N, T].
        vocabulary: number of values of each token.
        target: float32 [N], the true score; NaN where unknown.
        low_fidelity: float32 [N, E].
        in_pool: bool [N]; the others are held out.
        categories: as in `Pool`.
    """

    tokens: Tensor
    vocabulary: tuple[int, ...]
    target: Tensor
    low_fidelity: Tensor
    in_pool: Tensor
    categories: Categories = ()


@dataclass(frozen=True)
class Prepared:
    """A table divided: nothing of what is held out went into the first three.

    Attributes:
        pool: with the useful low-fidelity scores.
        targets: float32 [pool], higher is better; NaN but for the labelled.
        labelled: int64 [n], their rows in the pool.
        held_out: tokens int64 [M, T].
        held_out_targets: float32 [M], higher is better.
    """

    pool: Pool
    targets: Tensor
    labelled: Tensor
    held_out: Tensor
    held_out_targets: Tensor


class ArchitectureDataModule(LightningDataModule):
    """Base of tables of candidates; a subclass says how one is read.

    Training goes in two steps. The first `pretrain_steps` batches are of the pool, the later ones of its labelled
    candidates: {"tokens": int64 [B, T], "low_fidelity": float32 [B, E], "target": float32 [B], "finetune": bool}.
    The target is NaN wherever the candidate is not labelled, in both. Targets are turned so that higher is better.
    The order is a function of seed, epoch and step; the labelled candidates are the first `labels` of one permutation
    that `label_seed` decides, so that a smaller set lies in a larger one. Validation batches are {"tokens", "target"}
    of candidates held out.

    Args:
        target: column of the true score.
        low_fidelity: columns of cheap scores; none: there is only the second step.
        labels: candidates of the pool whose true score may be used.
        higher_is_better: whether a higher target is better; None is an error when the table is read.
        label_seed: which candidates are labelled.
        pretrain_steps: batches of the first step.
        batch_size: candidates in a training batch of one device; fewer where there are not so many.
        eval_batch_size: candidates in a validation batch of one device.
        seed: of the training order.

    Raises:
        ValueError: a value out of range, a column named twice, or the target among the low-fidelity scores.
    """

    name: str = "architectures"
    class_names: tuple[str, ...] = ()
    draw: str = "report"

    def __init__(
        self,
        target: str,
        low_fidelity: Sequence[str],
        labels: int,
        higher_is_better: bool | None,
        label_seed: int = 0,
        pretrain_steps: int = 540,
        batch_size: int = 512,
        eval_batch_size: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.target, self.low_fidelity = target, tuple(low_fidelity)
        if labels < 2:
            raise ValueError(f"data.labels = {labels} must be at least 2")
        if batch_size < 2 or eval_batch_size < 1:
            raise ValueError(
                f"data.batch_size = {batch_size} must be at least 2, eval_batch_size = {eval_batch_size} 1"
            )
        if min(label_seed, pretrain_steps, seed) < 0:
            raise ValueError("data.label_seed, data.pretrain_steps and data.seed must not be negative")
        if twice := sorted({name for name in self.low_fidelity if self.low_fidelity.count(name) > 1}):
            raise ValueError(f"data.low_fidelity names {', '.join(twice)} twice")
        if target in self.low_fidelity:
            raise ValueError(f"data.low_fidelity names {target}, which is data.target")
        self.labels, self.higher_is_better, self.label_seed = labels, higher_is_better, label_seed
        self.pretrain_steps, self.seed = pretrain_steps, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size

    def read_table(self) -> ArchitectureTable:
        """The table; UserError where it cannot be read or does not fit the config."""
        raise NotImplementedError

    @cached_property
    def prepared(self) -> Prepared:
        """The table, read at the first call, checked and divided.

        Raises:
            UserError: the table does not fit the config; a candidate in two rows; too few labels; a low-fidelity score
                that is the target.
        """
        if self.higher_is_better is None:
            raise UserError(f"data.higher_is_better is null: say whether a higher {self.target} is better")
        if self.pretrain_steps and not self.low_fidelity:
            raise UserError(f"data.pretrain_steps = {self.pretrain_steps}, but data.low_fidelity is empty: set it to 0")
        table = self.read_table()
        with in_config("data"):
            check_tokens(table.tokens, table.vocabulary)
        self._check_rows(table.tokens)
        target = cleaned(table.target) if self.higher_is_better else -cleaned(table.target)
        rows = table.in_pool.nonzero().squeeze(1)
        low_fidelity = cleaned(table.low_fidelity[rows])
        with in_config("data"):
            kept = useful_columns(self.low_fidelity, low_fidelity)
        names = tuple(self.low_fidelity[number] for number in kept)
        pool = Pool(table.tokens[rows], table.vocabulary, low_fidelity[:, kept], names, table.categories)
        self._check_leakage(pool, target[rows])
        labelled = self._labelled(target[rows])
        targets = torch.full((len(rows),), torch.nan)
        targets[labelled] = target[rows][labelled]
        held_out = (~table.in_pool & ~target.isnan()).nonzero().squeeze(1)
        if not len(held_out):
            raise UserError(f"{self.name}: no candidate with a {self.target} is held out")
        return Prepared(pool, targets, labelled, table.tokens[held_out], target[held_out])

    def relabelled(self, labels: int, label_seed: int) -> ArchitectureDataModule:
        """A copy whose labelled candidates are others; its table is read again. ValueError for fewer than 2 labels."""
        if labels < 2:
            raise ValueError(f"data.labels = {labels} must be at least 2")
        other = copy.copy(self)
        other.__dict__.pop("prepared", None)
        other.labels, other.label_seed = labels, label_seed
        return other

    def _check_rows(self, tokens: Tensor) -> None:
        _, place, counts = torch.unique(tokens, dim=0, return_inverse=True, return_counts=True)
        several = (counts[place] > 1).nonzero().squeeze(1)
        if len(several):
            same = (place == place[several[0]]).nonzero().squeeze(1)[:3].tolist()
            raise UserError(
                f"{self.name}: {len(several)} rows hold a candidate that others hold too (counted from 0, {same} are "
                "one): it would be trained on and held out; average the scores of each first"
            )

    def _check_leakage(self, pool: Pool, target: Tensor) -> None:
        for name, column in zip(pool.names, pool.low_fidelity.T):
            both = ~column.isnan() & ~target.isnan()
            if int(both.sum()) >= _ENOUGH_TO_TELL and abs(kendall_tau(column[both], target[both])) > 1 - 1e-9:
                raise UserError(
                    f"data.low_fidelity: {name} orders the pool exactly as data.target = {self.target} does"
                )

    def _labelled(self, target: Tensor) -> Tensor:
        known = (~target.isnan()).nonzero().squeeze(1)
        if self.labels > len(known):
            raise UserError(f"data.labels = {self.labels} must be at most {len(known)}, the pool's known {self.target}")
        if self.labels < _FEW_LABELS:
            log.warning("data.labels = %d is very few", self.labels)
        order = torch.from_numpy(generator(self.label_seed, LABEL_ORDER).permutation(len(known)))
        labelled = known[order[: self.labels]]
        if len(torch.unique(target[labelled])) < 2:
            raise UserError(f"the {self.labels} labelled candidates all have the same {self.target}: raise data.labels")
        return labelled

    @property
    def num_samples(self) -> int:
        """Candidates held out."""
        return len(self.prepared.held_out)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hexadecimal digits) of what training sees: pool, low-fidelity scores, labels."""
        pool, digest = self.prepared.pool, hashlib.sha256()
        for tensor in (pool.tokens, pool.low_fidelity, self.prepared.labelled, self.prepared.targets):
            digest.update(tensor.contiguous().numpy().tobytes())
        return fingerprint_of([self.name, self.target, pool.names, pool.vocabulary, digest.hexdigest()])

    @property
    def facts(self) -> dict[str, Any]:
        """What predictions of a predictor that was trained on this are of: negated where a lower target is better."""
        return {"data": self.fingerprint, "target": self.target, "negated": not self.higher_is_better}

    def prepare_data(self) -> None:
        """Read the table, to fail early."""
        self.prepared  # noqa: B018

    def train_dataloader(self) -> TrainLoader:
        rank, world_size = self._place()
        data = self.prepared
        try:
            pool, labelled = (
                BatchOrder(count, min(self.batch_size, max(1, count // world_size)), self.seed, rank, world_size)
                for count in (len(data.pool.tokens), len(data.labelled))
            )
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        order = TwoSteps(pool, labelled, self.pretrain_steps, data.labelled.numpy())
        return TrainLoader(TrainingRows(data), order, 0, self.trainer)  # type: ignore[arg-type]

    def val_dataloader(self) -> FixedLoader:
        rank, world_size = self._place()
        try:
            batches = even_batches(self.num_samples, self.eval_batch_size, rank, world_size)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        return FixedLoader(HeldOutRows(self.prepared), batches)

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    @property
    def image_shape(self) -> NoReturn:
        """UserError: there are no images."""
        raise UserError(f"data={self.name} holds no images: it is made for module=predictor")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must share with this one."""
        keys = ("seed", "batch_size", "pretrain_steps")
        return {"fingerprint": self.fingerprint, "order": {key: getattr(self, key) for key in keys}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's data with this one when training goes on from it; UserError if they differ."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        if state_dict != self.state_dict():
            raise UserError(
                "the checkpoint was trained on other data or labels: resume with the same data.* keys and files"
            )


class TwoSteps:
    """Batch `position` of a run: of the pool before `switch`, of the labelled candidates from there on.

    A candidate of the second step is its row in the pool plus the size of the pool.
    """

    def __init__(self, pool: BatchOrder, labelled: BatchOrder, switch: int, rows: Indices) -> None:
        self.pool, self.labelled, self.switch, self.rows = pool, labelled, switch, rows
        self.batch_size = pool.batch_size
        self.batches_per_epoch = pool.batches_per_epoch

    def batch(self, position: int) -> Indices:
        """Indices of batch `position` >= 0, counted from the start of the run."""
        if position < self.switch:
            return self.pool.batch(position)
        return self.rows[self.labelled.batch(position - self.switch)] + self.pool.num_samples


class TrainingRows:
    """Batches of both steps, by the indices of `TwoSteps`."""

    def __init__(self, data: Prepared) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.pool.tokens)

    def __getitems__(self, indices: Indices) -> dict[str, Any]:
        finetune = bool(indices[0] >= len(self))
        rows = torch.from_numpy(np.asarray(indices) % len(self))
        pool = self.data.pool
        return {
            "tokens": pool.tokens[rows],
            "low_fidelity": pool.low_fidelity[rows],
            "target": self.data.targets[rows],
            "finetune": finetune,
        }


class HeldOutRows:
    """Batches of candidates held out."""

    def __init__(self, data: Prepared) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.held_out)

    def __getitems__(self, indices: Indices) -> dict[str, Tensor]:
        return {"tokens": self.data.held_out[indices], "target": self.data.held_out_targets[indices]}


def single_precision(values: NDArray[Any], where: str) -> Tensor:
    """Scores as float32; UserError where that does not hold a finite one."""
    with np.errstate(over="ignore"):
        found = torch.from_numpy(values.astype(np.float32))
    lost = values[np.isfinite(values) & ~found.isfinite().numpy()]
    if len(lost):
        raise UserError(f"{where} holds {lost[0]:.3g}, and single precision 3.4e38 at most: take its logarithm")
    return found


def random_pool(known: Tensor, share: float) -> Tensor:
    """Which of N candidates form the pool: a fixed random share of those with a known target [N], and all others."""
    rows = known.nonzero().squeeze(1)
    order = torch.from_numpy(generator(_SPLIT_SEED, POOL_ORDER).permutation(len(rows)))
    in_pool = torch.ones(len(known), dtype=torch.bool)
    in_pool[rows[order[round(share * len(rows)) :]]] = False
    return in_pool
