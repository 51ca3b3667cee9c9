"""Figures for Prometheus: those of a server that clients use, fetched over HTTP."""

from __future__ import annotations

import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from petals_lightning.errors import SwarmError
from petals_lightning.models import AutoDistributedModelForCausalLM, remote_blocks
from tests.helpers.families import NUM_BLOCKS, VOCAB
from tools.testing.proxy import free_port
from tools.testing.servers import start_server
from tools.testing.swarms import PREFIX

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ours("the servers are processes of their own")]


def read(port: int) -> dict[tuple[str, ...], float]:
    """The figures by name and the values of their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(each.name.removeprefix("petals_lightning_server_"), *each.labels.values()): each.value for each in samples}


def test_figures_follow_what_clients_do(tiny_checkpoint):
    checkpoint, port = tiny_checkpoint("llama"), free_port()
    options = "--metrics-port", str(port), "--max-batch-tokens", "200"
    server = start_server(checkpoint, (0, NUM_BLOCKS), [], *options).wait_until_ready()
    try:
        before = read(port)
        assert before["requests_total", "forward"] == 0
        (info,) = [labels for labels in before if labels[0] == "info"]
        assert {PREFIX, "0:4", "float32", "cpu"} <= set(info)

        load: Any = AutoDistributedModelForCausalLM.from_pretrained
        swarm: Any = {"initial_peers": [server.maddr], "dht_prefix": PREFIX}
        model = load(checkpoint, tuning_mode="ptune", pre_seq_len=2, **swarm)
        tokens = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
        loss = model(input_ids=tokens, labels=tokens).loss
        during = read(port)
        assert (during["requests_total", "forward"], during["requests_total", "backward"]) == (1, 0)
        assert during[("graph_bytes",)] > 0, "the graph is kept for the backward"
        assert during[("clients",)] == during[("streams",)] == 1
        assert during[("positions_total",)] == 2 * (5 + 2)
        loss.backward()
        model.generate(tokens[:1], max_new_tokens=3, do_sample=False)
        after = read(port)
        assert after["requests_total", "backward"] == 1
        assert after["requests_total", "decode"] == 3
        assert after["compute_seconds_total", "forward"] > 0
        assert after[("graph_bytes",)] == 0
        assert after[("process_resident_memory_bytes",)] > 1 << 20
        assert not any(labels[0] == "refusals_total" for labels in after)
        described = (ROOT / "docs" / "running-servers.md").read_text()
        own = {labels[0] for labels in after if not labels[0].startswith(("process_", "python_"))}
        assert {name for name in own if f"`{name}`" not in described} == set()

        with pytest.raises(SwarmError, match="up to 200"), torch.no_grad():
            model(input_ids=tokens.repeat(1, 80))
        assert read(port)["refusals_total", "bad_request"] >= 1
        remote_blocks(model).close()
    finally:
        server.stop()


def test_sigterm_lets_a_request_in_flight_be_answered(tiny_checkpoint):
    checkpoint, port = tiny_checkpoint("llama"), free_port()
    server = start_server(checkpoint, (0, NUM_BLOCKS), [], "--metrics-port", str(port)).wait_until_ready()
    load: Any = AutoDistributedModelForCausalLM.from_pretrained
    model = load(checkpoint, initial_peers=[server.maddr], dht_prefix=PREFIX, min_microbatch_tokens=1 << 30)
    tokens = torch.randint(0, VOCAB, (150, 60), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            expected = model(input_ids=tokens).logits
            with ThreadPoolExecutor() as pool:
                answer = pool.submit(torch.no_grad()(model), input_ids=tokens)
                while not read(port)["open_requests",]:
                    assert not answer.done(), "the request is too short to be seen"
                server.signal(signal.SIGTERM)
                assert torch.equal(answer.result(60).logits, expected)
        assert remote_blocks(model).stats.retries == 0
        assert server.wait(30) == 0
    finally:
        model.close()
        server.stop()


def test_a_port_that_is_taken_is_one_line(tiny_checkpoint):
    checkpoint, port = tiny_checkpoint("llama"), str(free_port())
    servers = [start_server(checkpoint, (0, 2), [], "--metrics-port", port).wait_until_ready()]
    try:
        servers.append(start_server(checkpoint, (0, 2), [], "--metrics-port", port))
        assert servers[-1].wait(60) == 1
        (error,) = [line for line in servers[-1].lines if line.startswith("error: ")]
        assert f"metrics cannot be served on 127.0.0.1:{port} (Address already in use): set --metrics-host" in error
    finally:
        for server in servers:
            server.stop()
