"""A run from its settings to the files that it leaves. (All blocks local, for speed.)"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import numpy
import pytest
import pytorch_lightning as pl
import torch
import typer
from omegaconf import DictConfig
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForSequenceClassification

from petals_lightning.api.runs import read_run
from petals_lightning.callbacks.learning_curve import validation_of_head_alone
from petals_lightning.cli.app import app
from petals_lightning.data import DialogueDataModule, TextClassificationDataModule, load_tokenizer
from petals_lightning.errors import CheckpointError, ConfigurationError
from petals_lightning.models import PromptCard
from petals_lightning.models.local import LocalModelForCausalLM
from petals_lightning.modules import CausalLMModule, SequenceClassificationModule
from petals_lightning.training.run import run
from petals_lightning.training.run_folder import choose_run_folder
from petals_lightning.training.schema import TrainerConfig

ROOT = Path(__file__).resolve().parents[2]

SUMMARY_KEYS = {
    "val/accuracy",
    "val/macro_f1",
    "val/matthews",
    "val/loss",
    "train/seconds",
    "train/steps",
    "train/tokens",
    "swarm/bytes_sent",
    "swarm/bytes_received",
    "swarm/retries",
    "checkpoint",
}


def test_a_run_leaves_its_summary_picture_and_checkpoints(
    compose_run: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = run(compose_run(), "sst2_deep_ptune")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["val/accuracy"] == accuracy
    start = "text", "Is this review positive or negative? Review:"
    assert (summary["tuning/init"], summary["tuning/init_text"]) == start
    assert summary["train/steps"] == 10  # 2 epochs of 40 texts in batches of 8
    assert summary["train/tokens"] > 10 * 8 * 3
    assert Path(summary["checkpoint"]) == tmp_path / "checkpoints" / "best.ckpt"
    assert {"best.ckpt", "last.ckpt"} == {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"test/accuracy", "test/macro_f1", "test/matthews"} <= summary.keys()
    with Image.open(tmp_path / "learning_curve.png") as picture:
        assert picture.width > 1000
    said = capsys.readouterr().out
    assert {"val/accuracy", "val/macro_f1", "test/matthews"} <= set(said.split())
    assert str(tmp_path) in said
    assert "bundled sample" not in said
    assert "a step costs 0 bytes sent, 0 bytes received, " in said, "all blocks are here"
    assert "; the 6 left of 10 about 0 bytes and " in said
    curve = json.loads((tmp_path / "learning_curve.json").read_text())
    assert [step for step, _ in curve["train"]] == list(range(1, 11))
    assert max(entry["val/accuracy"] for entry in curve["validation"]) == accuracy
    assert read_run(tmp_path.parent)["curve"] == curve
    assert read_run(tmp_path)["summary"] == summary


@pytest.mark.slow
def test_the_last_lines_say_what_to_type_next(
    compose_run: Callable[..., DictConfig],
    text_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the real paths, and without the settings that they replace."""
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe=sst2_deep_ptune", "tuning.r=2", "tuning.pre_seq_len=3"])
    run(compose_run("test=false"), "sst2_deep_ptune")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "python train.py recipe=sst2_deep_ptune tuning=none" in lines
    last = tmp_path / "checkpoints" / "last.ckpt"
    on = f"recipe=sst2_deep_ptune tuning.r=2 tuning.pre_seq_len=3 ckpt_path={last} resume=false trainer.max_epochs=4"
    assert f"python train.py {on}" in lines

    source, folder = tmp_path / "talks.jsonl", tmp_path / "run"
    source.write_text("\n".join(json.dumps({"turns": ["w1 w2", f"w{row} w4"]}) for row in range(30)))
    talks = (f"data.source={source}", f"output_dir={folder}", "test=false", "tuning.r=2")
    run(compose_run(*talks, recipe="dialogue_deep_ptune"), "dialogue_deep_ptune")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("petals-lightning ")]
    assert [command[1] for command in commands] == ["serve", "chat", "api"]
    group: Any = typer.main.get_command(app)
    for _, name, *arguments in commands:
        parsed = group.commands[name].make_context(name, arguments).params
        assert (parsed["model"], parsed["dht_prefix"]) == (str(text_model), text_model.name)
        for part in ("prompts", "adapter"):
            assert parsed.get(part) in (None, str(folder / part), [f"tuned={folder / part}"])
    assert "--prompts" in commands[1]
    assert "--adapter" in commands[1]


@pytest.mark.slow
def test_a_dry_run_prints_what_steps_cost_and_leaves_no_results(
    compose_run: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = ("dry_run=true", "callbacks=early_stopping", "swarm=local", "swarm.num_servers=1")
    assert run(compose_run(*dry, "trainer.accumulate_grad_batches=2", "trainer.max_epochs=40")) is None
    said = " ".join(capsys.readouterr().out.split())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "servers"]
    (costs,) = re.findall(r"a step costs ([\d.]+) kB sent, ([\d.]+) kB received, [\d.]+ s \(of 3 measured\)", said)
    (left, total, volume) = re.findall(r"the (\d+) left of (\d+) about ([\d.]+ [kM]B) and", said)[0]
    assert (left, total) == ("116", "120")  # 5 batches an epoch are 3 steps of 2
    megabytes = float(volume.split()[0]) / {"MB": 1, "kB": 1000}[volume.split()[1]]
    assert megabytes == pytest.approx(116 * sum(map(float, costs)) / 1000, rel=0.1)
    assert "next:" not in said


@pytest.mark.slow
def test_the_picture_shows_the_head_alone_if_such_a_run_is_there(
    compose_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    gray = (0x96, 0x96, 0x96)
    for name, tuning in {"before": "deep_ptune", "head": "none", "after": "deep_ptune"}.items():
        run(compose_run(f"tuning={tuning}", f"output_dir={tmp_path / name}", "test=false"), "mine")
        with Image.open(tmp_path / name / "learning_curve.png") as picture:
            pixels = numpy.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert ((pixels == gray).all(1).sum() > 300) == (name == "after"), "a line, and not the edges of letters"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    facts = json.loads((tmp_path / "after" / "summary.json").read_text())
    expected = json.loads((tmp_path / "head" / "learning_curve.json").read_text())["validation"]
    assert validation_of_head_alone(tmp_path / "after", facts) == expected
    assert validation_of_head_alone(tmp_path / "after", facts | {"data": "other texts"}) == []


@pytest.mark.slow
def test_a_run_is_the_same_again(compose_run: Callable[..., DictConfig], tmp_path: Path) -> None:
    losses = []
    for number in range(2):
        folder = tmp_path / str(number)
        run(compose_run(f"output_dir={folder}"))
        losses.append(json.loads((folder / "summary.json").read_text())["val/loss"])
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_continued_run_counts_the_whole(compose_run: Callable[..., DictConfig], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(compose_run(f"output_dir={whole}", "optim.warmup_ratio=1"))
    # Stopped after one of two epochs: only the limit differs, not the schedule (all warm-up).
    run(compose_run(f"output_dir={parts}", "optim.warmup_ratio=1", "trainer.limit_train_batches=5"))
    expected = json.loads((whole / "summary.json").read_text())
    last = parts / "checkpoints" / "last.ckpt"
    run(compose_run(f"output_dir={parts}", f"ckpt_path={last}", "trainer.max_epochs=3", "test=false"))
    summary = json.loads((parts / "summary.json").read_text())
    assert summary["train/steps"] == 15
    assert summary["train/tokens"] == pytest.approx(1.5 * expected["train/tokens"], rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You requested to overfit")  # Lightning's own
@pytest.mark.parametrize(
    ("settings", "steps"),
    [("trainer.log_every_n_steps=0", 10), ("trainer.overfit_batches=2", 4), ("trainer.max_steps=7", 7)],
)
def test_settings_of_the_trainer_are_obeyed(
    settings: str, steps: int, compose_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    run(compose_run(settings, "trainer.profiler=simple", "trainer.detect_anomaly=true", "logger=none"))
    assert json.loads((tmp_path / "summary.json").read_text())["train/steps"] == steps
    assert "run_training_epoch" in (tmp_path / "fit-profile.txt").read_text()
    assert not (tmp_path / "csv").exists()


@pytest.mark.slow
def test_a_trial_leaves_no_results(compose_run: Callable[..., DictConfig], tmp_path: Path, capsys: Any) -> None:
    run(compose_run())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run(compose_run("trainer.fast_dev_run=2", "resume=true", "trainer.max_epochs=4"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    run(compose_run("trainer.fast_dev_run=2", f"output_dir={tmp_path / 'trial'}"))
    assert not [path for path in (tmp_path / "trial").rglob("*") if path.is_file()]
    assert "no files are left: this was a trial" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [("trainer.limit_val_batches=0",), ("trainer.enable_checkpointing=false",), ("trainer.check_val_every_n_epoch=3",)],
    ids=lambda settings: settings[0],
)
def test_without_a_best_checkpoint_the_last_weights_are_tested(
    settings: tuple[str, ...], compose_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    accuracy = run(compose_run(*settings, "optim.lr=0.1", "trainer.max_epochs=2"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    checkpoints = {path.name for path in tmp_path.glob("checkpoints/*")}
    assert summary["val/accuracy"] == accuracy
    if settings == ("trainer.enable_checkpointing=false",):
        assert checkpoints == set()
        assert accuracy is not None
        return
    assert checkpoints == {"last.ckpt"}
    assert accuracy is None
    again = tmp_path / "again"  # trains no further, and tests the weights of the checkpoint
    last = tmp_path / "checkpoints" / "last.ckpt"
    run(compose_run(*settings, f"ckpt_path={last}", f"output_dir={again}", "optim.lr=0.1", "trainer.max_epochs=2"))
    assert json.loads((again / "summary.json").read_text())["test/loss"] == summary["test/loss"]


@pytest.mark.filterwarnings("ignore:You.re using the WeightAveraging callback")  # Lightning's own
def test_callbacks_end_a_run_average_its_weights_and_save_more(
    compose_run: Callable[..., DictConfig], tmp_path: Path, capsys: Any
) -> None:
    run(
        compose_run(
            "callbacks=[early_stopping,ema_weight_averaging,rich_model_summary,learning_rate_monitor]",
            "callbacks.early_stopping.patience=1",
            "callbacks.early_stopping.min_delta=10",
            "+callbacks.mine._target_=pytorch_lightning.callbacks.ModelCheckpoint",
            "+callbacks.mine.monitor=val/accuracy",
            "+callbacks.mine.mode=max",
            f"+callbacks.mine.dirpath={tmp_path / 'mine'}",
            "trainer.max_epochs=9",
        )
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    start = "text", "Is this review positive or negative? Review:"
    assert (summary["tuning/init"], summary["tuning/init_text"]) == start
    assert summary["train/steps"] == 10, "nothing gets better by 10: after two epochs it is over"
    assert summary["checkpoint"] == str(tmp_path / "checkpoints" / "best.ckpt")
    assert "averaging_state" in torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=False)
    assert len(list((tmp_path / "mine").glob("*.ckpt"))) == 1
    assert "Modules in train mode" in capsys.readouterr().out
    (metrics,) = (tmp_path / "csv").glob("version_0/metrics.csv")
    assert "lr-AdamW" in metrics.read_text()


def test_every_setting_of_the_trainer_is_lightnings() -> None:
    known = {each.name for each in fields(TrainerConfig)} - {"_target_"}
    assert known <= signature(pl.Trainer).parameters.keys()


def test_resume_finds_the_newest_run(tmp_path: Path) -> None:
    for name in ("2026-01-01", "2026-01-02", "2026-01-03"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    for name in ("2026-01-01", "2026-01-02"):
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
    assert choose_run_folder(str(tmp_path), resume=True) == str(tmp_path / "2026-01-02")
    assert Path(choose_run_folder(str(tmp_path), resume=False)).parent == tmp_path
    assert not Path(choose_run_folder(str(tmp_path), resume=False)).exists()


@pytest.mark.slow
def test_a_sweep_runs_every_combination(text_model: Path, texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "recipe=sst2_ptune,sst2_deep_ptune", "optim.lr=1e-3,1e-2"]
    command += [f"model.name={text_model}", f"data.source={texts}", "swarm=none", "logger=csv", "trainer.max_epochs=1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("multirun/*/*/summary.json")]
    assert sorted(summary["recipe"] for summary in summaries) == ["sst2_deep_ptune"] * 2 + ["sst2_ptune"] * 2
    assert len({summary["val/loss"] for summary in summaries}) == 4


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


class Tamper(pl.Callback):
    """Puts an object that runs code into the best checkpoint when it has been saved."""

    def __init__(self, folder: str):
        self._folder = Path(folder)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tamper(self._folder / "checkpoints" / "best.ckpt", self._folder / "ran")


def tamper(checkpoint: Path, ran: Path) -> None:
    torch.save(torch.load(checkpoint, weights_only=True) | {"object": Touch(ran)}, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sst2_deep_ptune", "dialogue_deep_ptune"])
def test_no_code_in_a_checkpoint_runs(
    recipe: str, compose_run: Callable[..., DictConfig], tmp_path: Path, text_model: Path
) -> None:
    """Neither when the best one is tested, or made into prompts, nor when the last one is continued."""
    settings = [f"model.name={text_model}"]
    if recipe == "dialogue_deep_ptune":
        source = tmp_path / "talks.jsonl"
        source.write_text("\n".join(json.dumps({"turns": ["w1 w2", f"w{row} w4"]}) for row in range(30)))
        settings += [f"data.source={source}", "test=false"]
    mine = ("+callbacks.mine._target_=tests.training.test_run.Tamper", f"+callbacks.mine.folder={tmp_path}")
    with pytest.raises(CheckpointError, match=r"best\.ckpt' is not read: only tensors and plain values"):
        run(compose_run(*settings, *mine, recipe=recipe))
    assert not (tmp_path / "ran").exists()
    last = tmp_path / "checkpoints" / "last.ckpt"
    tamper(last, tmp_path / "ran")
    with pytest.raises(CheckpointError, match=r"last\.ckpt' is not read: only tensors and plain values"):
        run(compose_run(*settings, "resume=true", "trainer.max_epochs=3", recipe=recipe))
    module = CausalLMModule if recipe == "dialogue_deep_ptune" else SequenceClassificationModule
    with pytest.raises(CheckpointError, match="can run code on this machine"):
        module.load_from_checkpoint(last)
    assert not (tmp_path / "ran").exists()
    module.load_from_checkpoint(last, weights_only=False)
    assert (tmp_path / "ran").exists(), "the test is blind"


def test_a_dialogue_run_leaves_its_best_prompts_for_chat(
    compose_run: Callable[..., DictConfig], text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = tmp_path / "talks.jsonl", tmp_path / "run"
    source.write_text("\n".join(json.dumps({"turns": ["w1 w2", f"w{row} w4"]}) for row in range(30)))
    overrides = [f"data.source={source}", f"output_dir={folder}"]
    perplexity = run(compose_run(*overrides, recipe="dialogue_deep_ptune"), "dialogue_deep_ptune")
    card = PromptCard.read(folder / "prompts")
    assert card.metrics["val/perplexity"] == perplexity
    assert (card.tuning_mode, card.pre_seq_len, card.base_model) == ("deep_ptune", 3, str(text_model))
    data = DialogueDataModule(str(text_model), str(source), batch_size=8)
    data.setup()
    module = CausalLMModule(str(text_model))
    module.model = LocalModelForCausalLM.from_pretrained(str(text_model), prompts=folder / "prompts")
    losses = [module(**batch) for batch in data.val_dataloader()]
    mean = sum(loss.item() * count for loss, count in losses) / sum(count for _, count in losses)
    assert math.exp(mean) == pytest.approx(perplexity, rel=1e-4)
    assert "val/perplexity" in capsys.readouterr().out


def test_a_lora_run_leaves_an_adapter_that_peft_loads(
    compose_run: Callable[..., DictConfig], text_model: Path, texts: Path, tmp_path: Path
) -> None:
    settings = ["tuning=lora", "tuning.r=2", "tuning.target_modules=[q_proj,v_proj]", "optim.lr=0.02", "test=false"]
    accuracy = run(compose_run(*settings))
    data = TextClassificationDataModule(str(text_model), str(texts), batch_size=8)
    data.setup()
    plain = AutoModelForSequenceClassification.from_pretrained(
        str(text_model), num_labels=2, pad_token_id=load_tokenizer(str(text_model)).pad_token_id
    )
    model = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_A." in name} == {"q_proj", "v_proj"}
    batches = list(data.val_dataloader())
    right = sum(int((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches)
    assert right / sum(len(batch["labels"]) for batch in batches) == pytest.approx(accuracy)
    assert not (tmp_path / "prompts").exists()


class OwnData(TextClassificationDataModule):
    """A user's."""


class OwnModule(SequenceClassificationModule):
    """A user's, with an argument of its own."""

    def __init__(self, model_name: str, *, patience: int = 1, **options: Any):
        super().__init__(model_name, **options)


def test_a_task_of_ones_own_needs_its_classes_only(
    compose_run: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    own = [f"data._target_={__name__}.OwnData", f"task._target_={__name__}.OwnModule", "+task.patience=2"]
    run(compose_run(*own, "data.source=bundled", "trainer.fast_dev_run=true", "test=false"))
    assert "synthetic reviews" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match=r"unknown setting task.patienc; did you mean task.patience\?"):
        run(compose_run(*own[:2], "+task.patienc=2"))
