"""Memory of one server with a model of 8B shape, while it loads and when it is ready.

    python -m benchmarks.large_model /work/8b --quant-type nf4        # writes 14 GB there first

The weights are random, written a block at a time, and deleted at the end unless they were there before. "Peak" and
"ready" are anonymous memory of the server's process, which the kernel cannot take back; "with files" is its largest
resident memory, with mapped parts of files.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.options import Output
from benchmarks.rounds import print_table, save_rows
from benchmarks.swarm import PREFIX, peak_memory
from petals_lightning.strategies.server_process import ServerProcess
from tools.testing.servers import start_server

_PERIOD = 0.05  # seconds between two looks at a process


def save_blocks(folder: Path, config: LlamaConfig) -> None:
    """A checkpoint of the blocks alone, a shard each, in bfloat16."""
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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


class _Watch(threading.Thread):
    """Looks at a process's anonymous memory until `stop`."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pid, self._stopped, self.peak = pid, threading.Event(), 0
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(_PERIOD):
            self.peak = max(self.peak, anonymous_memory(self._pid))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def anonymous_memory(pid: int) -> int:
    """Bytes that a process holds besides pages of files (RssAnon of Linux); 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def main(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint is written; one that is there stays.")],
    quant_type: Annotated[str, typer.Option(help="none, int8 or nf4")] = "nf4",
    hidden: int = 4096,
    intermediate: int = 14336,
    blocks: int = 32,
    span: Annotated[str | None, typer.Option(help="Blocks of the server, START:END; all by default.")] = None,
    threads: int = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Do not delete the checkpoint.")] = False,
    output: Output = None,
) -> None:
    """Prints what the server takes."""
    heads = max(1, hidden // 128)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), vocab_size=1000, max_position_embeddings=8192, pad_token_id=0,
        dtype=torch.bfloat16,
    )  # fmt: skip
    is_new = not folder.exists()
    if is_new:
        save_blocks(folder, config)
    try:
        start, end = (int(part) for part in (span or f"0:{blocks}").split(":"))
        options = ("--threads", str(threads), "--dht-prefix", PREFIX, "--quant-type", quant_type)
        server: ServerProcess = start_server(str(folder), (start, end), (), *options)
        watch = _Watch(server.pid)
        try:
            server.wait_until_ready()
            watch.stop()
            ready, with_files = anonymous_memory(server.pid), peak_memory(server.pid)
        finally:
            server.stop()
    finally:
        if is_new and not keep:
            shutil.rmtree(folder)
    row = {"weights": quant_type, "peak": watch.peak, "ready": ready, "with_files": with_files}
    print_table(
        f"Llama {hidden} × {blocks}, blocks {start}:{end}",
        ("weights", "peak, GiB", "ready, GiB", "ratio", "with files, GiB"),
        [(
            quant_type, *(f"{num_bytes / 2**30:.2f}" for num_bytes in (watch.peak, ready)), f"{watch.peak / ready:.2f}",
            f"{with_files / 2**30:.2f}",
        )],
    )  # fmt: skip
    save_rows([row], output)


if __name__ == "__main__":
    typer.run(main)
