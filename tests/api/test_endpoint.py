"""The endpoint as the real `openai` client sees it, in front of a real swarm on loopback with the bundled model."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_lightning.data.dialogue_format import DialogueFormat, Message
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.sample import MODEL_DIR
from tests.helpers.endpoints import Endpoint, save_tuned_parts
from tools.testing.forks import run_command
from tools.testing.swarms import PREFIX, InProcessSwarm

pytestmark = pytest.mark.slow

TEXTS = ["the plot was dull .", "the soup was superb and", "it left me", "my wife enjoyed the bread . what is"]


@pytest.fixture(scope="module")
def swarm() -> Iterator[InProcessSwarm]:
    with InProcessSwarm(MODEL_DIR, [(0, 4), (0, 2), (2, 4)]) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_tuned_parts(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def endpoint(swarm: InProcessSwarm, tuned: dict[str, Path]) -> Iterator[Endpoint]:
    names = [f"--{kind}=my-{kind}={folder}" for kind, folder in tuned.items()]
    endpoint = Endpoint(swarm.initial_peers, *names, "--idle-timeout", "600")
    yield endpoint
    endpoint.stop()


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> openai.OpenAI:
    return endpoint.client()


def generated(swarm: InProcessSwarm, text: str, *options: str) -> str:
    """What `petals-lightning generate` prints."""
    done = run_command(
        "generate", str(MODEL_DIR), text, "--dht-prefix", PREFIX, "--initial-peers", *swarm.initial_peers, *options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


@pytest.mark.parametrize("name", ["model", "my-prompts", "my-adapter"])
def test_texts_are_those_of_generate(name, swarm, tuned, client):
    kind = name.removeprefix("my-")
    chosen = (f"--{kind}", str(tuned[kind])) if kind in tuned else ()
    expected = generated(swarm, TEXTS[0], "--max-new-tokens", "12", *chosen)
    options: Any = {"model": name, "prompt": TEXTS[0], "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**options)
    assert answer.choices[0].text == expected
    assert answer.usage.completion_tokens <= 12
    streamed = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == expected
    assert streamed[-1].usage.total_tokens == answer.usage.total_tokens


def test_draws_are_those_of_generate_with_the_same_seed(swarm, client):
    drawn = [generated(swarm, TEXTS[1], "--temperature", "1.5", "--seed", seed) for seed in ("3", "4")]
    assert drawn[0] != drawn[1]
    options: Any = {"model": "model", "prompt": TEXTS[1], "max_tokens": 64, "temperature": 1.5}

    def ask(seed: int) -> list[str]:
        return [choice.text for choice in client.completions.create(**options, seed=seed, n=2).choices]

    with ThreadPoolExecutor(4) as threads:  # the draws of one do not disturb another's
        assert list(threads.map(ask, [3, 4, 3, 3])) == [drawn, [drawn[1], ask(5)[0]], drawn, drawn]


def test_a_conversation_is_what_the_template_says_and_is_not_sent_again(client):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    form, messages = DialogueFormat(tokenizer), [Message(role="system", content="be short")]
    with quiet_transformers():
        local: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    known = 0
    for text in ("the plot was dull . what is your verdict ?", "is it thumbs up or down ?", "and the soup ?"):
        messages.append(Message(role="user", content=text))
        ids = torch.tensor([form.prompt(messages)])
        said = local.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
            eos_token_id=form.ends_of_answers([tokenizer.eos_token_id]), pad_token_id=0,
        )[0, ids.shape[1] :]  # fmt: skip
        answer = client.chat.completions.create(
            model="model", messages=messages, temperature=0, max_completion_tokens=20
        )
        content = answer.choices[0].message.content
        assert content == form.decode(said.tolist())
        assert answer.usage.prompt_tokens == ids.shape[1]
        assert answer.usage.completion_tokens == len(said)
        assert answer.choices[0].finish_reason == ("stop" if len(said) < 20 else "length")
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached >= known, "what was said so far is still on the servers"
        known = ids.shape[1] - 2
        messages.append(Message(role="assistant", content=content))


def test_stop_texts_and_lengths(client):
    options: Any = {"model": "model", "prompt": TEXTS[0], "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(**options).choices[0].text
    word = whole.split()[2]
    for stop in (word, [word, "never"]):
        answer = client.completions.create(**options, stop=stop)
        assert answer.choices[0].text == whole[: whole.index(word)]
        assert answer.choices[0].finish_reason == "stop"
    chunks = list(client.completions.create(**options, stop=word, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(word)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    short = client.completions.create(**options | {"max_tokens": 1}).choices[0]
    assert (short.finish_reason, whole.startswith(short.text)) == ("length", True)


def test_probabilities_are_the_models(client):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    with quiet_transformers():
        local: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    logprobs = local(ids).logits[0, -1].log_softmax(-1)
    best = logprobs.topk(3)
    options: Any = {"model": "model", "temperature": 0, "max_tokens": 2}
    found = client.completions.create(**options, prompt=TEXTS[0], logprobs=3).choices[0].logprobs
    assert found.token_logprobs[0] == pytest.approx(best.values[0].item(), abs=1e-4)
    assert sorted(found.top_logprobs[0].values(), reverse=True) == pytest.approx(best.values.tolist(), abs=1e-4)
    assert found.top_logprobs[0][found.tokens[0]] == found.token_logprobs[0]
    assert found.text_offset == [0, len(found.tokens[0])]
    chat = {"messages": [{"role": "user", "content": TEXTS[0]}], "logprobs": True, "top_logprobs": 2}
    content = client.chat.completions.create(**options, **chat).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in client.chat.completions.create(**options, **chat, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=1e-5)
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(bytes(entry.bytes).decode() == entry.token for entry in content)


def test_models_and_refusals_are_in_openais_form(client, endpoint):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["model", "my-prompts", "my-adapter"]
    assert client.models.retrieve("my-prompts").parent == "model"
    with pytest.raises(openai.NotFoundError, match="there are: model, my-prompts, my-adapter") as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 5000}, "asks for 5000 more; 'model' has room for"),
        ({"prompt": []}, "prompt"),
        ({"extra_body": {"best_off": 1}}, "best_off: Extra inputs are not permitted"),
        ({"frequency_penalty": 1}, "frequency_penalty=1 is not supported here"),
        ({"prompt": [10**9]}, "the model has embeddings for 0…"),
    ]
    for fields, words in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**{"model": "model", "prompt": "a", **fields})
        assert words in refused.value.message, refused.value.message
        assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="role and content"):
        client.chat.completions.create(model="model", messages=[{"role": "robot", "content": "a"}])
    for path in ("/v1/embeddings", "/v1/completions"):
        answer = httpx.get(endpoint.url + path)
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(endpoint.url + "/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_twenty_streams_at_once_are_each_their_own(client):
    """Their texts are those of one after another."""
    asked: list[dict[str, Any]] = [
        {
            "model": ("model", "my-prompts", "my-adapter")[number % 3],
            "prompt": f"{TEXTS[number % 4]} {number}",
            "max_tokens": 24,
            "temperature": (0, 1.2)[number % 2],
            "seed": number,
        }
        for number in range(20)
    ]
    together = threading.Barrier(20, timeout=120)

    def stream(options: dict[str, Any]) -> str:
        chunks = client.completions.create(**options, stream=True)
        together.wait()
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(20) as threads:
        streamed = list(threads.map(stream, asked))
    assert streamed == [client.completions.create(**options).choices[0].text for options in asked]
    assert len(set(streamed)) > 10


def sessions_of(swarm: InProcessSwarm) -> int:
    return sum(len(server.resources.caches) for server in swarm.servers)


def wait_until(holds: Callable[[], bool], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def positions_of(swarm: InProcessSwarm) -> int:
    return sum(server.resources.positions for server in swarm.servers)


def test_a_caller_who_leaves_frees_his_session(swarm):
    """And what he asked for is not generated to its end."""
    endpoint = Endpoint(swarm.initial_peers, "--idle-sessions", "0")
    body = {"model": "model", "prompt": TEXTS[0], "max_tokens": 200, "temperature": 2, "seed": 2}
    headers = {"Content-Type": "application/json"}
    try:
        sessions, before = sessions_of(swarm), positions_of(swarm)
        (choice,) = endpoint.client().completions.create(**body).choices  # type: ignore[call-overload]
        assert choice.finish_reason == "length"
        whole = positions_of(swarm) - before
        for is_streamed in (True, False):
            before = positions_of(swarm)
            connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"))
            connection.request("POST", "/v1/completions", json.dumps(body | {"stream": is_streamed}), headers)
            wait_until(lambda: sessions_of(swarm) > sessions)
            connection.close()
            wait_until(lambda: sessions_of(swarm) == sessions)
            assert positions_of(swarm) - before < whole / 2
    finally:
        endpoint.stop()


def test_a_lost_server_is_not_noticed(start_swarm):
    swarm = start_swarm(MODEL_DIR, [(0, 4), (0, 4)])
    endpoint = Endpoint(swarm.initial_peers, "--idle-sessions", "0")
    try:
        options: Any = {"model": "model", "prompt": TEXTS[0], "max_tokens": 200, "temperature": 2, "seed": 2}
        expected = endpoint.client().completions.create(**options).choices[0].text
        chunks = iter(endpoint.client().completions.create(**options, stream=True))
        said = next(chunks).choices[0].text
        (used,) = (server for server in swarm.servers if server.resources.caches.num_bytes)
        used.stop(timeout=0.1)
        swarm.servers.remove(used)
        said += "".join(chunk.choices[0].text for chunk in chunks)
        assert said == expected
        assert any("not using it" in line for line in endpoint.lines), "the log has it"
    finally:
        endpoint.stop()


def test_a_key_is_needed_beyond_this_machine(swarm, tmp_path):
    arguments = ["api", str(MODEL_DIR), "--dht-prefix", PREFIX, "--initial-peers", *swarm.initial_peers]
    done = run_command(*arguments, "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --host 0.0.0.0 lets other machines in: give --api-key-file")
    assert done.stderr.count("\n") == 1
    keys = tmp_path / "keys"
    keys.write_text("first\n\nsecond\n")
    endpoint = Endpoint(swarm.initial_peers, "--host", "0.0.0.0", "--api-key-file", str(keys))
    try:
        for key in ("wrong", "firs", "first second"):
            with pytest.raises(openai.AuthenticationError) as refused:
                endpoint.client(key).models.list()
            assert refused.value.code == "invalid_api_key"
        assert len(endpoint.client("second").models.list().data) == 1
        for path in ("/api/swarm", "/api/run", "/api/about"):
            assert httpx.get(endpoint.url + path).status_code == 401
        assert httpx.get(endpoint.url).status_code == 200, "the page asks for the key"
    finally:
        endpoint.stop()
