"""What a user gets wrong is one line that names it and how to mend it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from petals_lightning.training import cli_errors
from petals_lightning.training.settings import in_words_of_settings
from tests.helpers.clocks import main_with_a_wrong_clock
from tools.testing.servers import start_server
from tools.testing.swarms import PREFIX

ROOT = Path(__file__).resolve().parents[2]

WRONG = {
    "recipe=sst3_ptune": "no recipe is called 'sst3_ptune'; did you mean sst2_ptune?",
    "tuning=ptune": "You must specify 'recipe'",
    "recipe=sst2_ptune tuning.pre_sq_len=8": "unknown setting tuning.pre_sq_len; did you mean tuning.pre_seq_len?",
    "recipe=sst2_ptune tunning.mode=null": "unknown setting tunning; did you mean tuning?",
    "recipe=sst2_ptune swarm=public swarm.num_servers=3": "unknown setting swarm.num_servers; there are: ",
    "recipe=sst2_ptune seed=many": "seed=many: Value 'many' of type 'str' could not be converted to Integer",
    "recipe=sst2_ptune swarm=private": "swarm.initial_peers is empty",
    "recipe=sst2_ptune tuning.pre_seq_len=0 {model}": (
        "error: tuning.pre_seq_len=0: must be at least 1 virtual token, e.g. 16; to train the head alone set "
        "tuning.mode=null"
    ),
    "recipe=sst2_ptune optim.lr=-1 {model}": "error: optim.lr=-1.0: must be above 0",
    "recipe=sst2_ptune tuning.mode=bitfit {model}": (
        "error: tuning.mode=bitfit: must be null, ptune, deep_ptune, prefix or lora"
    ),
    "recipe=sst2_ptune tuning.mode=lora {model}": "error: tuning.mode=lora: set the rank too, e.g. tuning.r=8",
    "recipe=sst2_ptune tuning.init_text=null {model}": "error: tuning.init=text needs a text: set tuning.init_text,",
    "recipe=dialogue_ptune tuning.mode=null": "error: tuning.mode=null: a language model has no head to train",
    "recipe=sst2_ptune data.batch_size=0": "error: data.batch_size=0: must be at least 1",
    "recipe=sst2_ptune data.encoding=klingon": "error: data.encoding=klingon: no such encoding",
    "recipe=sst2_ptune data.num_labels=1": "data.num_labels=1: must be at least 2, or null to count the classes",
    "recipe=sst2_ptune data.label_map=x": (
        'error: data.label_map=x: must be a mapping of labels, e.g. "data.label_map={-1:0}"'
    ),
    "recipe=sst2_ptune data.source=nowhere/none.jsonl": "error: data.source=nowhere/none.jsonl: no such file",
    "recipe=sst2_ptune swarm.num_servers=0": "error: swarm.num_servers=0: a swarm needs at least 1 server",
    "recipe=sst2_ptune amp.precision=8 swarm=none {model}": "error: amp.precision=8: must be one of 32-true",
    "recipe=sst2_ptune model.name=no/such/model": "error: model.name=no/such/model: no tokenizer there (",
    "recipe=sst2_ptune data.source={folder}/unlabelled.jsonl {model}": "the columns are 'sentence', 'stars'",
    "recipe=sst2_ptune data.source={folder}/three.jsonl data.num_labels=2 {model}": "set data.num_labels=3",
    "recipe=dialogue_ptune data.columns.promt=x": "data.columns.promt; did you mean data.columns.prompt?",
    "recipe=dialogue_ptune data.source={folder}/three.jsonl data.columns.prompt=question {model}": (
        "three.jsonl has no column 'question'; it has "
    ),
    "recipe=dialogue_ptune task=sequence_classification": (
        "task: SequenceClassificationModule needs the num_labels of its data, and DialogueDataModule has none"
    ),
    "recipe=sst2_ptune task=causal_lm swarm=none logger=none {model}": "CausalLMModule trains on tokens; use its data",
    "recipe=sst2_ptune task=casual_lm": "no task is called 'casual_lm'; did you mean causal_lm?",
    "recipe=sst2_ptune +task.head=big {model}": "unknown setting task.head; there are: ",
    "recipe=sst2_ptune task._target_=collections.Counter {model}": "not a petals_lightning.modules.TuningModule, such",
    "recipe=sst2_ptune resume=true {model}": "resume=true: no earlier run to continue",
    "recipe=sst2_ptune ckpt_path=no.ckpt {model}": "ckpt_path=no.ckpt: no such file",
    "recipe=customer_reviews_deep_ptune": "data.source",
    "recipe=sst2_ptune +foo=1": "unknown setting foo; there are: ",
    "recipe=sst2_ptune +sede=1": "unknown setting sede; did you mean seed?",
    "recipe=sst2_ptune +lr=1e-3": "unknown setting lr; did you mean optim.lr?",
    "recipe=sst2_ptune fast_dev_run=true": "unknown setting fast_dev_run; did you mean trainer.fast_dev_run?",
    "recipe=sst2_ptune +trainer.max_epoch=1": "unknown setting trainer.max_epoch; did you mean trainer.max_epochs?",
    "recipe=sst2_ptune +tuning.pre_sq_len=8": "unknown setting tuning.pre_sq_len; did you mean tuning.pre_seq_len?",
    "recipe=sst2_ptune swarm=none +swarm.servers=3": "unknown setting swarm.servers; there are: none here",
    "recipe=sst2_ptune trainer.logger=false": "unknown setting trainer.logger; use logger=wandb, csv",
    "recipe=sst2_ptune logger=false": "The value of a group, such as logger=none, must be a string or a list. Got bool",
    "recipe=sst2_ptune logger=wandb logger.mode=online": "logger.mode=online: this machine is not logged in to W&B",
    "recipe=sst2_ptune callbacks=early_stoping": "no callbacks is called 'early_stoping'; did you mean early_stopping?",
    "recipe=sst2_ptune callbacks=early_stopping +callbacks.early_stopping.patiense=2": (
        "unknown setting callbacks.early_stopping.patiense; did you mean callbacks.early_stopping.patience?"
    ),
    "recipe=sst2_ptune callbacks=early_stopping callbacks.early_stopping.patiense=2": (
        "unknown setting callbacks.early_stopping.patiense; did you mean callbacks.early_stopping.patience?"
    ),
    "recipe=sst2_ptune callbacks=early_stopping callbacks.early_stopping.patience=2x": (
        "callbacks.early_stopping.patience=2x: must be of type int"
    ),
    "recipe=sst2_ptune +callbacks.mine=1": "callbacks.mine must have a _target_, e.g. callbacks.mine._target_=",
    "recipe=sst2_ptune +callbacks.mine._target_=pytorch_lightning.callbacks.Timmer": (
        "callbacks.mine: pytorch_lightning.callbacks.Timmer cannot be made: "
    ),
    "recipe=sst2_ptune +callbacks.mine._target_=pytorch_lightning.callbacks.EarlyStopping": "argument: 'monitor'",
    "recipe=sst2_ptune +callbacks.mine._target_=collections.Counter": "no callback of pytorch_lightning, such as",
    "recipe=sst2_ptune +callbacks.m={{_target_:pytorch_lightning.callbacks.StochasticWeightAveraging,swa_lrs:1.0}}": (
        "use callbacks=ema_weight_averaging"
    ),
    "recipe=sst2_ptune hydra.run.dir={folder}/three.jsonl/run {model}": "Not a directory; free the disk or set",
}


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """`main("recipe=…")` is `python train.py recipe=…` in `tmp_path`, without a process of its own, or a W&B login."""
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)

    def main(arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split()])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(cli_errors, "_TRACEBACKS_WANTED", False)
        train.main()

    return main


@pytest.mark.parametrize(("arguments", "message"), WRONG.items(), ids=list(WRONG))
def test_a_wrong_setting_is_one_line(
    arguments: str, message: str, main: Callable, text_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unlabelled.jsonl").write_text('{"sentence": "w1", "stars": 3}\n')
    rows = [{"sentence": f"w{number}", "label": number % 3} for number in range(30)]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as left:
        main(arguments.format(folder=tmp_path, model=f"model.name={text_model}"))
    assert left.value.code == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("error: ")
    assert message in said


@pytest.mark.slow
def test_a_wrong_clock_is_one_line(
    main: Callable, text_model: Path, texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = start_server(text_model, (0, 4), program=main_with_a_wrong_clock)
    try:
        with pytest.raises(SystemExit):
            main(
                f"recipe=sst2_ptune swarm=private swarm.initial_peers=[{server.wait_until_ready().maddr}] logger=csv "
                f"model.name={text_model} model.dht_prefix={PREFIX} data.source={texts} hydra.run.dir={tmp_path}/run"
            )
    finally:
        server.stop()
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("error: cannot join the swarm: this machine's clock is ")
    assert "clocks agree within 3 s" in said


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("audit_rate is 2: it is a share", "swarm.audit_rate is 2: it is a share"),
        ("devices=2: set devices=1", "trainer.devices=2: set trainer.devices=1"),
        ("name it with label_column=…", "name it with data.label_column=…"),
        ("give max_length, or pre_seq_len.", "give data.max_length, or tuning.pre_seq_len."),
        ("set name=None or drop_unlabelled=True", "set data.name=null or data.drop_unlabelled=true"),
        ("set label_map={'Pos': 'pos'}", 'set "data.label_map={Pos:pos}"'),
        ("give dht_prefix=NAME (--dht-prefix NAME)", "give model.dht_prefix=NAME (--dht-prefix NAME)"),
        # What is no argument, or is the user's own, stays.
        ("the source, its name and encoding: lr", "the source, its name and encoding: lr"),
        ("no column 'label_column' in /data/num_labels=2/x", "no column 'label_column' in /data/num_labels=2/x"),
        ("data.num_labels=3, num_labels.csv, top.lr=1", "data.num_labels=3, num_labels.csv, top.lr=1"),
        ("None of the peers answers", "None of the peers answers"),
        ("label 'None', batch_size=None", "label 'None', data.batch_size=null"),
    ],
)
def test_arguments_are_called_by_their_settings(said: str, meant: str, compose_run: Callable) -> None:
    cfg = compose_run("swarm=private", "swarm.initial_peers=[]")
    assert in_words_of_settings(said, cfg) == meant


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches=0: must be at least 1",
        "trainer.devices=3 swarm=local": "trainer.devices=3: a run trains on 1 device here",
        "trainer.devices=2": "trainer.devices=2: a run trains on 1 device here; set trainer.devices=1",
        "trainer.profiler=best": "it can only be one of ['simple', 'advanced', 'pytorch', 'xla']",
        "trainer.accelerator=warp": "invalid accelerator name: `accelerator='warp'`",
        "callbacks=learning_rate_monitor logger=none": "Cannot use `LearningRateMonitor` callback with `Trainer`",
        "callbacks=early_stopping callbacks.early_stopping.monitor=val/los": "metric `val/los` which is not available",
        "trainer.val_check_interval=1000": "must be less than or equal to the number of the training batches",
    }.items(),
)  # fmt: skip
def test_what_lightning_refuses_is_one_line(
    arguments: str, message: str, main: Callable, text_model: Path, texts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments if "swarm=" in arguments else f"swarm=none {arguments}"
    with pytest.raises(SystemExit) as left:
        main(f"recipe=sst2_ptune model.name={text_model} data.source={texts} logger=csv {arguments}")
    assert left.value.code == 1
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert message in said


def test_a_full_disk_is_told_before_training(
    main: Callable, text_model: Path, texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes a root user who may mount")
    try:
        with pytest.raises(SystemExit):
            main(
                "recipe=sst2_ptune tuning.pre_seq_len=4 swarm=none logger=csv test=false trainer.log_every_n_steps=1 "
                f"model.name={text_model} data.source={texts} hydra.run.dir={folder}/run"
            )
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {folder}/run/checkpoints: 8 MiB free on its disk, and the run's checkpoints")
    assert said.endswith("set hydra.run.dir=… to another disk")
