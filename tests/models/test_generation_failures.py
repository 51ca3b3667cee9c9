"""Servers that die or hang in a conversation, as processes with real signals: the tokens stay the same."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from tools.testing.swarms import PREFIX

pytestmark = pytest.mark.slow

OPTIONS = {"max_new_tokens": 14, "pad_token_id": 0, "do_sample": False, "eos_token_id": None}


class SignalAfter(BaseStreamer):
    """Signals a server of the session once so many pieces have been streamed, and keeps the longest wait."""

    def __init__(self, pieces: int, act) -> None:
        self._left, self._act, self._last, self.stall = pieces, act, time.monotonic(), 0.0

    def put(self, value: torch.Tensor) -> None:
        now = time.monotonic()
        self.stall, self._last = max(self.stall, now - self._last), now
        self._left -= 1
        if self._left == 0:
            self._act()

    def end(self) -> None:
        self.put(torch.empty(0))


@pytest.mark.also_on("petals", "mixed")
def test_lost_servers_change_no_token(tiny_checkpoint, start_servers):
    """One conversation: a server is killed in the first turn, one before the second, and one hangs in the third."""
    checkpoint = tiny_checkpoint("llama")
    servers = start_servers(checkpoint, [(0, 4)] * 4)
    with quiet_transformers():
        local: Any = AutoModelForCausalLM.from_pretrained(str(checkpoint))
    remote = AutoDistributedModelForCausalLM.from_pretrained(
        str(checkpoint), initial_peers=[server.maddr for server in servers.values()], dht_prefix=PREFIX
    )
    stats, conversation = remote_blocks(remote).stats, torch.empty(1, 0, dtype=torch.long)
    try:
        with remote.inference_session(max_length=100) as session:

            def signal_server(number: signal.Signals) -> None:
                servers[session.peers[-1]].signal(number)

            strikes = [(signal.SIGKILL, 8, 5.0), (signal.SIGKILL, 0, 5.0), (signal.SIGSTOP, 8, 20.0)]
            for losses, (number, at, limit) in enumerate(strikes, start=1):
                new = torch.randint(1, 96, (1, 6))
                conversation = torch.cat([conversation, new], dim=1)
                if not at:
                    signal_server(number)
                streamer = SignalAfter(at, lambda number=number: signal_server(number))
                got = remote.generate(new, streamer=streamer, **OPTIONS)
                expected = local.generate(conversation, attention_mask=torch.ones_like(conversation), **OPTIONS)
                assert torch.equal(got, expected[:, -got.shape[1] :])
                conversation = expected
                print(
                    f"{number.name} {'in' if at else 'before'} a turn: longest wait for a token {streamer.stall:.2f} s"
                )
                assert streamer.stall < limit, "promised: 1 s and 10 s; the limits leave room for a busy machine"
                assert stats.retries == losses, "a lost server costs one retry, once"
    finally:
        remote_blocks(remote).close()
