"""Batches of similar length, in an order that a seed fixes and a resumed run continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class LengthGroupedSampler(Sampler[int]):
    """Orders samples so that each batch holds samples of similar length, anew in each epoch.

    The samples are shuffled, cut into pools of `pool_batches` batches, sorted within each pool, and the batches
    shuffled again. A short last batch stays last.

    Args:
        lengths: tokens of each sample.
        batch_size: samples a batch.
        seed: with the epoch, fixes the order.
        pool_batches: batches a pool. More: less padding, but less chance in which samples meet.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, pool_batches: int = 50):
        self.lengths, self.batch_size, self.seed, self.pool_batches = lengths, batch_size, seed, pool_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before an epoch's first batch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # A generator: the epoch is read when the first sample is asked for, which is after `set_epoch`.
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


class ResumableDataLoader(DataLoader):
    """A training DataLoader that Lightning can continue in the middle of an epoch.

    It asks the Trainer where to start, whose progress is in every checkpoint. A count of its own would be wrong: a
    batch that it has handed out may not have been trained on when training is interrupted. (And Lightning 2.6 would not
    give it back: `estimated_stepping_batches` sets loaders up before their states are there.)

    Lightning makes it anew with a sampler that does not shuffle where `Trainer(overfit_batches=…)` asks for that, hence
    the attribute and arguments as a DataLoader has them.

    Args:
        dataset: a map-style dataset.
        batches_done: how many batches of the current epoch have been trained on.
        options: as of `DataLoader`.
    """

    def __init__(self, dataset: Dataset, *, batches_done: Callable[[], int], **options: Any):
        # A generator of its own, so that iterating draws nothing from the global one and resumed runs stay equal.
        super().__init__(dataset, **{"generator": torch.Generator(), **options})
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: this runs when the first batch is asked for. After a finished epoch the next starts at its start.
        yield from islice(super().__iter__(), self.batches_done() % len(self), None)

    def state_dict(self) -> dict[str, Any]:
        """Empty; that it is there tells Lightning that this loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: see the class."""
