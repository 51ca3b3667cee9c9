"""`petals-lightning status` on a swarm of both kinds of server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest
from hivemind.utils.timed_storage import get_dht_time
from typer.testing import CliRunner

from petals_lightning.cli.app import app
from petals_lightning.errors import ConfigurationError
from petals_lightning.protocol.uids import MODELS_KEY
from petals_lightning.swarm import SwarmNode
from tools.testing.swarms import LOOPBACK, PREFIX


@pytest.fixture
def swarm(tiny_checkpoint, start_swarm):
    return start_swarm(tiny_checkpoint("llama"), [(0, 3), (0, 2)], servers="mixed")


def arguments(swarm) -> list[str]:
    return ["status", *(item for peer in swarm.initial_peers for item in ("--initial-peers", peer))]


def test_both_kinds_are_shown(swarm):
    result = CliRunner().invoke(app, [*arguments(swarm), "--json"])
    assert result.exit_code == 0
    (model,) = json.loads(result.stdout)
    assert (model["dht_prefix"], model["num_blocks"], model["repository"]) == (PREFIX, 4, None)
    assert (model["coverage"], model["missing_blocks"]) == ([2, 2, 1, 0], "3")
    shorter, longer = model["servers"]
    assert (shorter["blocks"], shorter["kind"]) == ("0:2", "petals")
    assert (longer["blocks"], longer["kind"]) == ("0:3", "petals-lightning")
    for server, running in zip(model["servers"], reversed(swarm.servers), strict=True):
        assert server["peer_id"] == running.node.peer_id.to_base58()
        assert server["dtype"] == "float32"
        assert server["version"]
        assert server["throughput"] > 0
        assert server["tokens_per_second"] > 0
        assert server["cache_tokens_left"] > 1000
        assert 0 < server["round_trip"] < 5


def test_a_table_names_blocks_that_nobody_holds_and_servers_that_do_not_answer(swarm):
    swarm.servers[1].node.run(
        swarm.servers[1].node.p2p.remove_protobuf_handler("TransformerConnectionHandler.rpc_info")
    )
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments(swarm))
    assert "tiny (4 blocks, blocks without a server: 3)" in result.stdout
    (row,) = (line for line in result.stdout.splitlines() if "0:2" in line)
    assert "silent" in row
    (row,) = (line for line in result.stdout.splitlines() if "0:3" in line)
    assert "petals-lightning" in row
    assert "float32" in row


@pytest.mark.slow
def test_a_table_is_readable_on_80_columns(swarm):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments(swarm))
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    words = result.stdout.split()
    for header in ("blocks", "server", "runs", "requests/s", "tokens/s", "a", "block", "cache", "left", "ms"):
        assert header in words
    for running in swarm.servers:
        assert f"…{running.node.peer_id.to_base58()[-10:]}" in words
    assert {"petals", "petals-lightning", "float32"} <= set(words)


@pytest.mark.slow
def test_it_looks_again_until_it_is_interrupted(swarm):
    command = [sys.executable, "-m", "petals_lightning.cli.main", *arguments(swarm), "--json", "--watch", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert len(json.loads(process.stdout.readline())[0]["servers"]) == 2
        swarm.servers.pop().stop(timeout=1)
        assert any(len(json.loads(line)[0]["servers"]) == 1 for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_the_period_is_checked_first():
    result = CliRunner().invoke(app, ["status", "--watch", "0"])
    assert isinstance(result.exception, ConfigurationError)


@pytest.mark.slow
def test_a_long_list_of_strangers_names_hides_no_model(swarm):
    with SwarmNode(swarm.initial_peers, host_maddrs=LOOPBACK).start() as stranger:
        names = [f"a-model-{number}" for number in range(3000)]
        expires = get_dht_time() + 600
        stored = stranger.run(
            stranger.dht.store_many(
                [MODELS_KEY] * (len(names) + 1),
                subkeys=[*names, PREFIX],
                values=[{"num_blocks": 500, "repository": "stranger/model"}] * (len(names) + 1),
                expiration_time=expires,
            )
        )
        assert sum(stored.values()) > 2000
        result = CliRunner().invoke(app, [*arguments(swarm), "--json"])
    assert result.exit_code == 0
    assert re.search(
        r"\d{4} models are listed; these are \d+ of them \(--dht-prefix NAME shows another\)", result.stderr
    )
    shown = json.loads(result.stdout)
    assert (shown[0]["dht_prefix"], shown[0]["num_blocks"], shown[0]["repository"]) == (PREFIX, 4, None)
    assert len(shown[0]["servers"]) == 2
