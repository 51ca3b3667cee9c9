"""Peak memory of a client and of a server, against their floors.

    python -m benchmarks.memory

Peaks are VmHWM of real processes (Linux), in MiB.

Client: trains through a server. Its floor is a process that imports the same, holds tensors of the same sizes
(embeddings, head, prompts, AdamW's state, a batch) and has made an optimizer's step. Twice, with few blocks and with
many: what a client needs must not depend on blocks, which it does not have.

Server: growth over what it had when it was ready. Sessions fill what one client may take of its `--cache-memory`, and
clients train, leaving forwards without a backward until `--graph-memory` is full. Beside these budgets it needs room
for the requests under way: that is measured as the growth, under the same training, of a server that may keep neither
graphs nor sessions.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.options import Case, Output, parse_case
from benchmarks.rounds import Row, report
from benchmarks.servers import running_server
from benchmarks.swarm import batch_of, classifier, optimizer_of, peak_memory, save_random_llama
from benchmarks.training_client import Client
from petals_lightning.models import remote_blocks
from petals_lightning.server.access.limits import room_for

MIB = 2**20
SESSION_BATCH, SESSION_LENGTH = 4, 256


def hold(hidden: int, vocabulary: int, case: str, answer: Any) -> None:
    """The floor of a client, in a process of its own: its tensors and nothing done with them but a step."""
    torch.set_num_threads(1)
    batch_size, tokens, pre_seq_len = parse_case(case)
    embedding = torch.nn.Embedding.from_pretrained(torch.full((vocabulary, hidden), 0.5))
    trained = [torch.nn.Parameter(torch.zeros(shape, hidden)) for shape in (pre_seq_len, 2)]
    optimizer = torch.optim.AdamW(trained)
    for _ in range(2):
        states = embedding(batch_of(batch_size, tokens)["input_ids"])
        torch.nn.functional.cross_entropy(
            (states.mean(1) + trained[0].mean(0)) @ trained[1].T, torch.zeros(batch_size, dtype=torch.long)
        ).backward()
        optimizer.step()
    answer.put(peak_memory(os.getpid()))


def client_peak(folder: str, maddr: str, case: str, seconds: float) -> float:
    """MiB that a client has had at most after so long a training."""
    client = Client(folder, maddr, case, "ptune")
    client.wait_until_ready()
    client.start(time.time() + seconds)
    _, peak = client.done()
    client.close()
    return peak / MIB


def measure_client(hidden: int, vocabulary: int, counts: tuple[int, int], case: str, seconds: float) -> list[Row]:
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.Queue()
    process = spawn.Process(target=hold, args=(hidden, vocabulary, case, answer))
    process.start()
    floor = answer.get() / MIB
    process.join()
    peaks = []
    for blocks in counts:
        with tempfile.TemporaryDirectory() as folder:
            save_random_llama(folder, hidden=hidden, blocks=blocks, dtype="float32", vocabulary=vocabulary)
            with running_server(folder, 1) as server:
                peaks.append(client_peak(folder, server.maddr, case, seconds))
    few, many = counts
    return [
        (f"client of {few} blocks, against its floor", peaks[0], floor),
        (f"client of {many} blocks, against one of {few}", peaks[1], peaks[0]),
    ]


def load(folder: str, maddr: str, case: str, rounds: int, sessions: int) -> None:
    """Trains with three clients, of whose forwards every second has no backward, while sessions are open."""
    batch_size, tokens, pre_seq_len = parse_case(case)
    models = [classifier(folder, maddr, pre_seq_len) for _ in range(3)]
    hidden = models[0].get_input_embeddings()(batch_of(SESSION_BATCH, SESSION_LENGTH)["input_ids"])
    talks = [remote_blocks(models[0]).inference_session(max_length=SESSION_LENGTH) for _ in range(sessions)]
    for talk in talks:
        talk.step(hidden)
    optimizers = [optimizer_of(model) for model in models]
    for number in range(rounds):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = model(**batch_of(batch_size, tokens)).loss
            if number % 2:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for talk in talks:
        talk.close()
    for model in models:
        remote_blocks(model).close()


def server_growth(folder: str, case: str, gib: float, rounds: int, sessions: int) -> float:
    """MiB by which the peak of a server under load is over what it had when it was ready."""
    with running_server(folder, 1, "--graph-memory", f"{gib}", "--cache-memory", f"{gib}") as server:
        ready = psutil.Process(server.pid).memory_info().rss
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak begins anew: loading is over
        load(folder, server.maddr, case, rounds, sessions)
        return (peak_memory(server.pid) - ready) / MIB


def measure_server(hidden: int, blocks: int, case: str, gib: float, rounds: int) -> list[Row]:
    session = SESSION_BATCH * SESSION_LENGTH * blocks * 2 * hidden * 4
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, hidden=hidden, blocks=blocks, dtype="float32")
        full = server_growth(folder, case, gib, rounds, room_for(0, taken=0, budget=int(gib * 2**30)) // session)
        empty = server_growth(folder, case, 0, rounds, 0)
    budget = 2 * gib * 1024
    return [
        ("server that may keep nothing: growth, against its load's", empty, empty),
        (f"server: growth, against {budget:.0f} MiB of budgets and the row above", full, budget + empty),
    ]


def main(
    case: Case = "16x64x16",
    vocabulary: Annotated[int, typer.Option(help="tokens whose embeddings the client holds")] = 100_000,
    hidden: int = 512,
    few: Annotated[int, typer.Option(help="blocks of the smaller model")] = 2,
    many: Annotated[int, typer.Option(help="blocks of the larger model")] = 16,
    budget: Annotated[float, typer.Option(help="GiB that the server may take for graphs, and for caches")] = 0.25,
    rounds: Annotated[int, typer.Option(help="of the three clients that load the server")] = 16,
    seconds: Annotated[float, typer.Option(help="that each client trains whose peak is measured")] = 3.0,
    output: Output = None,
) -> None:
    """Prints peaks and floors in MiB."""
    torch.set_num_threads(1)
    rows = measure_client(hidden, vocabulary, (few, many), case, seconds)
    rows += measure_server(hidden, few, case, budget, rounds)
    report(f"peak memory, hidden {hidden}, float32, {case}", ("MiB", "floor or budget", "ratio"), rows, output)


if __name__ == "__main__":
    typer.run(main)
