"""Evaluation with several batches on their way at once: the numbers are those of one after the other, to the digit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, IterableDataset

from petals_lightning.data import DialogueDataModule, TextClassificationDataModule
from petals_lightning.errors import ConfigurationError, NoServersError
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
    remote_blocks,
)
from petals_lightning.models.token_logits import token_logits
from petals_lightning.modules import CausalLMModule, SequenceClassificationModule, TuningModule
from petals_lightning.strategies import PrivateSwarm, RemoteBlockStrategy
from tests.helpers.lightning import make_module, make_trainer
from tools.testing.swarms import PREFIX, InProcessSwarm

pytestmark = pytest.mark.slow

Start = Callable[..., InProcessSwarm]


@pytest.fixture
def data(text_model: Path, texts: Path) -> TextClassificationDataModule:
    return TextClassificationDataModule(str(text_model), str(texts), batch_size=3)  # 16 texts: 5 batches of 3, one of 1


def trainer_of(folder: Path, swarm: InProcessSwarm, size: int, **options: Any) -> pl.Trainer:
    return make_trainer(
        folder, strategy=RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers, batches_in_flight=size, **options))
    )


class Requests:
    """How many forwards a server has open when it begins one; the first waits until there are `wanted`."""

    def __init__(self, swarm: InProcessSwarm, wanted: int):
        (server,) = swarm.servers
        backend, honest, self.open, self.count = server._backend, server.span.forward, 0, 0
        assert backend is not None
        came = threading.Event()

        def forward(*inputs: Any) -> Any:
            while backend.under_way < wanted and not came.wait(0.01):
                pass
            came.set()
            self.open, self.count = max(self.open, backend.under_way), self.count + 1
            return honest(*inputs)

        span: Any = server.span
        span.forward = forward


@pytest.mark.parametrize("size", [1, 3])
def test_so_many_are_on_their_way_at_once(size: int, text_model, data, tmp_path, start_swarm: Start) -> None:
    swarm = start_swarm(text_model, [(0, 4)])
    requests = Requests(swarm, wanted=size)
    trainer_of(tmp_path, swarm, size).validate(make_module(text_model), datamodule=data, verbose=False)
    assert requests.open == size
    assert requests.count == 6


def test_all_numbers_are_those_of_one_at_a_time(text_model, data, tmp_path, start_swarm: Start) -> None:
    swarm = start_swarm(text_model, [(0, 1), (1, 4)])
    found = []
    for size in (1, 4, 20):
        torch.manual_seed(0)
        module, trainer = make_module(text_model, lr=0.05), trainer_of(tmp_path, swarm, size)
        torch.manual_seed(0)
        trainer.fit(module, datamodule=data)
        after_fit = dict(trainer.callback_metrics)
        validated = trainer.validate(module, datamodule=data, verbose=False)
        tested = trainer.test(module, datamodule=data, verbose=False)
        predicted = trainer.predict(module, dataloaders=data.val_dataloader())
        report = (tmp_path / "test_report.txt").read_text()
        found.append([after_fit, validated, tested, report, predicted])
    assert len(found[0][-1]) == 6
    assert [len(batch["labels"]) for batch in found[0][-1]] == [3, 3, 3, 3, 3, 1]
    assert len({tuple(batch["probabilities"].flatten().tolist()) for batch in found[0][-1]}) == 6, "the test is blind"
    for others in found[1:]:
        assert others[:-1] == found[0][:-1]
        for batch, expected in zip(others[-1], found[0][-1], strict=True):
            assert all(torch.equal(batch[name], expected[name]) for name in ("probabilities", "labels"))


def test_a_language_models_perplexity_too(text_model, tmp_path, start_swarm: Start) -> None:
    swarm, perplexities = start_swarm(text_model, [(0, 2), (2, 4)]), []
    data = DialogueDataModule(str(text_model), batch_size=4, limit=30)
    for size in (1, 4):
        torch.manual_seed(0)
        module = CausalLMModule(str(text_model), pre_seq_len=3, dht_prefix=PREFIX)
        perplexities += trainer_of(tmp_path, swarm, size).validate(module, datamodule=data, verbose=False)
    assert perplexities[0] == perplexities[1]
    assert perplexities[0]["val/perplexity"] > 1


def test_no_batch_is_begun_that_will_not_be_taken(text_model, data, tmp_path, start_swarm: Start) -> None:
    swarm = start_swarm(text_model, [(0, 4)])
    requests = Requests(swarm, wanted=1)
    trainer = trainer_of(tmp_path, swarm, 4)
    trainer.limit_val_batches = 2
    trainer.validate(make_module(text_model), datamodule=data, verbose=False)
    assert requests.count == 2
    trainer = trainer_of(tmp_path, swarm, 4)
    trainer.num_sanity_val_steps, trainer.limit_train_batches, trainer.fit_loop.max_epochs = 1, 1, 1
    trainer.fit(make_module(text_model), datamodule=data)
    assert requests.count == 2 + 1 + 1 + 6  # sanity check, a training step, validation


def test_a_failure_surfaces_and_nothing_stays_behind(text_model, data, tmp_path, start_swarm: Start) -> None:
    swarm = start_swarm(text_model, [(0, 4)])
    (server,) = swarm.servers
    honest, count = server.span.forward, 0

    def forward(*inputs: Any) -> Any:
        nonlocal count
        count += 1
        if count >= 3:
            raise RuntimeError("broken on purpose")
        return honest(*inputs)

    span: Any = server.span
    span.forward = forward
    trainer = trainer_of(tmp_path, swarm, 4)
    with pytest.raises(Exception, match="the server failed on this request"):
        trainer.validate(make_module(text_model), datamodule=data, verbose=False)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("evaluation")]


def test_lost_servers_end_the_evaluation(text_model, data, tmp_path, start_swarm: Start) -> None:
    swarm = start_swarm(text_model, [(0, 4)])
    trainer: Any = trainer_of(tmp_path, swarm, 4, recovery_timeout=1.0)

    class Leave(pl.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            swarm.servers[0].stop(timeout=0)

    trainer.callbacks.append(Leave())
    with pytest.raises(NoServersError):
        trainer.validate(make_module(text_model), datamodule=data, verbose=False)


def test_batches_that_the_user_changes_are_run_as_changed(text_model, data, tmp_path, start_swarm: Start) -> None:
    class Shortened(SequenceClassificationModule):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {"input_ids": batch["input_ids"][:, :1], "attention_mask": None, "labels": batch["labels"]}

    swarm, losses = start_swarm(text_model, [(0, 4)]), []
    data.setup()
    for kind, size in ((Shortened, 1), (Shortened, 4), (SequenceClassificationModule, 4)):
        torch.manual_seed(0)
        module = kind(str(text_model), pre_seq_len=3, dht_prefix=PREFIX)
        losses += trainer_of(tmp_path, swarm, size).validate(module, data.val_dataloader(), verbose=False)
    assert losses[0] == losses[1] != losses[2]


def test_a_loader_stays_what_callbacks_know(text_model, data, tmp_path, start_swarm: Start) -> None:
    trainer: Any = trainer_of(tmp_path, start_swarm(text_model, [(0, 4)]), 4)
    trainer.validate(make_module(text_model), datamodule=data, verbose=False)
    assert len(trainer.val_dataloaders.dataset) == 16
    assert len(trainer.val_dataloaders) == 6


def test_locally_batches_are_run_one_after_the_other(text_model, data, tmp_path) -> None:
    threads = set()

    class Noting(SequenceClassificationModule):
        def evaluate(self, batch: dict[str, Any], *, predicting: bool = False) -> Any:
            threads.add(threading.current_thread())
            return super().evaluate(batch, predicting=predicting)

    make_trainer(tmp_path).validate(Noting(str(text_model)), datamodule=data, verbose=False)
    assert threads == {threading.main_thread()}
    assert issubclass(Noting, TuningModule)


def test_none_in_flight_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="batches_in_flight=0"):
        PrivateSwarm(["/ip4/127.0.0.1/tcp/1"], batches_in_flight=0)


def test_threads_may_run_one_model_at_once(text_model, start_swarm: Start) -> None:
    """Each with rows and prompts of its own pass."""
    swarm = start_swarm(text_model, [(0, 1), (1, 4)])
    options: dict[str, Any] = {"tuning_mode": "deep_ptune", "pre_seq_len": 2}
    classifier = swarm.load(AutoDistributedModelForSequenceClassification, num_labels=2, pad_token_id=0, **options)
    speaker = swarm.load(AutoDistributedModelForCausalLM, **options)
    for model in (classifier, speaker):
        with torch.no_grad():
            prompts_of(model).deep.normal_(0, 0.3)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(1, 20, (1 + n % 3, 2 + n), generator=generator) for n in range(16)]

    @torch.no_grad()
    def classify(input_ids: torch.Tensor) -> torch.Tensor:
        return classifier(input_ids).logits

    @torch.no_grad()
    def speak(input_ids: torch.Tensor) -> torch.Tensor:
        return token_logits(speaker, input_ids, torch.arange(0, input_ids.numel(), 2))

    for run in (classify, speak):
        expected = [run(input_ids) for input_ids in batches]
        with ThreadPoolExecutor(8) as pool:
            for got, wanted in zip(pool.map(run, batches * 3), expected * 3, strict=True):
                assert got.shape == wanted.shape
                assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert remote_blocks(classifier).stats.retries == 0


class Rows(IterableDataset):
    """The samples of a split, without a length."""

    def __init__(self, samples: Any):
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[row] for row in range(len(self.samples)))


@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback")  # Lightning's own
@pytest.mark.parametrize("length", ["known", "unknown"])
def test_averaged_weights_are_what_is_validated(length: str, text_model, data, tmp_path, start_swarm: Start) -> None:
    swarm = start_swarm(text_model, [(0, 2), (2, 4)])
    data.setup()
    validation = data.val_dataloader()
    if length == "unknown":
        validation = DataLoader(Rows(data._splits["validation"]), batch_size=3, collate_fn=data._collate)
    found = []
    for strategy in ("auto", RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers))):
        trainer, module = (
            make_trainer(tmp_path, EMAWeightAveraging(decay=0.5), strategy=strategy),
            make_module(text_model, lr=0.1),
        )
        trainer.fit(module, data.train_dataloader(), validation)
        found.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name})
    assert found[1] == pytest.approx(found[0], abs=1e-4)
