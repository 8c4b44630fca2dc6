"""Loaders that hand whole batches to Lightning: one for training that knows where a resumed run stands, one fixed."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from genlight.data.sampling import BatchOrder, Indices

Batch = dict[str, Tensor]


class BatchDataset(Protocol):
    """A data set that builds a batch at once, which for data in memory is far cheaper than collating samples."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Any) -> Batch: ...


def _same(batch: Any) -> Any:
    return batch


def _fetch(dataset: BatchDataset, batches: Iterable[Indices], num_workers: int) -> Iterator[Batch]:
    if num_workers == 0:
        return map(dataset.__getitems__, batches)
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_same,
        num_workers=num_workers,
        generator=torch.Generator(),  # else the loader takes a number from the global stream at every start
    )
    return iter(loader)


class FixedLoader:
    """The given batches of indices, in order, the same at every pass."""

    def __init__(self, dataset: BatchDataset, batches: Sequence[Indices], num_workers: int = 0) -> None:
        self.dataset = dataset
        self.batches = batches
        self.num_workers = num_workers

    @property
    def batch_size(self) -> int:
        return max(map(len, self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return _fetch(self.dataset, self.batches, self.num_workers)


class KeptLoader:
    """The batches of another loader, made once and then kept where they take no more than `limit` bytes.

    Whoever gets a batch must not change its tensors.
    """

    def __init__(self, loader: Any, limit: int = 2**28) -> None:
        self.loader, self.limit = loader, limit
        self._kept: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from self._kept
            return
        made: list[Batch] = []
        size = 0
        for batch in self.loader:
            size += sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))
            if size <= self.limit:
                made.append(batch)
            # who knows the length does not ask for more than the last
            if len(made) == len(self):
                self._kept = made
            yield batch


class TrainLoader:
    """Training batches from wherever the trainer stands, without any state of its own.

    Batch number `n` of a run, counted over all epochs, is `order.batch(n)`. The number comes from Lightning's own
    counter of completed batches, which its checkpoints hold. Lightning calls `train_dataloader()` and `iter()` with
    the counter as it was saved, and only then repairs it (a checkpoint written in `on_train_batch_end` misses its
    own batch) or starts a new epoch. So the counter is read when the first batch is asked for, not before.

    The length is that of a whole epoch, in a resumed one too: Lightning adds the batches already done to those it
    fetches, and compares the sum with the length to find the last batch.
    """

    def __init__(self, dataset: BatchDataset, order: BatchOrder, num_workers: int, trainer: Trainer | None) -> None:
        self.dataset = dataset
        self.batch_sampler = order  # the name under which Lightning's DeepSpeed strategy finds the batch size
        self.num_workers = num_workers
        self.trainer = trainer

    def __len__(self) -> int:
        return self.batch_sampler.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing here runs before the first batch is asked for.
        positions = self._positions()
        yield from _fetch(self.dataset, map(self.batch_sampler.batch, positions), self.num_workers)

    def _positions(self) -> range:
        if self.trainer is None or not self.trainer.training:
            return range(len(self))
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        done_in_epoch = progress.current.completed
        overfitting = getattr(self.trainer, "overfit_batches", 0) > 0
        # Over all epochs, so that epochs cut short (limit_train_batches) go on through the data.
        first = done_in_epoch if overfitting else progress.total.completed
        return range(first, first + min(len(self), int(self.trainer.num_training_batches)) - done_in_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save; that the method exists tells Lightning that this loader can resume in mid-epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""
