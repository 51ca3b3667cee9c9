"""Tokens a second of `generate` through servers on loopback, against local `generate` on the same cores.

    python -m benchmarks.decode                     # the rows of docs/performance.md
    python -m benchmarks.decode --new-tokens 128 --repeats 5
    python -m benchmarks.decode --device cuda --dtype bfloat16 --hidden 4096 --blocks 16

A random Llama (hidden 512, 8 blocks, float32 unless said otherwise). Rounds of both sides alternate in one run and
medians are compared, since the machine may be noisy. Servers are processes of their own, each with as many threads as
the local side; in a chain only one of them computes at a time.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.rounds import alternate, print_table, save_rows
from benchmarks.swarm import PREFIX, PROGRAM, save_random_llama, start_server
from petals_lightning.hf.loading import quiet_transformers
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks


def start_chain(
    model: str,
    spans: list[tuple[int, int]],
    threads: int,
    program: tuple[str, ...] = PROGRAM,
    device: str = "cpu",
) -> tuple[list[subprocess.Popen[str]], str]:
    """A server for each span; returns their processes and the first one's address."""
    processes, maddr = [], ""
    for start, end in spans:
        join = ("--initial-peers", maddr) if maddr else ("--new-swarm",)
        options = ("--block-indices", f"{start}:{end}", "--device", device)
        process, own = start_server(model, threads, *options, join=join, program=program)
        processes.append(process)
        maddr = maddr or own
    return processes, maddr


def generate(model: torch.nn.Module, prompt: torch.Tensor, new_tokens: int) -> float:
    """Seconds of one greedy `generate`."""
    began = time.perf_counter()
    model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return time.perf_counter() - began


def rounds_of(
    models: dict[str, torch.nn.Module], prompt: torch.Tensor, new_tokens: int
) -> dict[str, Callable[[], float]]:
    return {name: partial(generate, model, prompt, new_tokens) for name, model in models.items()}


def generate_together(
    models: list[torch.nn.Module], prompts: list[torch.Tensor], new_tokens: int
) -> tuple[float, float]:
    """Seconds of one `generate` of each model, all at once, and the mean of theirs against the slowest one's."""
    seconds = [0.0] * len(models)

    def run(index: int) -> None:
        seconds[index] = generate(models[index], prompts[index], new_tokens)

    began = time.perf_counter()
    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, statistics.mean(seconds) / max(seconds)


def rows_of_sessions(
    folder: str, maddr: str, sessions: list[int], prompt: torch.Tensor, new_tokens: int, repeats: int
) -> list[tuple[str, float, float]]:
    """A row for each number of sessions, against one; their prompts differ in length, and each is a peer of its own."""
    models: list[torch.nn.Module] = []
    for _ in range(max(sessions)):
        model = AutoDistributedModelForCausalLM.from_pretrained(folder, initial_peers=[maddr], dht_prefix=PREFIX)
        models.append(model.to(prompt.device))
    prompts = [prompt[:, : max(prompt.shape[1] - index, 1)] for index in range(len(models))]
    evenness: dict[int, list[float]] = {count: [] for count in sessions}

    def run(count: int) -> float:
        elapsed, even = generate_together(models[:count], prompts, new_tokens)
        evenness.setdefault(count, []).append(even)
        return elapsed

    seconds = alternate({str(count): partial(run, count) for count in (1, *sessions)}, repeats)
    rows = []
    for count in sessions:
        speed, one = count * new_tokens / seconds[str(count)], new_tokens / seconds["1"]
        rows.append((f"{count} sessions at once, tokens/s (against one)", speed, one))
        rows.append(("their slowest against the mean", statistics.median(evenness[count]), 1.0))
    for model in models:
        remote_blocks(model).close()  # type: ignore[union-attr]
    return rows


def main(
    hidden: int = 512,
    blocks: int = 8,
    dtype: str = "float32",
    new_tokens: int = 64,
    prefill: int = 512,
    sessions: Annotated[str, typer.Option(help="Numbers of sessions at once, with commas.")] = "2,4,8",
    repeats: int = 5,
    threads: int = 2,
    device: Annotated[str, typer.Option(help="Of both sides, and of the servers.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Save the rows as JSON.")] = None,
) -> None:
    """Prints a row per case."""
    torch.set_num_threads(threads)
    prompt, long_prompt = (torch.randint(1, 1000, (1, length), device=device) for length in (16, prefill))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype=dtype)
        with quiet_transformers():
            local = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
        cuts = [round(blocks * part / 3) for part in range(4)]
        for name, spans in (("1 server", [(0, blocks)]), ("3 servers", list(itertools.pairwise(cuts)))):
            servers, maddr = start_chain(folder, spans, threads, device=device)
            try:
                remote = AutoDistributedModelForCausalLM.from_pretrained(
                    folder, initial_peers=[maddr], dht_prefix=PREFIX
                )
                models: dict[str, torch.nn.Module] = {"swarm": remote.to(device), "local": local}
                if len(spans) > 1:
                    models["direct"] = AutoDistributedModelForCausalLM.from_pretrained(
                        folder, initial_peers=[maddr], dht_prefix=PREFIX, server_to_server=False
                    ).to(device)
                seconds = alternate(rounds_of(models, prompt, new_tokens), repeats)
                speeds = {side: new_tokens / elapsed for side, elapsed in seconds.items()}
                rows.append((f"decode, {name}, tokens/s", speeds["swarm"], speeds["local"]))
                if "direct" in models:
                    row = f"decode, {name} that do not hand over, tokens/s", speeds["direct"], speeds["local"]
                    rows.append(row)
                    remote_blocks(models["direct"]).close()  # type: ignore[union-attr]
                if len(spans) == 1:
                    seconds = alternate(rounds_of(models, long_prompt, 1), repeats)
                    rows.append((f"prefill of {prefill} tokens, ms", *(seconds[side] * 1e3 for side in models)))
                    counts = [int(count) for count in sessions.split(",")]
                    rows += rows_of_sessions(folder, maddr, counts, prompt, new_tokens, repeats)
                remote_blocks(remote).close()  # type: ignore[union-attr]
            finally:
                for server in servers:
                    server.terminate()
                for server in servers:
                    server.wait()
    title = f"Llama {hidden} × {blocks}, {dtype}, {device}, {threads} threads, batch 1, {new_tokens} new tokens"
    print_table(title, ("swarm", "reference", "swarm / reference"), rows)
    save_rows(rows, output)


if __name__ == "__main__":
    typer.run(main)
