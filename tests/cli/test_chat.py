"""`petals-lightning generate` and `chat` as their users run them, against a server in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_lightning.data.dialogue_format import DialogueFormat, Message
from petals_lightning.hf.loading import quiet_transformers
from petals_lightning.server.access import AccessRules
from tests.swarms import PREFIX, InProcessSwarm
from tests.text_models import save_tiny_text_model


def run_command(
    command: str, folder: Path, swarm: InProcessSwarm, *arguments: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "petals_lightning.cli.main", command, str(folder), *arguments,
         "--dht-prefix", PREFIX, "--initial-peers", swarm.initial_peers[0]],
        input=stdin, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def served(tmp_path, start_swarm):
    folder = save_tiny_text_model(tmp_path / "model")
    swarm = start_swarm(folder, [(0, 2), (2, 4)])

    def run(command: str, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return run_command(command, folder, swarm, *arguments, stdin=stdin)

    with quiet_transformers():
        local = AutoModelForCausalLM.from_pretrained(str(folder))
    return run, local, AutoTokenizer.from_pretrained(folder), tmp_path


def continue_greedily(local, ids: list[int], count: int, eos: int | None = None) -> list[int]:
    tokens = torch.tensor([ids])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos}
    return local.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(ids) :].tolist()


def test_generate_prints_the_continuation(served):
    run, local, tokenizer, _ = served
    expected = tokenizer.decode(continue_greedily(local, tokenizer("w1 w2 w3")["input_ids"], 6))
    done = run("generate", "--max-new-tokens", "6", stdin="w1 w2 w3\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"


def test_a_private_swarm_is_entered_with_its_token(tmp_path, start_swarm):
    folder, token = save_tiny_text_model(tmp_path / "model"), tmp_path / "token"
    token.write_text("x" * 40)
    swarm = start_swarm(folder, [(0, 4)], rules=AccessRules(token="x" * 40))
    done = run_command("generate", folder, swarm, "w1 w2", "--max-new-tokens", "2", "--token-file", str(token))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_piped_chat_answers_line_by_line(served):
    run, local, tokenizer, folder = served
    form, messages, answers = DialogueFormat(tokenizer), [], []
    for text in ("w1 w2", "w5"):
        messages.append(Message(role="user", content=text))
        said = continue_greedily(local, form.prompt(messages), 5, tokenizer.eos_token_id)
        answers.append(form.decode(said))
        messages.append(Message(role="assistant", content=answers[-1]))
    saved = folder / "talk.jsonl"
    lines = ["w1 w2", "w9 w9", "/undo", "w5", f"/save {saved}", "/reset", "w1 w2", "/unknown"]
    done = run("chat", "--temperature", "0", "--max-new-tokens", "5", stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    spoken = done.stdout.splitlines()
    assert [spoken[0], spoken[2], spoken[3]] == [answers[0], answers[1], answers[0]]
    assert len(spoken) == 4
    assert json.loads(saved.read_text())["messages"] == messages
    assert "/undo  " in done.stderr, "an unknown command shows the help"


def test_mistakes_are_one_line(served):
    run, _, _, folder = served
    for arguments, words in (
        (("--prompts", str(folder)), "has no prompts.json"),
        (("--temperature", "-1"), "--temperature is -1: it must be 0 or more"),
    ):
        done = run("chat", *arguments, stdin="w1")
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
