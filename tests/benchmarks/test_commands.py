"""Every benchmark runs, on a scale that says nothing about speed."""

from __future__ import annotations

import importlib
import json
import logging
import math
import pkgutil
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import benchmarks
from benchmarks import quality, sst2_epoch
from petals_lightning.sample import DIALOGUES_DIR, MODEL_DIR, REVIEWS_DIR

Run = Callable[..., list[Any]]

MODULES = sorted(found.name for found in pkgutil.iter_modules(benchmarks.__path__))
TINY = "--repeats 1 --threads 1 --hidden 64"
COMMANDS = {
    "api": f"{TINY} --blocks 2 --streams 2 --new-tokens 2 --prompt-tokens 4",
    "churn": "--minutes 0.05 --period 1",
    "clients": f"{TINY} --blocks 1 --counts 1,2 --case 2x8x2 --seconds 0.5",
    "decode": f"{TINY} --blocks 2 --servers 1,2 --sessions 2 --new-tokens 2 --prefill 16",
    "evaluation": "--repeats 1 --limit 16 --batch-size 4 --eval-batch-size 16 --round-trip 0.01",
    "families": "--family llama --family gemma3 --family qwen3_next --family rwkv",
    "large_model": "--hidden 64 --intermediate 128 --blocks 2 --threads 1 --servers 2 --case 2x8x2",
    "lora_step": f"{TINY} --blocks 2 --cases 4x8x2 --rank 2",
    "mechanisms": f"{TINY} --blocks 1 --cases 4x8x2 --data none --only last",
    "memory": "--hidden 64 --few 1 --many 2 --case 4x8x2 --vocabulary 1000 --budget 0.001 --rounds 2 --seconds 0.5",
    "pipeline": "--repeats 1 --hidden 64 --blocks 2 --servers 2 --case 4x8x2 --microbatches 2 --block-ms 1",
    "placement": "--servers 40 --blocks 8 --hours 2",
    "quality": "--sets cr,dialogue --seeds 0,1 --steps 2 --batch-size 4 --pre-seq-len 2 --limit 6 --threads 1",
    "quantization": "--texts 2 --tokens 16 --prefix 2",
    "routing": "--repeats 1 --servers 50 --blocks 8",
    "slow_link": f"{TINY} --blocks 2 --servers 2 --case 4x8x2 --new-tokens 2 --round-trip 0.01",
    "sst2_epoch": "--threads 1 --hidden 64 --blocks 1 --files train.jsonl --limit 24 --batch-size 4 --pre-seq-len 2",
    "training_step": f"{TINY} --blocks 1 --cases 4x8x2",
    "wire_precision": "--hidden 64 --blocks 2 --case 4x8x2 --batches 1",
}
"""The smallest sizes of each. The other modules of benchmarks are what these commands start or import."""


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    """Benchmarks set the number of threads of their process, which here is that of other tests too."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a benchmark as its command line does and gives the rows that it saved."""

    def run(name: str, options: str = "", *more: str) -> list[Any]:
        command = typer.Typer()
        command.command()(importlib.import_module(f"benchmarks.{name}").main)
        output = [] if name == "churn" else ["--output", str(tmp_path / "rows.json")]
        result = CliRunner().invoke(command, [*options.split(), *more, *output], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "rows.json").read_text()) if output else result.output.splitlines()

    return run


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A folder with a few sentences of 1 to 30 words, as SST-2 is stored."""
    lines = [{"sentence": "a moving film " * (1 + n % 10), "label": n % 2} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_every_module_is_imported_and_every_command_has_its_sizes() -> None:
    commands = []
    for name in MODULES:
        module = importlib.import_module(f"benchmarks.{name}")
        if getattr(getattr(module, "main", None), "__module__", None) == module.__name__:
            commands.append(name)
    assert commands == list(COMMANDS)


_WITH_TESTS_OF_THEIR_OWN = (
    "churn", "families", "large_model", "quality", "quantization", "sst2_epoch", "wire_precision",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in _WITH_TESTS_OF_THEIR_OWN])
def test_a_command_runs(name: str, run: Run) -> None:
    rows = run(name, COMMANDS[name])
    assert rows
    for row in rows:
        case, *numbers = row.values() if isinstance(row, dict) else row
        assert isinstance(case, str)
        assert len(numbers) >= 2
        assert all(math.isfinite(number) and number >= 0 for number in numbers)


@pytest.mark.slow
def test_a_lora_step_moves_what_it_needs(run: Run) -> None:
    (row,) = run("lora_step", "--repeats 1 --threads 1 --hidden 256 --blocks 2 --cases 16x32x2")
    assert row["bytes_needed"] < row["bytes_moved"] < 1.05 * row["bytes_needed"]


@pytest.mark.slow
def test_a_large_models_memory_is_read(run: Run, tmp_path: Path) -> None:
    *servers, client = run("large_model", COMMANDS["large_model"], str(tmp_path / "model"))
    assert [row["blocks"] for row in servers] == ["0:1", "1:2"]
    assert all(row["peak"] > 0 and row["ready"] > 0 for row in servers)
    assert client["peak"] > 0
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_quantised_weights_are_smaller_and_served_exactly(run: Run) -> None:
    served = {row["weights"]: row for row in run("quantization", COMMANDS["quantization"]) if "logits" in row}
    assert served["nf4"]["bytes"] < served["int8"]["bytes"] < served["none"]["bytes"]
    assert all(row["logits"] < 1e-4 for row in served.values())


@pytest.mark.slow
def test_churn_loses_no_step(run: Run) -> None:
    output = run("churn", COMMANDS["churn"])
    assert any("none lost" in line for line in output)


@pytest.mark.slow
def test_families_are_exact_or_refused_with_a_reason(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "families.md"
    other = tmp_path / "other.json"
    other.write_text(
        json.dumps([{"family": "llama", "training": "exact", "sessions": "refused", "note": "", "version": "5.0"}])
    )
    options = ["--page", str(page), "--beside", str(other)]
    rows = {row["family"]: row for row in run("families", COMMANDS["families"], *options)}
    assert logging.getLogger("petals_lightning").level == logging.NOTSET  # as it was before
    found = {family: (row["training"], row["sessions"]) for family, row in rows.items()}
    assert found == {
        "llama": ("exact", "exact"), "gemma3": ("exact", "exact"), "qwen3_next": ("exact", "refused"),
        "rwkv": ("refused", "refused"),
    }  # fmt: skip
    assert "another kind of state" in rows["rwkv"]["note"]
    lines = page.read_text().splitlines()
    assert "| family | training | sessions | with 5.0 | note |" in lines
    assert "| llama | exact | exact | exact, refused |  |" in lines
    assert "| gemma3 | exact | exact | not in it |  |" in lines


@pytest.mark.slow
def test_wire_precision_is_exact_in_float32_only(run: Run) -> None:
    rows = {row["wire_dtype"]: row for row in run("wire_precision", COMMANDS["wire_precision"])}
    assert rows["float32"]["deep"] < 1e-5 < 1e-3 < rows["bfloat16"]["deep"]


@pytest.mark.slow
def test_sst2_epoch_moves_fewer_bytes_than_without_its_savings(run: Run, sentences: Path) -> None:
    (row,) = run("sst2_epoch", COMMANDS["sst2_epoch"], "--data", str(sentences))
    assert row["samples"] == 24
    assert row["ours_bytes"] < row["off_bytes"]


def test_sst2_epoch_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"train\.jsonl is not there: give the folder of SST-2 with --data"):
        sst2_epoch.read_samples(tmp_path / "train.jsonl", vocabulary=100)


@pytest.mark.slow
def test_quality_goes_on_where_it_ended(run: Run, tmp_path: Path) -> None:
    for name, folder in {"cr": REVIEWS_DIR, "dialogue/self_dialogue": DIALOGUES_DIR}.items():
        shutil.copytree(folder, tmp_path / "data" / name)
    sizes = [*COMMANDS["quality"].split(), "--model", str(MODEL_DIR), "--accelerator", "cpu", "--shots", "2"]
    few = run("quality", str(tmp_path / "data"), *sizes, "--methods", "head,verbalized_ptune,lora", "--starts", "text")
    rows = run("quality", str(tmp_path / "data"), *sizes, "--starts", "text,vocabulary", "--seeds", "0")
    assert rows[: len(few)] == few  # with the seconds that they took
    done = [(row["set"], row["method"], row["start"]) for row in rows]
    assert len(few) == 2 * (3 + 1)
    assert set(done) >= {("cr", "head", None), ("cr", "lora", None), ("dialogue", "lora", None)}
    prompts = {(name, method, start) for name, method, start in done if start}
    assert prompts == {
        (name, method, start)
        for start in ("text", "vocabulary")
        for name, methods in {"cr": quality.PROMPTS, "dialogue": quality.MODES}.items()
        for method in methods
    }
    parameters = {(row["set"], row["method"]): row["parameters"] for row in rows}
    assert parameters["cr", "verbalized_ptune"] < parameters["cr", "ptune"] < parameters["cr", "deep_ptune"]
    assert parameters["dialogue", "lora"] < parameters["cr", "lora"]  # which has a head
    for row in rows:
        assert ("perplexity" in row) == (row["set"] == "dialogue") != ("matthews" in row)


def test_quality_says_which_data_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quality.main(tmp_path, output=tmp_path / "rows.json", threads=torch.get_num_threads())
    assert f"sst2 is left out: {tmp_path / 'sst2'} has no train.jsonl" in capsys.readouterr().out


@pytest.mark.slow
def test_a_mechanism_is_switched_off(run: Run) -> None:
    time, size = run("mechanisms", COMMANDS["mechanisms"].replace("last", "rows"))
    assert time[0] == "4x8x2, rows only, ms"
    assert size[1] > size[2]  # all positions weigh more


@pytest.mark.slow
def test_quality_through_a_swarm_is_the_same(run: Run, tmp_path: Path) -> None:
    """The client's LoRA against PEFT's, which is what the local rows of `lora` are."""
    shutil.copytree(REVIEWS_DIR, tmp_path / "data" / "cr")
    sizes = [*COMMANDS["quality"].split(), "--sets", "cr", "--seeds", "0", "--model", str(MODEL_DIR)]
    sizes += ["--accelerator", "cpu", "--shots", "4", "--starts", "vocabulary", "--methods", "lora,deep_ptune,prefix"]
    rows = run("quality", str(tmp_path / "data"), *sizes, "--steps", "4")
    rows = run("quality", str(tmp_path / "data"), *sizes, "--steps", "4", "--servers", "2")
    local, remote = ([row for row in rows if row["servers"] == servers] for servers in (0, 2))
    assert [row["method"] for row in local] == [row["method"] for row in remote] == ["lora", "deep_ptune", "prefix"]
    for here, there in zip(local, remote, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-4), here["method"]
        assert there["parameters"] == here["parameters"]


@pytest.mark.slow
def test_quality_keeps_what_another_process_has_written_meanwhile(tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(REVIEWS_DIR, tmp_path / "data" / "cr")
    output, honest = tmp_path / "rows.json", quality.run_case

    def beside_another(*arguments: Any) -> dict[str, Any]:
        row = honest(*arguments)
        output.write_text(json.dumps([{**row, "seed": 7}]))
        return row

    monkeypatch.setattr(quality, "run_case", beside_another)
    quality.main(
        tmp_path / "data", str(MODEL_DIR), output, sets="cr", methods="head", shots="2", seeds="0", steps=1,
        batch_size=2, limit=4, threads=torch.get_num_threads(), accelerator="cpu",
    )  # fmt: skip
    assert [row["seed"] for row in json.loads(output.read_text())] == [7, 0]
