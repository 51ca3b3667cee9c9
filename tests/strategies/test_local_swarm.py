"""The embedded swarm: real server processes that come and go with the run."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petals_lightning.errors import CheckpointError, ConfigurationError, SwarmError
from petals_lightning.models import AutoDistributedModelForSequenceClassification, remote_blocks
from petals_lightning.strategies import LocalSwarm, ServedModel
from petals_lightning.strategies.local_swarm import split_evenly


@given(st.integers(1, 200), st.integers(1, 20))
def test_blocks_are_split_evenly(num_blocks: int, num_servers: int) -> None:
    if num_servers > num_blocks:
        with pytest.raises(ConfigurationError, match=r"^num_servers="):
            split_evenly(num_blocks, num_servers)
        return
    spans = [tuple(map(int, span.split(":"))) for span in split_evenly(num_blocks, num_servers)]
    assert [block for start, end in spans for block in range(start, end)] == list(range(num_blocks))
    lengths = {end - start for start, end in spans}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.slow
def test_servers_come_and_go_with_the_swarm(text_model: Path, tmp_path: Path) -> None:
    swarm, model = LocalSwarm(num_servers=2), ServedModel(str(text_model))
    with swarm.keep_alive(model, tmp_path):
        arguments = swarm.acquire(model, tmp_path)
        client = AutoDistributedModelForSequenceClassification.from_pretrained(str(text_model), **arguments)
        blocks = remote_blocks(client)
        assert blocks is not None
        route = blocks.route()
        assert [(span.start, span.end, span.public_name) for span in route] == [(0, 2, "local-0"), (2, 4, "local-1")]
        blocks.close()
        swarm.release()
        pids = [server.pid for server in swarm._servers]
        children = [child.pid for pid in pids for child in psutil.Process(pid).children(recursive=True)]
        assert children, "each server has a libp2p daemon"
    assert not any(psutil.pid_exists(pid) for pid in pids + children)
    assert "ready:" in (tmp_path / "server_1.log").read_text()


@pytest.mark.slow
def test_servers_hold_the_kind_of_weights_that_was_asked_for(text_model: Path, tmp_path: Path) -> None:
    swarm = LocalSwarm(num_servers=1, quant_type="int8", allowed_quantization=["int8"])  # no other kind will do
    model = ServedModel(str(text_model))
    with swarm.keep_alive(model, tmp_path):
        arguments = swarm.acquire(model, tmp_path)
        client = AutoDistributedModelForSequenceClassification.from_pretrained(str(text_model), **arguments)
        blocks = remote_blocks(client)
        assert blocks is not None
        assert len(blocks.route()) == 1
        blocks.close()
        swarm.release()


@pytest.mark.slow
def test_a_server_that_fails_to_start_is_quoted_and_nothing_is_left(text_model: Path, tmp_path: Path) -> None:
    swarm = LocalSwarm(block_ranges=["2:9"], start_timeout=60)  # the model has 4 blocks
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(SwarmError, match=r"server 0 \(blocks 2:9\) ended while starting .*log: .*server_0\.log"):
        swarm.acquire(ServedModel(str(text_model)), tmp_path)
    assert not swarm._servers
    assert set(psutil.Process().children(recursive=True)) <= before


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_name=.*no model there"):
        LocalSwarm().acquire(ServedModel(str(tmp_path)), tmp_path)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^num_servers=0"):
        LocalSwarm(num_servers=0)
    with pytest.raises(ConfigurationError, match=r"^block_ranges: 'all'"):
        LocalSwarm(block_ranges=["all"])
    with pytest.raises(ConfigurationError, match=r"^quant_type is 'fp5': choose none, int8 or nf4"):
        LocalSwarm(quant_type="fp5")
