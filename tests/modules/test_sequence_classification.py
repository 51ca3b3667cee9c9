"""The module with all blocks in this process: what it logs, saves, resumes and refuses. (Swarms: tests/strategies.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from petals_lightning.callbacks import LastCheckpoint
from petals_lightning.data import TextClassificationDataModule
from petals_lightning.errors import CheckpointError, ConfigurationError
from petals_lightning.modules import SequenceClassificationModule
from petals_lightning.strategies import precision_plugin
from tests.helpers.lightning import Losses, make_module, make_trainer


@pytest.mark.slow
def test_trains_prompts_and_head_only(text_model: Path, data: TextClassificationDataModule, tmp_path: Path) -> None:
    module = make_module(text_model, lr=0.05)
    losses = Losses()
    trainer = make_trainer(tmp_path, losses, max_epochs=12)
    torch.manual_seed(0)
    trainer.fit(module, datamodule=data)
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert trained == {"model.model.prompts.input", "model.model.prompts.deep", "model.score.weight"}
    values = list(losses.values.values())
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    logged = {"train/loss", "val/loss", "val/accuracy", "val/macro_f1", "val/matthews"}
    assert logged <= trainer.callback_metrics.keys()


def test_validation_averages_over_samples(text_model: Path, texts: Path, tmp_path: Path) -> None:
    module = make_module(text_model)
    metrics = []
    for batch_size in (1, 7, 16):  # 16 texts: batches of 7, 7 and 2
        data = TextClassificationDataModule(str(text_model), str(texts), batch_size=batch_size)
        metrics += make_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], abs=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path
) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
            schedule: Any = module.lr_schedulers()
            rates.append(schedule.get_last_lr()[0])

    make_trainer(tmp_path, Rates()).fit(make_module(text_model, lr=0.1, warmup_ratio=0.2), datamodule=data)
    assert len(rates) == 10  # 2 epochs of 40 texts in batches of 8
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1 * 7 / 8])
    assert rates[-1] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop_at", "mode"),
    [(2, "deep_ptune"), (5, "deep_ptune"), (7, "deep_ptune"), (7, "prefix")],
    ids=["mid-epoch", "between epochs", "second epoch", "a prefix"],
)
def test_an_interrupted_run_continues_as_if_nothing_had_happened(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path, stop_at: int, mode: str
) -> None:
    undisturbed = Losses()
    make_trainer(tmp_path, undisturbed).fit(make_module(text_model, tuning_mode=mode), datamodule=data)

    first, path = Losses(stop_at), tmp_path / "last.ckpt"
    module, trainer = make_module(text_model, tuning_mode=mode), make_trainer(tmp_path, first, LastCheckpoint(path))
    with pytest.raises(SystemExit):  # what Lightning makes of Ctrl-C
        trainer.fit(module, datamodule=data)
    torch.manual_seed(1)
    second = Losses()
    again = TextClassificationDataModule(str(text_model), data.source, batch_size=8)
    module = SequenceClassificationModule(str(text_model), tuning_mode=mode, pre_seq_len=3)
    make_trainer(tmp_path, second).fit(module, datamodule=again, ckpt_path=path)
    assert sorted(first.values) + sorted(second.values) == sorted(undisturbed.values)
    assert {**first.values, **second.values} == pytest.approx(undisturbed.values, abs=1e-6)


def test_checkpoints_are_small_and_safe_to_load(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    make_trainer(tmp_path, LastCheckpoint(path)).fit(make_module(text_model, token="secret"), datamodule=data)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {
        "model.model.prompts.input",
        "model.model.prompts.deep",
        "model.score.weight",
    }
    assert path.stat().st_size < 50_000
    assert b"secret" not in path.read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pre_seq_len": 5}, r"prompts\.input is \[3, 32\], expected \[5, 32\]"),
        ({"tuning_mode": "ptune"}, r"prompts\.deep is not trained here"),
        ({"num_labels": 3}, r"score\.weight is \[2, 32\], expected \[3, 32\]"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path, settings: dict, message: str
) -> None:
    path = tmp_path / "last.ckpt"
    make_trainer(tmp_path, LastCheckpoint(path), max_epochs=1).fit(make_module(text_model), datamodule=data)
    with pytest.raises(CheckpointError, match=message):
        make_trainer(tmp_path).validate(make_module(text_model, **settings), datamodule=data, ckpt_path=path)


def test_test_prints_and_saves_a_report(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = make_module(text_model, class_names=["bad", "good"])
    (metrics,) = make_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    report = (tmp_path / "test_report.txt").read_text()
    assert report.strip() in capsys.readouterr().out
    assert "bad" in report
    assert f"{metrics['test/accuracy']:.4f}" in report


def test_scores_are_those_of_scikit_learn(text_model: Path, texts: Path, tmp_path: Path) -> None:
    # A test part with classes of uneven sizes, in batches of 5, 5, 5 and 1.
    data = TextClassificationDataModule(str(text_model), str(texts), eval_batch_size=5)
    module, trainer = make_module(text_model), make_trainer(tmp_path)
    (scores,) = trainer.test(module, datamodule=data, verbose=False)
    batches: Any = trainer.predict(module, datamodule=data)
    predicted = torch.cat([batch["labels"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in data.predict_dataloader()])
    assert len(set(predicted.tolist())) == 2, "the test is blind"
    assert scores["test/accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert scores["test/macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-6)
    assert scores["test/matthews"] == pytest.approx(matthews_corrcoef(labels, predicted), abs=1e-6)


def test_predict_returns_probabilities_and_labels(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path
) -> None:
    batches: Any = make_trainer(tmp_path).predict(make_module(text_model), datamodule=data)
    assert batches is not None
    assert [batch["probabilities"].shape for batch in batches] == [(16, 2)]  # training takes 8 at a time
    for batch in batches:
        assert torch.allclose(batch["probabilities"].sum(1), torch.ones(16))
        assert torch.equal(batch["labels"], batch["probabilities"].argmax(1))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_is_what_was_asked_for(
    text_model: Path, data: TextClassificationDataModule, tmp_path: Path, precision: str
) -> None:
    plugin = precision_plugin(precision, "cpu")
    losses = Losses()
    trainer = make_trainer(tmp_path, losses, plugins=[plugin], max_epochs=1)
    module = make_module(text_model)
    trainer.fit(module, datamodule=data)
    assert trainer.precision == precision
    assert (plugin.scaler is not None) == (precision == "16-mixed")  # type: ignore[attr-defined]
    assert all(0.2 < loss < 2 for loss in losses.values.values())
    assert all(weight.dtype == torch.float32 for weight in module.parameters() if weight.requires_grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pre_seq_len": 0}, r"^pre_seq_len=0: must be at least 1"),
        ({"pre_seq_len": -4}, r"^pre_seq_len=-4"),
        ({"tuning_mode": "bitfit"}, r"^tuning_mode=bitfit: must be None, ptune, deep_ptune, prefix or lora"),
        ({"tuning_mode": "lora"}, r"^tuning_mode=lora: set the rank too, e\.g\. r=8"),
        ({"lr": 0.0}, r"^lr=0\.0: must be above 0"),
        ({"head_lr": 0.0}, r"^head_lr=0\.0: must be above 0"),
        ({"deep_lr": -1e-3}, r"^deep_lr=-0\.001: must be above 0"),
        ({"weight_decay": -0.1}, r"^weight_decay=-0\.1: must be 0 or more"),
        ({"warmup_ratio": 2.0}, r"^warmup_ratio=2\.0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SequenceClassificationModule("model", **settings)


def test_an_unknown_precision_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="32-true, 16-mixed, bf16-mixed"):
        precision_plugin("8-bit", "cpu")
