"""`petals-lightning generate` and `chat` as their users run them, against a server in this process."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_lightning.cli.generation import Terminal
from petals_lightning.data.dialogue_format import DialogueFormat, Message
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.sample import MODEL_DIR
from petals_lightning.server.access.rules import AccessRules
from tests.helpers.chat_templates import GEMMA
from tests.helpers.lora import factors_of_peft, move_off_zero
from tests.helpers.text_models import save_tiny_text_model
from tools.testing.forks import run_command
from tools.testing.swarms import PREFIX, InProcessSwarm


def run_in(
    swarm: InProcessSwarm, command: str, folder: Path, *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    peers = [peer for server in swarm.servers for peer in server.node.visible_maddrs()]
    return run_command(command, str(folder), *arguments, "--dht-prefix", PREFIX, "--initial-peers", *peers, stdin=stdin)


@pytest.fixture
def served(tmp_path, start_swarm):
    folder = save_tiny_text_model(tmp_path / "model")
    swarm = start_swarm(folder, [(0, 2), (2, 4)])

    def run(command: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return run_in(swarm, command, folder, *arguments, stdin=stdin)

    with quiet_transformers():
        local = AutoModelForCausalLM.from_pretrained(str(folder))
    return run, local, AutoTokenizer.from_pretrained(folder), tmp_path


def continue_greedily(local, ids: list[int], count: int, eos: int | None = None) -> list[int]:
    tokens = torch.tensor([ids])
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": eos}
    return local.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)[0, len(ids) :].tolist()


@pytest.mark.slow
def test_generate_prints_the_continuation(served):
    run, local, tokenizer, _ = served
    expected = tokenizer.decode(continue_greedily(local, tokenizer("w1 w2 w3")["input_ids"], 6))
    done = run("generate", "--max-new-tokens", "6", stdin="w1 w2 w3\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected + "\n"


@pytest.mark.slow
def test_a_private_swarm_is_entered_with_its_token(tmp_path, start_swarm):
    folder, token = save_tiny_text_model(tmp_path / "model"), tmp_path / "token"
    token.write_text("x" * 40)
    swarm = start_swarm(folder, [(0, 4)], rules=AccessRules(token="x" * 40))
    done = run_in(swarm, "generate", folder, "w1 w2", "--max-new-tokens", "2", "--token-file", str(token))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--adapter", "--active-adapter", "held by servers"])
def test_an_adapter_that_peft_has_made_talks_through_the_swarm_as_it_does_locally(option, tmp_path, start_swarm):
    """The bundled model, with LoRA of some size in all linear modules."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with quiet_transformers():
        local = get_peft_model(AutoModelForCausalLM.from_pretrained(str(MODEL_DIR)), config).eval()
    move_off_zero(dict(factors_of_peft(local)), 1.0)
    folder = tmp_path / "polite"
    local.save_pretrained(str(folder))
    is_held = option == "held by servers"
    swarm = start_swarm(MODEL_DIR, [(0, 1), (1, 4)], adapters=[[folder]] * 2 if is_held else ())
    choice = ["--active-adapter", "polite"] if is_held else [option, str(folder)]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text, form = "the film was", DialogueFormat(tokenizer)
    expected = continue_greedily(local, tokenizer(text)["input_ids"], 8)
    with local.disable_adapter():
        assert expected != continue_greedily(local, tokenizer(text)["input_ids"], 8), "the test is blind"
    done = run_in(swarm, "generate", MODEL_DIR, text, "--max-new-tokens", "8", *choice)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tokenizer.decode(expected, skip_special_tokens=True)}\n"
    ids = form.prompt([Message(role="user", content=text)])
    answer = form.decode(continue_greedily(local, ids, 8, tokenizer.eos_token_id))
    given = ["--temperature", "0", "--max-new-tokens", "8", *choice]
    done = run_in(swarm, "chat", MODEL_DIR, *given, stdin=text + "\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer


class TerminalProcess:
    """A command on a terminal of its own."""

    def __init__(self, *command: str):
        self._master, terminal = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""

    def wait_for(self, text: str, timeout: float = 90.0) -> str:
        """What was shown since the last call, up to `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.shown:
            ready, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{text!r} never came: {self.shown!r}"
            self.shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown + os.read(self._master, 4096).decode())
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_until_it_waits(self, timeout: float = 90.0) -> None:
        """Returns when keys are waited for. readline looks at a signal that comes between its prompt and that only
        with the next key, and a loaded machine may pause it just there."""
        deadline = time.monotonic() + timeout
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.mark.slow
def test_a_chat_in_a_terminal(tmp_path, start_swarm):
    """A lost server is one line and no lost conversation; Ctrl-D leaves, Ctrl-C at the prompt does not."""
    folder = save_tiny_text_model(tmp_path / "model")
    swarm = start_swarm(folder, [(0, 2), (2, 4), (2, 4)])
    terminal = TerminalProcess(
        sys.executable, "-m", "petals_lightning.cli.main", "chat", str(folder), "--dht-prefix", PREFIX,
        "--initial-peers", swarm.initial_peers[0], "--temperature", "0", "--max-new-tokens", "5",
    )  # fmt: skip
    try:
        greeting = terminal.wait_for("> ")
        assert "4 blocks on 2 servers; /help lists commands" in greeting
        assert "an answer ends with </s>" in greeting
        terminal.type("w1 w2\n")
        first = terminal.wait_for("> ")
        assert "tokens/s" in first
        terminal.wait_until_it_waits()
        terminal.type("\x03")
        assert "/exit or Ctrl-D leaves" in terminal.wait_for("> ")
        caches = [(server, server.resources.caches) for server in swarm.servers[1:]]
        used = [server for server, cache in caches if cache.num_bytes]
        assert len(used) == 1
        used[0].stop(timeout=0.1)
        swarm.servers.remove(used[0])
        terminal.type("/reset\nw1 w2\n")
        again = terminal.wait_for("tokens/s")
        assert said(again) == said(first)
        assert again.count(f"(server …{used[0].node.peer_id.to_base58()[-6:]}") == 1
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()


def said(shown: str) -> str:
    """The answer among what was shown: the line above the count of tokens."""
    lines = [line.strip() for line in shown.splitlines()]
    return lines[next(number for number, line in enumerate(lines) if " tokens" in line) - 1]


def test_notes_are_short_and_wait_for_who_is_typing(monkeypatch, capsys):
    terminal = Terminal()
    peer = "12D3KooWBt1TEMmu9KCXFis1PMoWUQyx2oBxPu4zmEwqWtxk9zEx"
    record = logging.LogRecord("x", logging.WARNING, "", 0, f"server {peer}: lost\n" + "why " * 50, None, None)

    def typing(prompt: str) -> str:
        terminal.emit(record)
        assert capsys.readouterr().err == ""
        return "hello"

    monkeypatch.setattr("builtins.input", typing)
    assert terminal.read_line("> ") == "hello"
    (noted,) = capsys.readouterr().err.splitlines()
    assert noted.startswith("(server …xk9zEx: lost why why")
    assert noted.endswith("…)")
    assert len(noted) <= 92


@pytest.mark.slow
def test_mistakes_are_one_line(served):
    run, _, _, folder = served
    (folder / "model" / "chat_template.jinja").write_text(GEMMA)
    for arguments, words in (
        (("--system", "w2"), "the chat template refuses the dialogue (System role not supported); "),
        (("--prompts", str(folder)), "has no prompts.json"),
        (("--temperature", "-1"), "--temperature is -1: it must be 0 or more"),
    ):
        done = run("chat", *arguments, stdin="w1")
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
