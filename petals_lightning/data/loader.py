"""Batches of similar length, in an order that is fixed by a seed and continued by a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class LengthGroupedSampler(Sampler[int]):
    """Orders samples so that each batch has samples of similar length; each epoch has another order.

    The samples are shuffled, split into pools of `pool_batches` batches, sorted within each pool, and the batches
    shuffled again. A short last batch stays last.

    Args:
        lengths: tokens of each sample.
        batch_size: samples per batch.
        seed: fixes the order, together with the epoch.
        pool_batches: batches per pool. A larger number means less padding, but less random batches.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, pool_batches: int = 50):
        self.lengths, self.batch_size, self.seed, self.pool_batches = lengths, batch_size, seed, pool_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; Lightning calls this before its first batch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # A generator: the epoch is read when the first sample is requested, which is after `set_epoch`.
        yield from self._order()

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch_size * self.pool_batches
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), pool):
            grouped = sorted(shuffled[start : start + pool], key=self.lengths.__getitem__, reverse=True)
            batches += [grouped[at : at + self.batch_size] for at in range(0, len(grouped), self.batch_size)]
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        mixed = [batches[at] for at in torch.randperm(len(batches), generator=generator).tolist()]
        return [index for batch in mixed + last for index in batch]


class ResumableDataLoader(DataLoader[Any]):
    """A training DataLoader that Lightning can continue in the middle of an epoch.

    It asks the Trainer where to start, whose progress is in every checkpoint. Its own count would be wrong: when
    training is interrupted, the last batch that it returned may not have been trained on. (And Lightning 2.6 would not
    restore the count: `estimated_stepping_batches` sets loaders up before their states are there.)

    With `Trainer(overfit_batches=…)`, Lightning builds it again with a sampler that does not shuffle. Hence the
    attribute and the arguments are those of a DataLoader.

    Args:
        dataset: a map-style dataset.
        batches_done: returns the number of batches of the current epoch that have been trained on.
        options: as for `DataLoader`.
    """

    def __init__(self, dataset: Dataset[Any], *, batches_done: Callable[[], int], **options: Any):
        # Its own generator, so that iterating does not advance the global one and resumed runs stay equal.
        super().__init__(dataset, **{"generator": torch.Generator(), **options})
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: this runs when the first batch is requested. After a finished epoch, the next starts at 0.
        yield from islice(super().__iter__(), self.batches_done() % len(self), None)

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing; the method's existence tells Lightning that this loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing, see the class."""
