"""`petals-lightning api` and `dashboard` as processes, and what they serve."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import openai
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.models import save_prompts
from petals_lightning.models.local import LocalModelForCausalLM
from petals_lightning.sample import MODEL_DIR
from tools.testing.servers import start_http
from tools.testing.swarms import PREFIX


def save_tuned_parts(folder: Path) -> dict[str, Path]:
    """Folders of prompts and of an adapter, by kind, which change what the bundled model says."""
    torch.manual_seed(1)
    with quiet_transformers():
        local = LocalModelForCausalLM.from_pretrained(str(MODEL_DIR), tuning_mode="deep_ptune", pre_seq_len=3)
        plain = AutoModelForCausalLM.from_pretrained(str(MODEL_DIR))
    for parameter in local.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5)
    save_prompts(local, folder / "prompts")
    lora = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(str(folder / "adapter"))
    return {"prompts": folder / "prompts", "adapter": folder / "adapter"}


class Server:
    """A command that serves HTTP, as a process; it is ready.

    Attributes:
        url: where it listens.
    """

    def __init__(self, *arguments: str):
        self._process, url = start_http(*arguments)
        self.url = url.replace("0.0.0.0", "127.0.0.1")

    @property
    def lines(self) -> list[str]:
        """What it has printed so far."""
        return list(self._process.lines)

    def stop(self) -> None:
        self._process.signal(signal.SIGTERM)
        assert self._process.wait(30) == 0, "".join(self.lines)


class Endpoint(Server):
    """`petals-lightning api` for the bundled model."""

    def __init__(self, initial_peers: Sequence[str], *options: str):
        super().__init__("api", str(MODEL_DIR), "--dht-prefix", PREFIX, "--initial-peers", *initial_peers, *options)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
