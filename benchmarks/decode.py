"""Tokens a second of `generate` through servers on loopback, against local `generate` on the same cores.

    python -m benchmarks.decode                     # the rows of docs/performance.md
    python -m benchmarks.decode --new-tokens 128 --repeats 5
    python -m benchmarks.decode --device cuda --dtype bfloat16 --hidden 4096 --blocks 16

A random Llama (hidden 512, 8 blocks, float32 unless said otherwise). Rounds of both sides alternate in one run and
medians are compared, since the machine may be noisy. Servers are processes of their own, each with as many threads as
the local side; in a chain only one of them computes at a time.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.options import Chains, Device, Output, parse_numbers
from benchmarks.rounds import Row, alternate, report
from benchmarks.servers import even_spans, running_chain
from benchmarks.swarm import PREFIX, save_random_llama
from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks


def load(folder: str, maddr: str, device: torch.device | str, **options: Any) -> Any:
    """The distributed model."""
    model: Any = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=[maddr], dht_prefix=PREFIX, **options
    )
    return model.to(device)


def generate(model: Any, prompt: torch.Tensor, new_tokens: int) -> float:
    """Seconds of one greedy `generate`."""
    began = time.perf_counter()
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return time.perf_counter() - began


def rounds_of(models: dict[str, Any], prompt: torch.Tensor, new_tokens: int) -> dict[str, Callable[[], float]]:
    return {name: partial(generate, model, prompt, new_tokens) for name, model in models.items()}


def generate_together(models: list[Any], prompts: list[torch.Tensor], new_tokens: int) -> tuple[float, float]:
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
) -> list[Row]:
    """A row for each number of sessions, against one; their prompts differ in length, and each is a peer of its own."""
    models = [load(folder, maddr, prompt.device) for _ in range(max(sessions))]
    prompts = [prompt[:, : max(prompt.shape[1] - index, 1)] for index in range(len(models))]
    evenness: dict[int, list[float]] = {count: [] for count in sessions}

    def run(count: int) -> float:
        elapsed, even = generate_together(models[:count], prompts, new_tokens)
        evenness.setdefault(count, []).append(even)
        return elapsed

    seconds = alternate({str(count): partial(run, count) for count in (1, *sessions)}, repeats)
    rows: list[Row] = []
    for count in sessions:
        speed, one = count * new_tokens / seconds[str(count)], new_tokens / seconds["1"]
        rows.append((f"{count} sessions at once, tokens/s (against one)", speed, one))
        rows.append(("their slowest against the mean", statistics.median(evenness[count]), 1.0))
    for model in models:
        remote_blocks(model).close()
    return rows


def main(
    hidden: int = 512,
    blocks: int = 8,
    dtype: str = "float32",
    new_tokens: int = 64,
    prefill: int = 512,
    servers: Chains = "1,3",
    sessions: Annotated[str, typer.Option(help="Numbers of sessions at once, with commas.")] = "2,4,8",
    repeats: int = 5,
    threads: int = 2,
    device: Device = "cpu",
    output: Output = None,
) -> None:
    """Prints a row per case."""
    torch.set_num_threads(threads)
    prompt, long_prompt = (torch.randint(1, 1000, (1, length), device=device) for length in (16, prefill))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype=dtype)
        with quiet_transformers():
            local: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        models = {"local": local.eval().to(device)}
        for count in parse_numbers(servers):
            name = f"{count} server{'s' * (count > 1)}"
            with running_chain(folder, even_spans(blocks, count), threads, "--device", device) as maddr:
                models["swarm"] = load(folder, maddr, device)
                if count > 1:
                    models["direct"] = load(folder, maddr, device, server_to_server=False)
                seconds = alternate(rounds_of(models, prompt, new_tokens), repeats)
                speeds = {side: new_tokens / elapsed for side, elapsed in seconds.items()}
                rows.append((f"decode, {name}, tokens/s", speeds["swarm"], speeds["local"]))
                if count > 1:
                    row = f"decode, {name} that do not hand over, tokens/s", speeds["direct"], speeds["local"]
                    rows.append(row)
                    remote_blocks(models.pop("direct")).close()
                else:
                    seconds = alternate(rounds_of(models, long_prompt, 1), repeats)
                    rows.append((f"prefill of {prefill} tokens, ms", seconds["swarm"] * 1e3, seconds["local"] * 1e3))
                    rows += rows_of_sessions(folder, maddr, parse_numbers(sessions), prompt, new_tokens, repeats)
                remote_blocks(models.pop("swarm")).close()
    title = f"Llama {hidden} × {blocks}, {dtype}, {device}, {threads} threads, batch 1, {new_tokens} new tokens"
    report(title, ("swarm", "reference", "swarm / reference"), rows, output)


if __name__ == "__main__":
    typer.run(main)
