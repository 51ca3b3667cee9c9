"""What Lightning's Trainer and callbacks can be asked for, on our modules. (All blocks in this process; swarms are in
tests/strategies.)"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from petals_lightning.callbacks import ProgressLines, RunSummary
from petals_lightning.data import TextClassificationDataModule
from petals_lightning.errors import ConfigurationError
from petals_lightning.models import trainable_state_dict
from petals_lightning.modules import SequenceClassificationModule
from tests.helpers.lightning import make_module, make_trainer

# What Lightning advises on features that are used here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LR = 0.05


def weights_of(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in trainable_state_dict(module).items()}


class Seen(Callback):
    """Batches and learning rates of all steps (the first group's, and each group's), and weights before and after."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.rates: list[float] = []
        self.group_rates: dict[str, list[float]] = {}
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self.batches.append(batch["input_ids"])
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        for group in trainer.optimizers[0].param_groups:
            self.group_rates.setdefault(group["name"], []).append(group["lr"])
        self.before.append(weights_of(module))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.after.append(weights_of(module))


def mean(all_weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([weights[name] for weights in all_weights]).mean(0) for name in all_weights[0]}


# --- which batches, and how long -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["data module", "loader"])
def test_overfitting_takes_the_first_rows_of_the_file_in_every_epoch(given, text_model, data, tmp_path) -> None:
    data.setup()
    rows = data._splits["train"]
    expected = [data._collate([rows[at] for at in range(start, start + 8)])["input_ids"] for start in (0, 8)]
    seen = Seen()
    source = data if given == "data module" else data.train_dataloader()
    make_trainer(tmp_path, seen, overfit_batches=2, max_epochs=3, limit_val_batches=0).fit(
        make_module(text_model), source
    )
    assert len(seen.batches) == 6
    for batch, right in zip(seen.batches, expected * 3, strict=True):
        assert torch.equal(batch, right)


def test_a_run_with_fewer_batches_continues_with_the_next_epochs_first(text_model, data, tmp_path) -> None:
    whole, rest = Seen(), Seen()
    saved = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    make_trainer(tmp_path, whole, saved, limit_train_batches=3).fit(make_module(text_model), data)
    again = TextClassificationDataModule(str(text_model), data.source, batch_size=8)
    make_trainer(tmp_path, rest, limit_train_batches=3).fit(
        make_module(text_model), again, ckpt_path=tmp_path / "epoch=0.ckpt"
    )
    assert len(rest.batches) == 3
    for batch, right in zip(rest.batches, whole.batches[3:], strict=True):
        assert torch.equal(batch, right)


class Endless(IterableDataset):
    """The rows of a split, without a length."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return (self.rows[row] for row in range(len(self.rows)))


@pytest.mark.slow
@pytest.mark.parametrize("unknown", ["time decides", "no length"])
def test_the_rate_stays_where_nobody_knows_the_number_of_steps(unknown, text_model, data, tmp_path, caplog, capsys):
    seen, module, source = Seen(), make_module(text_model, lr=LR), data
    callbacks = [seen, ProgressLines(period=0)]
    if unknown == "time decides":
        trainer = make_trainer(tmp_path, *callbacks, max_epochs=-1, max_time={"seconds": 2})
    else:
        data.setup()
        source = DataLoader(Endless(data._splits["train"]), batch_size=8, collate_fn=data._collate)
        trainer = make_trainer(tmp_path, *callbacks, max_epochs=1)
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, source)
    assert set(seen.rates) == {LR}
    assert not all(torch.equal(weight, seen.after[-1][name]) for name, weight in seen.before[0].items())
    assert "the learning rate stays 0.05" in caplog.text
    assert "step 1  train/loss" in capsys.readouterr().out


def test_the_rate_reaches_zero_with_a_schedule_of_accumulation(text_model, data, tmp_path) -> None:
    seen = Seen()
    accumulation = GradientAccumulationScheduler({0: 1, 1: 5})
    trainer = make_trainer(tmp_path, seen, accumulation, max_epochs=3)
    trainer.fit(make_module(text_model, lr=LR, warmup_ratio=0), data)
    assert trainer.global_step == 5 + 1 + 1
    assert seen.rates[:6] == pytest.approx([LR * (7 - step) / 7 for step in range(6)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0


@pytest.mark.slow
def test_the_picture_shows_whole_losses_where_gradients_are_accumulated(text_model, data, tmp_path) -> None:
    losses = []
    for batches in (1, 5):
        summary = RunSummary(tmp_path)
        make_trainer(tmp_path, summary, accumulate_grad_batches=batches, max_epochs=1).fit(
            make_module(text_model), data
        )
        losses.append(summary._train[0][1])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# --- optimizers of one's own -----------------------------------------------------------------------------------------


def fit_with(make_optimizers: Any, text_model: Path, data: Any, folder: Path, **attributes: Any) -> dict[str, Any]:
    class Own(SequenceClassificationModule):
        def configure_optimizers(self) -> Any:
            return make_optimizers([weight for weight in self.parameters() if weight.requires_grad])

    torch.manual_seed(0)
    module = Own(str(text_model), pre_seq_len=3)
    for name, value in attributes.items():
        setattr(module, name, value)
    trainer = make_trainer(folder)
    trainer.fit(module, data)
    return {**{name: float(value) for name, value in trainer.callback_metrics.items()}, "steps": trainer.global_step}


def test_an_optimizer_without_a_schedule(text_model, data, tmp_path) -> None:
    metrics = fit_with(lambda weights: torch.optim.SGD(weights, lr=0.25), text_model, data, tmp_path)
    assert (metrics["steps"], metrics["train/lr"]) == (10, 0.25)


def test_an_optimizer_with_two_schedules(text_model, data, tmp_path) -> None:
    def two(weights: list[Tensor]) -> Any:
        optimizer = torch.optim.SGD(weights, lr=0.5)
        schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma) for gamma in (0.5, 0.1)]
        return [optimizer], schedules

    assert fit_with(two, text_model, data, tmp_path)["train/lr"] == pytest.approx(0.5 * 0.5 * 0.1)  # after an epoch


@pytest.mark.slow
def test_several_optimizers_stepped_by_hand_equal_one(text_model, data, tmp_path) -> None:
    class ByHand(SequenceClassificationModule):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([weight], lr=LR) for weight in self.parameters() if weight.requires_grad]

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            optimizers: Any = self.optimizers()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    class One(SequenceClassificationModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([weight for weight in self.parameters() if weight.requires_grad], lr=LR)

    ends = []
    for kind in (ByHand, One):
        torch.manual_seed(0)
        module = kind(str(text_model), pre_seq_len=3)
        make_trainer(tmp_path, RunSummary(tmp_path)).fit(module, data)
        ends.append(weights_of(module))
    for name, weight in ends[0].items():
        assert torch.allclose(weight, ends[1][name], atol=1e-6), name


def test_optimization_by_hand_that_nobody_does_is_refused(text_model, data, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="automatic_optimization=False: training_step has to step"):
        fit_with(
            lambda weights: torch.optim.SGD(weights, lr=LR), text_model, data, tmp_path, automatic_optimization=False
        )


@pytest.mark.slow
def test_a_found_learning_rate_is_the_one_that_is_scheduled(text_model, data, tmp_path) -> None:
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-4, early_stop_threshold=None)
    seen, module = Seen(), make_module(text_model, lr=LR)
    make_trainer(tmp_path, finder, seen, max_epochs=5).fit(module, data)
    assert finder.optimal_lr is not None
    found = finder.optimal_lr.suggestion()
    assert found is not None
    assert module.hparams["lr"] == found != LR
    factors = [0, 1 / 2, *((25 - step) / 23 for step in range(2, 25))]  # two steps of warm-up
    assert seen.rates == pytest.approx([found * factor for factor in factors])
    plain = Seen()
    make_trainer(tmp_path, plain, max_epochs=5).fit(make_module(text_model), data)
    for batch, right in zip(seen.batches, plain.batches, strict=True):
        assert torch.equal(batch, right)


@pytest.mark.slow
def test_the_schedule_is_as_long_as_a_run_with_a_found_batch_size(text_model, data, tmp_path) -> None:
    seen = Seen()
    trainer = make_trainer(tmp_path, BatchSizeFinder(init_val=2, max_trials=1, steps_per_trial=1), seen)
    trainer.fit(make_module(text_model, lr=LR, warmup_ratio=0), data)
    assert trainer.global_step == 2 * 40 / data.batch_size != 10
    steps = trainer.global_step
    assert seen.rates == pytest.approx([LR * (steps - step) / steps for step in range(steps)])


def test_head_and_deep_prompts_have_rates_of_their_own(text_model, data, tmp_path) -> None:
    rates = {"lr": LR, "deep_lr": 0.2, "head_lr": 0.01}
    seen, module = Seen(), make_module(text_model, warmup_ratio=0, **rates)
    trainer = make_trainer(tmp_path, seen)
    trainer.fit(module, data)
    for name, rate in rates.items():
        assert seen.group_rates[name] == pytest.approx([rate * (10 - step) / 10 for step in range(10)])
        assert float(trainer.callback_metrics[f"train/{name}"]) == pytest.approx(rate / 10)
    # Adam's first step moves each value by the rate, if its gradient is far above Adam's epsilon.
    weights = {"lr": "prompts.input", "deep_lr": "prompts.deep", "head_lr": "score.weight"}
    for group in trainer.optimizers[0].param_groups:
        (name,) = (name for name in seen.after[0] if name.endswith(weights[group["name"]]))
        moved = (seen.after[0][name] - seen.before[0][name]).abs().median()
        assert float(moved) == pytest.approx(rates[group["name"]], rel=0.01), name


@pytest.mark.parametrize("keep", [False, True])
def test_a_prefix_may_keep_its_first_position(keep, text_model, data, tmp_path) -> None:
    seen = Seen()
    start: dict[str, Any] = {"tuning_mode": "prefix", "prompt_init": "vocabulary", "keep_first": keep}
    make_trainer(tmp_path, seen, max_steps=3).fit(make_module(text_model, **start), datamodule=data)
    prefix = [name for name in seen.before[0] if ".past." in name]
    assert prefix
    for name in prefix:
        first, last = seen.before[0][name], seen.after[-1][name]
        assert torch.equal(first[:, :, 0], last[:, :, 0]) is keep
        assert (first != last)[:, :, 1:].any()


@pytest.mark.parametrize(
    "given",
    [
        {"tuning_mode": "deep_ptune", "prompt_init": "vocabulary"},
        {"tuning_mode": "prefix", "prompt_init": "random"},
        {"tuning_mode": "prefix", "prompt_init": "vocabulary", "weight_decay": 0.1},
    ],
)
def test_a_first_position_that_cannot_be_kept_is_refused(given) -> None:
    with pytest.raises(ConfigurationError, match=r"^keep_first=True: "):
        SequenceClassificationModule("model", keep_first=True, **given)


def test_rates_that_are_not_given_are_lr(text_model, data, tmp_path) -> None:
    seen = Seen()
    make_trainer(tmp_path, seen).fit(make_module(text_model, lr=LR, tuning_mode="ptune"), data)
    assert seen.group_rates == {"lr": seen.rates, "head_lr": seen.rates}


@pytest.mark.slow
def test_a_found_learning_rate_leaves_those_that_were_given(text_model, data, tmp_path) -> None:
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-4, early_stop_threshold=None)
    seen, module = Seen(), make_module(text_model, lr=LR, head_lr=0.01, warmup_ratio=0)
    make_trainer(tmp_path, finder, seen, max_epochs=5).fit(module, data)
    found = module.hparams["lr"]
    assert found != LR
    for name, rate in {"lr": found, "deep_lr": found, "head_lr": 0.01}.items():
        assert seen.group_rates[name] == pytest.approx([rate * (25 - step) / 25 for step in range(25)])


def test_a_resumed_run_has_the_same_rates(text_model, data, tmp_path) -> None:
    def fit(**options: Any) -> dict[str, list[float]]:
        seen = Seen()
        saved = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        module = make_module(text_model, lr=LR, head_lr=0.01, deep_lr=0.2)
        make_trainer(tmp_path, seen, saved).fit(module, data, weights_only=True, **options)
        return seen.group_rates

    whole = fit()
    rest = fit(ckpt_path=tmp_path / "epoch=0.ckpt")
    assert rest == {name: pytest.approx(rates[5:]) for name, rates in whole.items()}


# --- averages of weights ---------------------------------------------------------------------------------------------


def test_stochastic_weight_averaging_ends_with_the_mean_of_its_epochs(text_model, data, tmp_path) -> None:
    seen, module = Seen(), make_module(text_model, lr=LR)
    averaging = StochasticWeightAveraging(swa_lrs=LR, swa_epoch_start=2, annealing_epochs=1)
    make_trainer(tmp_path, seen, averaging, max_epochs=4).fit(module, data)
    expected = mean([seen.before[epoch * 5] for epoch in (1, 2, 3)])  # Lightning averages at the starts of epochs
    for name, weight in weights_of(module).items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name
        assert not torch.allclose(weight, seen.after[-1][name], atol=1e-4), name


def test_a_moving_average_is_validated_saved_and_resumed(text_model, data, tmp_path) -> None:
    def averaged(seen: Seen, steps: int) -> dict[str, Tensor]:
        average = seen.after[0]
        for after in seen.after[1:steps]:
            average = {name: 0.5 * weight + 0.5 * after[name] for name, weight in average.items()}
        return average

    seen, module = Seen(), make_module(text_model, lr=LR)
    saved = ModelCheckpoint(dirpath=tmp_path, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    trainer = make_trainer(tmp_path, seen, saved, EMAWeightAveraging(decay=0.5))
    torch.manual_seed(0)
    trainer.fit(module, data)
    fitted = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    checkpoint = torch.load(tmp_path / "epoch0.ckpt", weights_only=True)
    for state, right in (
        (checkpoint["state_dict"], averaged(seen, 5)),
        (checkpoint["current_model_state"], seen.after[4]),
        (weights_of(module), averaged(seen, 10)),
    ):
        assert state.keys() == right.keys()
        for name, weight in right.items():
            assert torch.allclose(state[name], weight, atol=1e-6), name
    for source in (None, tmp_path / "epoch1.ckpt"):
        other = make_module(text_model) if source is not None else module
        (validated,) = make_trainer(tmp_path).validate(other, data, ckpt_path=source, verbose=False)
        assert validated == pytest.approx(fitted, abs=1e-5)

    again = TextClassificationDataModule(str(text_model), data.source, batch_size=8)
    resumed = make_module(text_model, lr=LR)
    make_trainer(tmp_path, EMAWeightAveraging(decay=0.5)).fit(resumed, again, ckpt_path=tmp_path / "epoch0.ckpt")
    for name, weight in weights_of(resumed).items():
        assert torch.allclose(weight, weights_of(module)[name], atol=1e-6), name


# --- refusals --------------------------------------------------------------------------------------------------------


def test_several_devices_without_a_swarm_are_refused(text_model, tmp_path) -> None:
    module = make_module(text_model)
    module.trainer = make_trainer(tmp_path, devices=2, strategy="ddp_spawn")
    with pytest.raises(ConfigurationError, match=r"^devices=2: the client runs on 1 device; set devices=1"):
        module.configure_model()
