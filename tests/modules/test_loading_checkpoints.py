"""`load_from_checkpoint` reads trained weights and no model; a Trainer then runs the module as it was saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from petals_lightning.data import DialogueDataModule, TextClassificationDataModule
from petals_lightning.errors import CheckpointError, NoModelError
from petals_lightning.modules import CausalLMModule, SequenceClassificationModule, TuningModule
from petals_lightning.sample import MODEL_DIR
from petals_lightning.strategies import PrivateSwarm, RemoteBlockStrategy
from tests.helpers.lightning import make_trainer
from tools.testing.swarms import PREFIX, InProcessSwarm


@pytest.fixture
def model(text_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_model, tmp_path / "model"))


@pytest.fixture
def data(model: Path, texts: Path) -> TextClassificationDataModule:
    return TextClassificationDataModule(str(model), str(texts), batch_size=8)


def trainer_in(swarm: InProcessSwarm | None, folder: Path) -> pl.Trainer:
    strategy = RemoteBlockStrategy(PrivateSwarm(swarm.initial_peers)) if swarm is not None else "auto"
    return make_trainer(folder, strategy=strategy, max_epochs=1)


@contextmanager
def nobody_has(model: Path) -> Iterator[None]:
    """Without the model's files: whoever reads it fails."""
    away = model.rename(model.with_name("away"))
    try:
        yield
    finally:
        away.rename(model)


class ForgetsNothing(pl.Callback):
    """Keeps the checkpoint that the Trainer would write at the end of the epoch."""

    def __init__(self, path: Path):
        self.path = path

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def fitted(module: TuningModule, data: pl.LightningDataModule, trainer: pl.Trainer, path: Path) -> None:
    torch.manual_seed(0)
    trainer.callbacks.append(ForgetsNothing(path))  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=data)


def probabilities(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule) -> torch.Tensor:
    torch.manual_seed(1)  # a fresh module would draw other weights than the saved one
    predicted: Any = trainer.predict(module, datamodule=data)
    return torch.cat([batch["probabilities"] for batch in predicted])


@pytest.mark.slow
def test_a_classifier_from_a_checkpoint_is_the_one_that_was_saved(
    model: Path, data: TextClassificationDataModule, tmp_path: Path, start_swarm: Callable[..., InProcessSwarm]
) -> None:
    swarm = start_swarm(model, [(0, 1), (1, 4)])
    trainer, path = trainer_in(swarm, tmp_path), tmp_path / "saved.ckpt"
    options: dict[str, Any] = {"pre_seq_len": 3, "dht_prefix": PREFIX, "lr": 0.05, "class_names": ["bad", "good"]}
    module = SequenceClassificationModule(str(model), **options)
    fitted(module, data, trainer, path)
    expected = probabilities(trainer, module, data)
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)

    with nobody_has(model):
        loaded = SequenceClassificationModule.load_from_checkpoint(path, lr=0.01)
    assert (loaded.class_names, loaded.hparams["lr"]) == (["bad", "good"], 0.01)
    assert loaded.state_dict().keys() == module.state_dict().keys()
    for where in (swarm, None, swarm):  # in a swarm, whole in this process, and back
        trainer = trainer_in(where, tmp_path)
        assert torch.allclose(probabilities(trainer, loaded, data), expected, atol=1e-5)
        assert trainer.validate(loaded, datamodule=data, verbose=False) == [pytest.approx(validated, abs=1e-5)]
    fresh = probabilities(trainer_in(None, tmp_path), SequenceClassificationModule(str(model), **options), data)
    assert not torch.allclose(fresh, expected, atol=1e-2), "the weights matter"
    trainer = trainer_in(None, tmp_path)
    trainer.fit(loaded, datamodule=data)
    assert trainer.callback_metrics["val/loss"] < validated["val/loss"]


@pytest.mark.slow
def test_a_language_model_from_a_checkpoint_goes_on_training(
    tmp_path: Path, start_swarm: Callable[..., InProcessSwarm]
) -> None:
    swarm = start_swarm(MODEL_DIR, [(0, 4)])
    model = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    data = DialogueDataModule(str(model), limit=8, batch_size=4)
    path = tmp_path / "saved.ckpt"
    module = CausalLMModule(str(model), tuning_mode="ptune", pre_seq_len=3, dht_prefix=PREFIX, lr=0.05)
    fitted(module, data, trainer_in(swarm, tmp_path), path)
    expected = trainer_in(swarm, tmp_path).validate(module, datamodule=data, verbose=False)
    with nobody_has(model):
        loaded = CausalLMModule.load_from_checkpoint(path)
    (name,) = saved = loaded.state_dict()
    assert name == "model.model.prompts.input"
    trainer = trainer_in(swarm, tmp_path)
    (found,) = trainer.validate(loaded, datamodule=data, verbose=False)
    assert found == pytest.approx(expected[0], abs=1e-5)
    trainer.fit(loaded, datamodule=data)  # after validation, whose tensors are of inference mode
    trained = loaded.state_dict()[name]
    assert trained.isfinite().all()
    assert not torch.equal(trained, saved[name])


def test_a_loaded_module_called_by_hand_says_what_to_do(
    model: Path, data: TextClassificationDataModule, tmp_path: Path
) -> None:
    module, path = SequenceClassificationModule(str(model), pre_seq_len=3), tmp_path / "saved.ckpt"
    fitted(module, data, trainer_in(None, tmp_path), path)
    loaded = SequenceClassificationModule.load_from_checkpoint(path)
    batch = next(iter(data.val_dataloader()))
    with pytest.raises(NoModelError, match=r"^this SequenceClassificationModule has no model yet: .* first$"):
        loaded(**batch)
    assert not hasattr(loaded, "model")
    trainer_in(None, tmp_path).validate(loaded, datamodule=data, verbose=False)
    assert torch.equal(loaded(**batch).logits, module(**batch).logits)


def test_weights_that_do_not_fit_are_told_when_the_model_is_there(
    model: Path, data: TextClassificationDataModule, tmp_path: Path
) -> None:
    path = tmp_path / "saved.ckpt"
    fitted(SequenceClassificationModule(str(model), pre_seq_len=3), data, trainer_in(None, tmp_path), path)
    loaded = SequenceClassificationModule.load_from_checkpoint(path, pre_seq_len=5)
    with pytest.raises(CheckpointError, match=r"prompts\.input is \[3, 32\], expected \[5, 32\]"):
        trainer_in(None, tmp_path).validate(loaded, datamodule=data, verbose=False)
