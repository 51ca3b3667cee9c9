"""Evaluation over a swarm: its batches are larger, its numbers those of a local run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging

from petals_lightning.data import TextClassificationDataModule
from petals_lightning.errors import NoServersError
from petals_lightning.models import (
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    prompts_of,
    remote_blocks,
)
from petals_lightning.models.reading import token_logits
from petals_lightning.strategies import PrivateSwarm, RemoteBlockStrategy
from tests.helpers.lightning import make_module, make_trainer
from tools.testing.swarms import InProcessSwarm

Start = Callable[..., InProcessSwarm]


@pytest.fixture
def data(text_model: Path, texts: Path) -> TextClassificationDataModule:
    return TextClassificationDataModule(str(text_model), str(texts), batch_size=3, eval_batch_size=3)  # 16 texts


def trainer_of(folder: Path, swarm: InProcessSwarm, **options: Any) -> pl.Trainer:
    return make_trainer(folder, strategy=RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers, **options)))


class Requests:
    """How many forwards a server has open when it begins one; the first waits until there are `wanted`."""

    def __init__(self, swarm: InProcessSwarm, wanted: int):
        (server,) = swarm.servers
        resources, honest, self.open, self.count = server.resources, server.span.forward, 0, 0
        came = threading.Event()

        def forward(*inputs: Any) -> Any:
            while resources.open_requests < wanted and not came.wait(0.01):
                pass
            came.set()
            self.open, self.count = max(self.open, resources.open_requests), self.count + 1
            return honest(*inputs)

        span: Any = server.span
        span.forward = forward


@pytest.mark.slow
def test_micro_batches_of_one_batch_are_under_way_at_once(text_model, texts, tmp_path, start_swarm: Start) -> None:
    data = TextClassificationDataModule(str(text_model), str(texts), batch_size=4)
    swarm = start_swarm(text_model, [(0, 4)])
    requests = Requests(swarm, wanted=4)

    class FarAway(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
            for connection in remote_blocks(module.model)._swarm.servers._connections.values():
                connection.round_trip = 0.05

    trainer: Any = trainer_of(tmp_path, swarm, min_microbatch_tokens=1)
    trainer.callbacks.append(FarAway())
    trainer.validate(make_module(text_model), datamodule=data, verbose=False)
    assert len(trainer.val_dataloaders) == 1, "16 texts are one evaluation batch where training takes 4 at a time"
    assert requests.open == 4
    assert requests.count == 4


@pytest.mark.slow
def test_the_size_of_evaluation_batches_changes_no_number(text_model, texts, tmp_path, start_swarm: Start) -> None:
    swarm = start_swarm(text_model, [(0, 1), (1, 4)])
    found: list[Any] = []
    for size, strategy in ((3, "auto"), (3, None), (None, None)):
        data = TextClassificationDataModule(str(text_model), str(texts), batch_size=3, eval_batch_size=size)
        torch.manual_seed(0)
        module = make_module(text_model, lr=0.05)
        trainer = make_trainer(tmp_path, strategy=strategy or RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers)))
        tested = trainer.test(module, datamodule=data, verbose=False)
        predicted: Any = trainer.predict(module, dataloaders=data.val_dataloader())
        probabilities = torch.cat([batch["probabilities"] for batch in predicted])
        assert len(predicted) == (2 if size is None else 6)
        found.append((tested[0], (tmp_path / "test_report.txt").read_text(), probabilities))
    assert len({tuple(row) for row in found[0][2].tolist()}) == 16, "the test is blind"
    for metrics, report, probabilities in found[1:]:
        assert metrics == pytest.approx(found[0][0], abs=1e-5)
        assert report == found[0][1]
        assert torch.allclose(probabilities, found[0][2], atol=1e-5)


@pytest.mark.slow
def test_lost_servers_end_the_evaluation(text_model, data, tmp_path, start_swarm: Start) -> None:
    swarm = start_swarm(text_model, [(0, 4)])
    trainer: Any = trainer_of(tmp_path, swarm, recovery_timeout=1.0)

    class Leave(pl.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            swarm.servers[0].stop(timeout=0)

    trainer.callbacks.append(Leave())
    with pytest.raises(NoServersError):
        trainer.validate(make_module(text_model), datamodule=data, verbose=False)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback")  # Lightning's own
def test_averaged_weights_are_what_is_validated(text_model, data, tmp_path, start_swarm: Start) -> None:
    swarm, found = start_swarm(text_model, [(0, 2), (2, 4)]), []
    for strategy in ("auto", RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers))):
        trainer = make_trainer(tmp_path, EMAWeightAveraging(decay=0.5), strategy=strategy)
        trainer.fit(make_module(text_model, lr=0.1), datamodule=data)
        found.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name})
    assert found[1] == pytest.approx(found[0], abs=1e-4)
