"""Memory of servers with a model of 8B shape, while they load and when they are ready, and of a client that trains.

    python -m benchmarks.large_model /work/8b --quant-type nf4                  # writes 14 GB there first
    python -m benchmarks.large_model /work/8b --servers 2 --case 2x16x8         # half of the blocks each, and two steps

The weights are random, written a block at a time, and deleted at the end unless they were there before. "Peak" and
"ready" are anonymous memory of a server's process, which the kernel cannot take back; "with files" is its largest
resident memory, with mapped parts of files. The client is this process; its peak is the largest anonymous memory while
it loads its part of the model and trains.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.options import Output, parse_case
from benchmarks.rounds import print_table, save_rows
from benchmarks.servers import even_spans
from benchmarks.swarm import PREFIX, VOCABULARY, batch_of, classifier, optimizer_of, peak_memory, run_step
from petals_lightning.models import remote_blocks
from petals_lightning.strategies.server_process import ServerProcess
from tools.testing.servers import start_server

_PERIOD = 0.05  # seconds between two looks at a process


def save_llama(folder: Path, config: LlamaConfig) -> None:
    """A checkpoint in bfloat16: a shard for each block, and one for embeddings and the final norm."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    size, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    keys = head * (config.num_key_value_heads or config.num_attention_heads)
    shapes = {
        "self_attn.q_proj": (size, size), "self_attn.k_proj": (keys, size), "self_attn.v_proj": (keys, size),
        "self_attn.o_proj": (size, size), "mlp.gate_proj": (config.intermediate_size, size),
        "mlp.up_proj": (config.intermediate_size, size), "mlp.down_proj": (size, config.intermediate_size),
    }  # fmt: skip
    names: dict[str, str] = {}
    for block in range(config.num_hidden_layers):
        draw, file = torch.Generator().manual_seed(block), f"model-{block:05}.safetensors"
        tensors = {
            f"model.layers.{block}.{path}.weight": torch.empty(shape, dtype=torch.bfloat16).normal_(
                0, 0.02, generator=draw
            )
            for path, shape in shapes.items()
        } | {
            f"model.layers.{block}.{path}.weight": torch.ones(size, dtype=torch.bfloat16)
            for path in ("input_layernorm", "post_attention_layernorm")
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    rest = {
        "model.embed_tokens.weight": torch.empty(config.vocab_size, size, dtype=torch.bfloat16).normal_(0, 0.02),
        "model.norm.weight": torch.ones(size, dtype=torch.bfloat16),
    }
    save_file(rest, folder / "model-rest.safetensors", metadata={"format": "pt"})
    names |= dict.fromkeys(rest, "model-rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


class _Watch(threading.Thread):
    """The largest anonymous memory of a process within `with`: `peak`."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pid, self._stopped, self.peak = pid, threading.Event(), 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def run(self) -> None:
        while not self._stopped.wait(_PERIOD):
            self.peak = max(self.peak, anonymous_memory(self._pid))

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self.join()


def anonymous_memory(pid: int) -> int:
    """Bytes that a process holds besides pages of files (RssAnon of Linux); 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def train(folder: Path, maddr: str, case: str) -> dict[str, Any]:
    """Two steps of deep prompts and a classifier on the same batch; gives the client's peak and what the steps took."""
    batch_size, tokens, pre_seq_len = parse_case(case)
    with _Watch(os.getpid()) as watch:
        model = classifier(str(folder), maddr, pre_seq_len)
        optimizer, batch = optimizer_of(model), batch_of(batch_size, tokens)
        seconds = [run_step(model, optimizer, batch) for _ in range(2)]
        grads = [weight.grad for weight in model.parameters() if weight.requires_grad]
        if not all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads):
            raise RuntimeError("a gradient is missing, zero or not finite")
        remote_blocks(model).close()
    return {"client": case, "peak": watch.peak, "seconds": seconds}


def main(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint is written; one that is there stays.")],
    quant_type: Annotated[str, typer.Option(help="none, int8 or nf4")] = "nf4",
    hidden: int = 4096,
    intermediate: int = 14336,
    blocks: int = 32,
    servers: Annotated[int, typer.Option(help="They hold equal parts of the blocks, and load one after another.")] = 1,
    case: Annotated[str | None, typer.Option(help="batch×tokens×P of two training steps; none: nobody trains.")] = None,
    threads: int = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Do not delete the checkpoint.")] = False,
    output: Output = None,
) -> None:
    """Prints what servers and client take."""
    heads = max(1, hidden // 128)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), vocab_size=VOCABULARY, max_position_embeddings=8192, pad_token_id=0,
        dtype=torch.bfloat16,
    )  # fmt: skip
    is_new = not folder.exists()
    if is_new:
        save_llama(folder, config)
    rows: list[dict[str, Any]] = []
    trained: dict[str, Any] | None = None
    try:
        with ExitStack() as stack:
            running: list[ServerProcess] = []
            for span in even_spans(blocks, servers):
                options = ("--threads", str(threads), "--dht-prefix", PREFIX, "--quant-type", quant_type)
                server = start_server(str(folder), span, [other.maddr for other in running[:1]], *options)
                stack.callback(server.stop)
                with _Watch(server.pid) as watch:
                    server.wait_until_ready()
                running.append(server)
                rows.append({
                    "weights": quant_type, "blocks": f"{span[0]}:{span[1]}", "peak": watch.peak,
                    "ready": anonymous_memory(server.pid), "with_files": peak_memory(server.pid),
                })  # fmt: skip
            if case is not None:
                trained = train(folder, running[0].maddr, case)
    finally:
        if is_new and not keep:
            shutil.rmtree(folder)
    print_table(
        f"Servers of a Llama {hidden} × {blocks}",
        ("weights", "blocks", "peak, GiB", "ready, GiB", "ratio", "with files, GiB"),
        [
            (
                row["weights"], row["blocks"], _gib(row["peak"]), _gib(row["ready"]),
                f"{row['peak'] / row['ready']:.2f}", _gib(row["with_files"]),
            )
            for row in rows
        ],
    )  # fmt: skip
    if trained is not None:
        print_table(
            "A client that trains", ("case", "peak, GiB", "seconds of two steps"),
            [(trained["client"], _gib(trained["peak"]), ", ".join(f"{each:.0f}" for each in trained["seconds"]))],
        )  # fmt: skip
    save_rows([*rows, *([trained] if trained is not None else [])], output)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"


if __name__ == "__main__":
    typer.run(main)
