"""Without peers a model joins the public network; here its bootstrap peers are a swarm on loopback."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from petals_lightning.cli.generation import Terminal, TunedModelOptions, load_model
from petals_lightning.client import ClientConfig
from petals_lightning.errors import ConfigurationError, NoServersError, SwarmConnectionError
from petals_lightning.models import AutoDistributedModel, remote_blocks
from petals_lightning.strategies import PublicSwarm, ServedModel
from petals_lightning.swarm import public
from tests.helpers.text_models import save_tiny_text_model
from tools.testing.swarms import PREFIX


@pytest.fixture
def bootstrap(monkeypatch):
    """`bootstrap(peers)` makes them the public network."""

    def be_public(peers: list[str]) -> None:
        for module in (
            "petals_lightning.swarm.public",
            "petals_lightning.models.auto",
            "petals_lightning.strategies.existing_swarms",
        ):
            monkeypatch.setattr(f"{module}.PUBLIC_INITIAL_PEERS", tuple(peers))

    return be_public


@pytest.mark.slow
def test_a_model_without_peers_is_on_the_public_network_and_says_so(tiny_checkpoint, start_swarm, bootstrap, caplog):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 4)], servers="petals")
    bootstrap(swarm.initial_peers)
    model = swarm.load(AutoDistributedModel, initial_peers=None)
    assert remote_blocks(model)(torch.randn(1, 2, 32)).shape == (1, 2, 32)
    (notice,) = (record for record in caplog.records if "machines of strangers" in record.message)
    assert notice.levelno == logging.WARNING
    with pytest.raises(
        NoServersError, match=rf"no usable server holds .*'other'.*models listed in this swarm: {PREFIX}"
    ):
        AutoDistributedModel.from_pretrained(str(checkpoint), dht_prefix="other")


@pytest.mark.slow
def test_a_talk_on_the_public_network_must_be_asked_for(tmp_path, start_swarm, bootstrap, capsys):
    model = save_tiny_text_model(tmp_path)
    swarm = start_swarm(model, [(0, 4)], servers="petals")
    bootstrap(swarm.initial_peers)
    options = TunedModelOptions(str(model), dht_prefix=PREFIX, public=True)
    with load_model(options, ClientConfig(), Terminal()) as (network, _):
        assert network.generate(torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=0).shape[1] > 2
    assert "machines of strangers" in capsys.readouterr().err
    for wrong in (replace(options, public=False), replace(options, initial_peers=swarm.initial_peers)):
        with (
            pytest.raises(ConfigurationError, match="or --public for"),
            load_model(wrong, ClientConfig(), Terminal()),
        ):
            pass


def test_a_run_on_the_public_network_says_so_once(tmp_path, tiny_checkpoint, start_swarm, bootstrap, caplog):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [(0, 4)], servers="petals")
    bootstrap(swarm.initial_peers)
    source = PublicSwarm()
    model = ServedModel(str(checkpoint), dht_prefix=PREFIX)
    options = source.acquire(model, tmp_path)
    swarm.load(AutoDistributedModel, **options)
    source.release()
    assert sum("machines of strangers" in record.message for record in caplog.records) == 1


def test_a_network_that_cannot_be_reached_is_named(tiny_checkpoint, bootstrap):
    bootstrap(["/ip4/127.0.0.1/tcp/1/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"])
    with pytest.raises(SwarmConnectionError, match=r"cannot reach the public Petals network.*swarm=private"):
        AutoDistributedModel.from_pretrained(str(tiny_checkpoint("llama")), dht_prefix=PREFIX, connect_timeout=5)


def test_the_network_is_the_one_of_petals():
    assert len(public.PUBLIC_INITIAL_PEERS) == 6
    assert {peer.rsplit("/", 1)[1] for peer in public.PUBLIC_INITIAL_PEERS} == {
        "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY",
        "QmQGTqmM7NKjV6ggU1ZCap8zWiyKR89RViDXiqehSiCpY5",
    }
    assert public.is_public(public.PUBLIC_INITIAL_PEERS)
    assert not public.is_public([])
    assert not public.is_public(["/ip4/10.0.0.1/tcp/1/p2p/Qm"])
