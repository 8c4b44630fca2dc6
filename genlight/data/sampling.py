"""Which sample goes into which batch: pure functions of (seed, epoch, step) and of (rank, world size)."""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

# First element of every spawn key, so that no two uses of one seed ever share a stream.
DRAWS = {"search": 0, "select": 1, "report": 2}
TRAIN_ORDER = 3
LABEL_ORDER = 4
POOL_ORDER = 5
PAIR_NOISE = 6
PAIR_GUIDANCE = 7


def generator(seed: int, *spawn_key: int) -> np.random.Generator:
    """The random stream of (seed, spawn_key); streams of different keys are independent (numpy's SeedSequence)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=spawn_key)))


class BatchOrder:
    """Indices of training batch `position`, counted from the start of the run, for one rank.

    Every epoch is a fresh permutation of the samples that depends on (seed, epoch) only; step `s` of rank `r` takes
    the `r`-th slice of the `s`-th global batch, and an incomplete last global batch is dropped. With `mirror`, a fair
    coin per sample adds `num_samples` to its index: index `num_samples + i` stands for the mirror image of sample `i`.

    Args:
        num_samples: samples in the training split.
        batch_size: samples in a batch of one rank.
        seed: seed of the run, >= 0.
        rank, world_size: this process among those that share each global batch.

    Raises:
        ValueError: the samples do not fill one global batch.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, mirror: bool = False
    ) -> None:
        if num_samples < batch_size * world_size:
            raise ValueError(
                f"data.batch_size={batch_size} on {world_size} device(s) needs at least {batch_size * world_size} "
                f"training images, there are {num_samples}"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.mirror = mirror
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    @property
    def batches_per_epoch(self) -> int:
        return self.num_samples // (self.batch_size * self.world_size)

    def batch(self, position: int) -> Indices:
        """Indices [batch_size] of batch `position` >= 0 of this rank; position = epoch * batches_per_epoch + step."""
        epoch, step = divmod(position, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        first = (step * self.world_size + self.rank) * self.batch_size
        return self._order[first : first + self.batch_size]

    def _permutation(self, epoch: int) -> Indices:
        rng = generator(self.seed, TRAIN_ORDER, epoch)
        order = rng.permutation(self.num_samples)
        if self.mirror:
            order = order + self.num_samples * rng.integers(0, 2, self.num_samples)
        return order


def even_batches(num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Indices]:
    """This rank's share of 0..num_samples-1 in order, cut into batches of nearly equal size.

    No sample is given twice or left out, and every rank gets the same number of batches, because sharded models
    (FSDP, ZeRO-3) hang when one rank calls the network less often. Where the remainder would leave a rank without
    its last batch, batches hold one sample more than `batch_size`.

    Raises:
        ValueError: there are fewer samples than ranks.
    """
    if num_samples < world_size:
        raise ValueError(f"{num_samples} evaluation samples cannot be shared among {world_size} devices")
    first, stop = rank * num_samples // world_size, (rank + 1) * num_samples // world_size
    largest_share = -(-num_samples // world_size)
    num_batches = min(num_samples // world_size, -(-largest_share // batch_size))
    return np.array_split(np.arange(first, stop), num_batches)
