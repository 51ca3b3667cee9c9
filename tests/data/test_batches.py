"""Batches: right-padded, of similar length, in an order that a seed fixes and a resumed run continues."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from petals_lightning.data import TextClassificationDataModule
from petals_lightning.data.loader import LengthGroupedSampler, ResumableDataLoader


@given(st.lists(st.integers(1, 50), max_size=70), st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_every_sample_comes_once_an_epoch(lengths: list[int], batch_size: int, pool: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, batch_size, seed=0, pool_batches=pool)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(list(range(100)), 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_grouping_by_length_saves_most_padding() -> None:
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0)).tolist()

    def padded(order: list[int]) -> int:
        batches = [order[start : start + 16] for start in range(0, len(order), 16)]
        return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)

    assert padded(list(LengthGroupedSampler(lengths, 16, seed=0))) < 1.15 * sum(lengths)
    assert padded(list(range(1000))) > 1.7 * sum(lengths)


@pytest.mark.parametrize(("done", "first"), [(0, 0), (3, 3), (7, 0)], ids=["new", "mid-epoch", "after an epoch"])
def test_a_loader_continues_where_training_stopped(done: int, first: int) -> None:
    samples = [{"n": number} for number in range(50)]

    def batches(batches_done: int) -> list[list[dict[str, int]]]:
        sampler = LengthGroupedSampler([1] * 50, 8, seed=0)
        return list(
            ResumableDataLoader(
                samples,  # type: ignore[arg-type]
                batch_size=8,
                sampler=sampler,
                collate_fn=list,
                batches_done=lambda: batches_done,
            )
        )

    assert batches(done) == batches(0)[first:]


def test_iterating_draws_nothing_from_the_global_generator(text_model: Path, texts: Path) -> None:
    data = TextClassificationDataModule(str(text_model), str(texts))
    data.setup()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_batches_are_padded_on_the_right(text_model: Path, texts: Path) -> None:
    data = TextClassificationDataModule(str(text_model), str(texts), batch_size=7, max_length=6)
    data.setup()
    for batch in data.train_dataloader():
        mask = batch["attention_mask"]
        assert batch["input_ids"].shape == mask.shape
        assert mask.shape[1] == mask.sum(1).max() <= 6
        assert (mask.diff(dim=1) <= 0).all(), "ones, then zeros"
        assert (batch["input_ids"][mask == 0] == 0).all()
        assert batch["labels"].shape == mask.shape[:1]


def test_an_empty_text_still_has_a_position(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"sentence": "", "label": 0}\n{"sentence": "w1", "label": 1}\n' * 5)
    data = TextClassificationDataModule(str(text_model), str(path))
    data.setup()
    assert set(data._splits["train"].lengths) == {1}
