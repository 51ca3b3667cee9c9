"""A Trainer over a real swarm: the same numbers as a local run, repeatedly, and nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import StrategyRegistry

from petals_lightning.callbacks import LastCheckpoint
from petals_lightning.client import ClientConfig
from petals_lightning.data import TextClassificationDataModule
from petals_lightning.errors import ConfigurationError, NoServersError, SwarmConnectionError
from petals_lightning.models import remote_blocks
from petals_lightning.strategies import PrivateSwarm, RemoteBlockStrategy, ServedModel
from tests.helpers.lightning import Losses, make_module, make_trainer
from tools.testing.swarms import InProcessSwarm


def test_it_is_registered_with_lightning() -> None:
    assert isinstance(StrategyRegistry.get("remote_blocks"), RemoteBlockStrategy)


def test_two_devices_are_refused_before_anything_starts(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path
) -> None:
    strategy = RemoteBlockStrategy(PrivateSwarm("/ip4/10.0.0.1/tcp/1/p2p/Qm"))
    trainer = pl.Trainer(
        default_root_dir=str(tmp_path), strategy=strategy, accelerator="cpu", devices=2, max_epochs=1, logger=False
    )
    with pytest.raises(ConfigurationError, match=r"^devices=2: the client runs on 1 device; set devices=1$"):
        trainer.fit(make_module(text_model), datamodule=data)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tuning_mode": "prefix"},
        {"tuning_mode": "prefix", "prompt_init": "zero"},
        {"tuning_mode": "prefix", "prompt_init": "text", "prompt_init_text": "w1 w2"},
    ],
    ids=["deep_ptune", "prefix", "prefix from zero", "prefix from a text"],
)
def test_training_equals_a_local_run(
    text_model: Path,
    data: TextClassificationDataModule,
    tmp_path: Path,
    start_swarm: Callable[..., InProcessSwarm],
    settings: dict[str, Any],
) -> None:
    swarm = start_swarm(text_model, [(0, 1), (1, 4)])
    remote, local = Losses(), Losses()
    make_trainer(tmp_path, local).fit(make_module(text_model, **settings), datamodule=data)
    strategy = RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers))
    make_trainer(tmp_path, remote, strategy=strategy).fit(make_module(text_model, **settings), datamodule=data)
    assert remote.values == pytest.approx(local.values, abs=1e-4)


@pytest.mark.slow
def test_one_trainer_fits_validates_tests_and_predicts_again_and_again(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path, start_swarm: Callable[..., InProcessSwarm]
) -> None:
    swarm = start_swarm(text_model, [(0, 2), (2, 4)])
    module = make_module(text_model)
    trainer = make_trainer(tmp_path, strategy=RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers)))
    trainer.fit(module, datamodule=data)
    fitted = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    for _ in range(2):
        (validated,) = trainer.validate(module, datamodule=data, verbose=False)
        assert validated == pytest.approx(fitted, abs=1e-5), "the trained weights outlive the connection"
    trainer.test(module, datamodule=data, verbose=False)
    predicted: Any = trainer.predict(module, datamodule=data)
    assert predicted is not None
    assert sum(len(batch["labels"]) for batch in predicted) == 16


@pytest.mark.slow
def test_a_module_goes_from_trainer_to_trainer_and_from_swarm_to_swarm(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path, start_swarm: Callable[..., InProcessSwarm]
) -> None:
    one, other = start_swarm(text_model, [(0, 4)]), start_swarm(text_model, [(0, 1), (1, 4)])

    def trainer(swarm: InProcessSwarm | None, *callbacks: Callback) -> pl.Trainer:
        strategy = RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers)) if swarm is not None else "auto"
        return make_trainer(tmp_path, *callbacks, strategy=strategy)

    module, first = make_module(text_model), trainer(one)
    first.fit(module, datamodule=data)
    fitted = {name: float(value) for name, value in first.callback_metrics.items() if name.startswith("val/")}

    async def in_a_notebook() -> list[Any]:  # its cells run in an event loop
        return trainer(one).validate(module, datamodule=data, verbose=False)

    assert asyncio.run(in_a_notebook()) == [pytest.approx(fitted, abs=1e-5)]
    for again in (trainer(other), trainer(None), first):
        assert again.validate(module, datamodule=data, verbose=False) == [pytest.approx(fitted, abs=1e-4)]
    with pytest.raises(SwarmConnectionError, match="give the module to a Trainer again"):
        module(**next(iter(data.val_dataloader())))

    (tested,) = trainer(other).test(module, datamodule=data, verbose=False)
    predicted = trainer(one).predict(module, datamodule=data)
    labels = [batch["labels"] for batch in data.test_dataloader()]
    assert predicted is not None
    hits = sum(int((batch["labels"] == right).sum()) for batch, right in zip(predicted, labels, strict=True))
    assert hits / 16 == tested["test/accuracy"]
    copied = make_module(text_model)
    trainer(None).validate(copied, datamodule=data, verbose=False)
    copied.load_state_dict(module.state_dict())
    here, there = Losses(), Losses()
    trainer(None, here).fit(copied, datamodule=data)
    trainer(other, there).fit(module, datamodule=data)
    assert there.values == pytest.approx(here.values, abs=1e-4)


@pytest.mark.slow
def test_checkpoints_of_a_swarm_load_into_a_local_run(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path, start_swarm: Callable[..., InProcessSwarm]
) -> None:
    swarm = start_swarm(text_model, [(0, 4)])
    trainer = make_trainer(tmp_path, strategy=RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers)))

    class Save(Callback):
        def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "trained.ckpt")

    trainer.callbacks.append(Save())  # type: ignore[attr-defined]
    trainer.fit(make_module(text_model), datamodule=data)
    remote = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert (tmp_path / "trained.ckpt").stat().st_size < 50_000
    (local,) = make_trainer(tmp_path).validate(
        make_module(text_model), datamodule=data, ckpt_path=tmp_path / "trained.ckpt", verbose=False
    )
    assert local == pytest.approx(remote, abs=1e-4)


def test_teardown_closes_the_connection_after_an_exception(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path, start_swarm: Callable[..., InProcessSwarm]
) -> None:
    swarm = start_swarm(text_model, [(0, 4)])

    class Fail(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ArithmeticError

    module = make_module(text_model)
    strategy = RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers))
    with pytest.raises(ArithmeticError):
        make_trainer(tmp_path, Fail(), strategy=strategy).fit(module, datamodule=data)
    blocks = remote_blocks(module)
    assert blocks is not None
    with pytest.raises(SwarmConnectionError, match="closed"):
        blocks.route()
    with pytest.raises(RuntimeError, match="between the strategy's setup_environment and teardown"):
        _ = strategy.client_arguments


def test_an_unreachable_peer_is_an_error_of_one_line(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path
) -> None:
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWHq9AJPHnpcVfVP9k64T91MhkEsBQE3ZisQeLhbzpontM"
    strategy = RemoteBlockStrategy(PrivateSwarm([nobody], connect_timeout=3.0))
    with pytest.raises(SwarmConnectionError, match=r"127\.0\.0\.1/tcp/9"):
        make_trainer(tmp_path, strategy=strategy).fit(make_module(text_model), datamodule=data)


@pytest.mark.parametrize("peers", [[], ["12.34.56.78:31337"], ["/ip4/1.2.3.4/tcp/31337"]])
def test_what_is_no_multiaddress_is_refused_at_once(peers: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="/ip4/HOST/tcp/PORT/p2p/ID"):
        PrivateSwarm(peers)


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "my model v1.5"
    folder.mkdir()
    assert ServedModel(str(folder)).dht_prefix == "my-model-v1-5"
    assert ServedModel(str(folder), dht_prefix="other").dht_prefix == "other"
    assert ServedModel("meta-llama/Meta-Llama-3-8B").dht_prefix is None


def test_a_swarm_is_up_from_the_first_user_to_the_last() -> None:
    events: list[str] = []

    class Recorded(PrivateSwarm):
        def _start(self, model: ServedModel, log_dir: Path) -> None:
            events.append("start")

        def _stop(self) -> None:
            events.append("stop")

    swarm = Recorded(["/ip4/127.0.0.1/tcp/1/p2p/x"], max_retries=2)
    model = ServedModel("some/model")
    with swarm.keep_alive(model, Path()):
        for _ in range(2):
            assert swarm.acquire(model, Path()) == {
                "initial_peers": ["/ip4/127.0.0.1/tcp/1/p2p/x"],
                "dht_prefix": None,
                "client_config": ClientConfig(max_retries=2),
            }
            swarm.release()
    assert events == ["start", "stop"]


@pytest.mark.slow
def test_when_the_last_server_is_lost_what_was_trained_is_saved(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path, start_swarm: Callable[..., InProcessSwarm]
) -> None:
    swarm, other = start_swarm(text_model, [(0, 2)]), []
    with InProcessSwarm(text_model, [(2, 4)], initial_peers=swarm.initial_peers) as rest:

        class LoseTheRest(Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
                if trainer.global_step == 3:
                    rest.servers.pop().stop(timeout=1)
                    other.append(trainer.global_step)

        path = tmp_path / "last.ckpt"
        strategy = RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers, recovery_timeout=1.0))
        trainer = make_trainer(tmp_path, LoseTheRest(), LastCheckpoint(path), strategy=strategy)
        with pytest.raises(NoServersError, match=r"no usable server holds blocks 2:4"):
            trainer.fit(make_module(text_model), datamodule=data)
    assert other == [3]
    assert torch.load(path, weights_only=False)["global_step"] == 3
