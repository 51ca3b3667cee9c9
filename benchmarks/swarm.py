"""What benchmarks run on: a random Llama, classifiers and their steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.models import AutoDistributedModelForSequenceClassification

PREFIX = "benchmark"
VOCABULARY = 1000


def save_random_llama(
    folder: str, *, hidden: int, blocks: int, dtype: str, vocabulary: int = VOCABULARY, is_thin: bool = False
) -> None:
    """`is_thin`: next to no arithmetic inside the blocks, for servers whose compute time is stated."""
    heads, intermediate, head_dim = hidden // 64, hidden * 8 // 3 // 16 * 16, 64
    if is_thin:
        heads, intermediate, head_dim = 1, 16, 16
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim, max_position_embeddings=2048,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet_transformers():
        transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def classifier(model: str, maddr: str, pre_seq_len: int, **options: Any) -> Any:
    """A distributed classifier with deep prompts and two labels, unless `options` say otherwise."""
    return AutoDistributedModelForSequenceClassification.from_pretrained(
        model, initial_peers=[maddr], dht_prefix=PREFIX,
        **{"tuning_mode": "deep_ptune", "pre_seq_len": pre_seq_len, "num_labels": 2, **options},
    )  # fmt: skip


def peak_memory(pid: int) -> int:
    """Bytes that a process has had resident at most (VmHWM of Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


class Wasteful:
    """A classifier that asks more of its servers than its loss needs.

    Args:
        all_positions: it has the outputs of all positions sent back, and sends gradients for all of them.
        input_grad: it has a gradient of its inputs computed and sent back.
    """

    def __init__(self, model: Any, *, all_positions: bool = True, input_grad: bool = True):
        self._model, self._all_positions, self._input_grad = model, all_positions, input_grad

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        embeds = self._model.get_input_embeddings()(input_ids).requires_grad_(self._input_grad)
        if not self._all_positions:  # the last position of all samples is read: for batches without padding
            return self._model(inputs_embeds=embeds, labels=labels)
        hidden = self._model.base_model(inputs_embeds=embeds, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        logits = self._model.score(hidden[torch.arange(len(last)), last])
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels))


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def batch_of(batch: int, tokens: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    input_ids = torch.randint(1, VOCABULARY, (batch, tokens), device=device)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.randint(0, 2, (batch,), device=device),
    }


def run_step(model: Callable[..., Any], optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of a training step; `model` gives an output with a loss."""
    began = time.perf_counter()
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()
    if batch["labels"].is_cuda:
        torch.cuda.synchronize(batch["labels"].device)
    return time.perf_counter() - began


def training_rounds(
    models: Mapping[str, torch.nn.Module], batch: dict[str, torch.Tensor]
) -> dict[str, Callable[[], float]]:
    """For each model, what trains it by a step and returns the seconds."""
    return {name: partial(run_step, model, optimizer_of(model), batch) for name, model in models.items()}
