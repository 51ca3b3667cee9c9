"""Tokens a second of many streams at once: by `petals-lightning api` over HTTP, against sessions without it.

    python -m benchmarks.api                # 20 streams
    python -m benchmarks.api --streams 5,20 --repeats 5

A random Llama (hidden 512, 8 blocks, float32) on one server on loopback. Both sides are the same `generate` in as many
threads, of one process and one peer: here in this process, there in that of the endpoint, whose text is streamed to
this one and read as it comes. Rounds of both alternate in one run, and medians are compared.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlsplit

import torch
import typer

from benchmarks.options import Output, parse_numbers
from benchmarks.rounds import Row, alternate, report
from benchmarks.servers import running_server
from benchmarks.swarm import PREFIX, save_random_llama
from petals_lightning.hf.tokenizer import load_tokenizer
from petals_lightning.models import AutoDistributedModelForCausalLM
from petals_lightning.sample import MODEL_DIR
from tools.testing.servers import start_http

Prompts = list[list[int]]


@contextmanager
def running_endpoint(model: str, maddr: str, streams: int) -> Iterator[str]:
    """`petals-lightning api` in a process of its own; gives its URL."""
    arguments = ["api", model, "--dht-prefix", PREFIX, "--initial-peers", maddr]
    server, url = start_http(*arguments, "--max-streams", str(streams), "--idle-sessions", "0")
    try:
        yield url
    finally:
        server.stop()


async def read_stream(url: str, prompt: list[int], new_tokens: int) -> int:
    """Tokens of one stream. Plain sockets: the reader must not take the cores that it measures."""
    address = urlsplit(url)
    body = json.dumps(
        {
            "model": "model", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        "POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
        f"Content-Length: {len(body)}", "Connection: close", "", "",
    )  # fmt: skip
    writer.write("\r\n".join(head).encode() + body)
    usage = b""
    while line := await reader.readline():
        if b'"usage":{' in line:
            usage = line
    writer.close()
    return json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"]


def by_http(url: str, prompts: Prompts, new_tokens: int, counts: list[int]) -> float:
    """Seconds of all streams together; their tokens go to `counts`."""

    async def read_all() -> list[int]:
        return await asyncio.gather(*(read_stream(url, prompt, new_tokens) for prompt in prompts))

    began = time.perf_counter()
    counts[:] = asyncio.run(read_all())
    return time.perf_counter() - began


def by_sessions(model: Any, prompts: Prompts, new_tokens: int, counts: list[int]) -> float:
    """The same without HTTP."""

    def generate(prompt: list[int]) -> int:
        with model.inference_session(max_length=len(prompt) + new_tokens):
            output = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        return output.shape[1] - len(prompt)

    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as threads:
        counts[:] = threads.map(generate, prompts)
    return time.perf_counter() - began


def main(
    streams: Annotated[str, typer.Option(help="Numbers of streams at once, with commas.")] = "20",
    hidden: int = 512,
    blocks: int = 8,
    new_tokens: int = 64,
    prompt_tokens: int = 16,
    repeats: int = 5,
    threads: Annotated[int, typer.Option(help="Of the server.")] = 1,
    output: Output = None,
) -> None:
    """Prints a row for each number of streams."""
    numbers, rows = parse_numbers(streams), list[Row]()
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/model"
        tokenizer = load_tokenizer(str(MODEL_DIR))
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype="float32", vocabulary=len(tokenizer))
        tokenizer.save_pretrained(folder)
        with running_server(folder, threads) as server:
            model: Any = AutoDistributedModelForCausalLM.from_pretrained(
                folder, initial_peers=[server.maddr], dht_prefix=PREFIX
            )
            with model, running_endpoint(folder, server.maddr, max(numbers)) as url:
                for number in numbers:
                    prompts = torch.randint(3, len(tokenizer), (number, prompt_tokens)).tolist()
                    counts: dict[str, list[int]] = {"http": [], "sessions": []}
                    sides: dict[str, Callable[[], float]] = {
                        "http": partial(by_http, url, prompts, new_tokens, counts["http"]),
                        "sessions": partial(by_sessions, model, prompts, new_tokens, counts["sessions"]),
                    }
                    seconds = alternate(sides, repeats)
                    if counts["http"] != counts["sessions"]:
                        raise RuntimeError(f"other tokens by HTTP: {counts}")
                    speeds = {side: sum(counts[side]) / seconds[side] for side in sides}
                    rows.append((f"{number} streams at once, tokens/s", speeds["http"], speeds["sessions"]))
    title = f"Llama {hidden} × {blocks}, float32, {prompt_tokens} + {new_tokens} tokens"
    report(title, ("HTTP", "sessions", "HTTP / sessions"), rows, output)


if __name__ == "__main__":
    typer.run(main)
