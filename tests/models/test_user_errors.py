"""What a user can get wrong with a distributed model: each its own clear error, none of them a hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from petals_lightning import __version__
from petals_lightning.client import ClientConfig
from petals_lightning.errors import (
    CheckpointError,
    ConfigurationError,
    IncompatibleServerError,
    NoServersError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from petals_lightning.models import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
    remote_blocks,
)
from petals_lightning.protocol.records import STREAM_VERSION
from petals_lightning.swarm import SwarmNode
from tests.helpers.families import VOCAB, save_tiny_checkpoint
from tools.testing.swarms import PREFIX, InProcessSwarm

IDS = torch.randint(1, VOCAB, (2, 6))


@pytest.mark.slow
def test_blocks_that_nobody_serves_are_named_when_connecting(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 1), (3, 4)])
    with pytest.raises(
        NoServersError, match=r"no usable server holds blocks 1:3 of 'tiny'.*listed in this swarm: tiny"
    ):
        swarm.load(AutoDistributedModel)


def test_a_prefix_that_nobody_serves_lists_the_models_there_are(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    with pytest.raises(NoServersError, match=r"blocks 0:4 of 'tinny'.*listed in this swarm: tiny"):
        swarm.load(AutoDistributedModel, dht_prefix="tinny")


def test_a_server_with_another_hidden_size_is_refused_when_connecting(tiny_checkpoint, start_swarm, tmp_path):
    wider = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    swarm = start_swarm(save_tiny_checkpoint(wider, tmp_path), [(0, 4)])
    with pytest.raises(IncompatibleServerError, match="hidden size is 48, here it is 32"):
        AutoDistributedModel.from_pretrained(
            str(tiny_checkpoint("llama")), initial_peers=swarm.initial_peers, dht_prefix=PREFIX
        )


@pytest.mark.slow
@pytest.mark.ours("servers of Petals' methods alone state no version")
def test_a_server_of_another_stream_version_is_named_with_both_versions(tiny_checkpoint, start_swarm, monkeypatch):
    checkpoint = tiny_checkpoint("llama")
    ours = start_swarm(checkpoint, [(0, 4)])
    with monkeypatch.context() as later:
        later.setattr("petals_lightning.server.server.STREAM_VERSION", 7)
        later.setattr("petals_lightning.server.running_server.STREAM_METHOD", "petals_lightning.stream.v7")
        other = start_swarm(checkpoint, [(0, 4)], initial_peers=ours.initial_peers, prefix="later")
        start_swarm(checkpoint, [(0, 4)], initial_peers=ours.initial_peers)
    name = f"server …{other.servers[0].node.peer_id.to_base58()[-6:]}"
    words = (
        rf"{name} speaks version 7 of .* \(petals-lightning {__version__}\), "
        rf"this client speaks version {STREAM_VERSION} .*Install the"
    )
    with pytest.raises(IncompatibleServerError, match=words) as error:
        ours.load(AutoDistributedModel, dht_prefix="later")
    assert "Load the same model" not in str(error.value)
    config = ClientConfig(recovery_timeout=1.0, max_retries=1, heartbeat_period=0.25, heartbeat_timeout=1.0)
    model = ours.load(AutoDistributedModel, client_config=config)
    assert model(input_ids=IDS).last_hidden_state.isfinite().all(), "the server of our version is used"
    ours.servers[0].stop(timeout=1)
    with pytest.raises(NoServersError, match=r"a server that lists them: server …\S+ speaks version 7"):
        model(input_ids=IDS)


@pytest.mark.slow
def test_a_batch_without_a_padding_token_is_refused_before_it_is_sent(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)])
    model = swarm.load(AutoDistributedModelForSequenceClassification, num_labels=2, pad_token_id=None)
    requests = remote_blocks(model).stats.requests
    with pytest.raises(UnsupportedInputError, match=r"^2 samples at once, and .* no pad_token_id.*from_pretrained\("):
        model(input_ids=IDS)
    assert remote_blocks(model).stats.requests == requests
    assert model(input_ids=IDS[:1]).logits.shape == (1, 2)


@pytest.mark.slow
def test_a_server_of_another_model_of_the_same_shape_is_refused(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("mistral"), [(0, 4)])
    with pytest.raises(IncompatibleServerError, match="another model under 'tiny'"):
        AutoDistributedModel.from_pretrained(
            str(tiny_checkpoint("llama")), initial_peers=swarm.initial_peers, dht_prefix=PREFIX
        )


@pytest.mark.slow
def test_blocked_and_allowed_servers_are_respected(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 4), (0, 4)])
    first, second = (server.node.peer_id.to_base58() for server in swarm.servers)
    for options in ({"blocked_servers": [first]}, {"allowed_servers": [second]}):
        layers = swarm.load(AutoDistributedModel, **options).layers
        assert [leg.peer_id for leg in layers.route()] == [second]
    with pytest.raises(NoServersError, match=r"2 server\(s\) are excluded"):
        swarm.load(AutoDistributedModel, blocked_servers=[first, second])


def test_a_folder_needs_a_prefix_and_a_prefix_no_dots(tiny_checkpoint):
    folder = str(tiny_checkpoint("llama"))
    with pytest.raises(ConfigurationError, match="no dht_prefix for the local folder"):
        AutoDistributedModel.from_pretrained(folder, initial_peers=["/ip4/127.0.0.1/tcp/1/p2p/Qm"])
    with pytest.raises(ConfigurationError, match="neither dots nor spaces; try 'a-b'"):
        AutoDistributedConfig.from_pretrained(folder, dht_prefix="a.b")
    assert AutoDistributedConfig.from_pretrained(folder, dht_prefix="a-b").dht_prefix == "a-b"


def test_not_one_way_into_a_swarm_is_said_before_anything_runs(tiny_checkpoint):
    ways: list[dict[str, Any]] = [{"initial_peers": []}, {"initial_peers": ["x"], "node": SwarmNode()}]
    for options in ways:
        with pytest.raises(ConfigurationError, match="give one way into the swarm"):
            AutoDistributedModel.from_pretrained(str(tiny_checkpoint("llama")), dht_prefix=PREFIX, **options)


def test_a_node_of_the_callers_keeps_its_identity(tiny_checkpoint):
    with pytest.raises(ConfigurationError, match="the given node already has its identity"):
        AutoDistributedModel.from_pretrained(
            str(tiny_checkpoint("llama")), dht_prefix=PREFIX, node=SwarmNode(), identity_path="me.id"
        )


def test_a_malformed_address_is_named(tiny_checkpoint):
    with pytest.raises(ConfigurationError, match=r"'10\.0\.0\.1:31337' is not a peer's multiaddress"):
        AutoDistributedModel.from_pretrained(
            str(tiny_checkpoint("llama")), dht_prefix=PREFIX, initial_peers=["10.0.0.1:31337"]
        )


@pytest.mark.parametrize(("mode", "length"), [("ptune", 0), ("deep_ptune", -1), ("ptune", None), ("p_tuning", 4)])
def test_tuning_options_are_checked_first(mode, length, tmp_path):
    with pytest.raises(ConfigurationError, match=r"pre_seq_len is|tuning_mode is"):
        AutoDistributedModel.from_pretrained(str(tmp_path), initial_peers=["x"], tuning_mode=mode, pre_seq_len=length)


def test_models_that_are_no_decoders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        AutoDistributedModel.from_pretrained(str(tmp_path), initial_peers=["x"], dht_prefix="x")
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    with pytest.raises(UnsupportedModelError, match="does not know"):
        AutoDistributedModel.from_pretrained(str(tmp_path), initial_peers=["x"], dht_prefix="x")


@pytest.fixture
def model(tiny_checkpoint, start_swarm):
    return start_swarm(tiny_checkpoint("llama"), [(0, 4)]).load(AutoDistributedModelForCausalLM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]] * 2)}, "right padding only"),
        ({"output_hidden_states": True}, "output_hidden_states=True"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"use_cache": True}, "keys and values are kept on servers"),
        ({"position_ids": 1 + torch.arange(6)[None]}, "position_ids"),
    ],
)
def test_what_cannot_cross_the_swarm_is_refused_by_name(model, options, words):
    with pytest.raises(UnsupportedInputError, match=words):
        model(IDS, **options)


@pytest.mark.slow
def test_a_model_works_on_after_a_refused_call(model):
    expected = model(IDS).logits
    with pytest.raises(UnsupportedInputError):
        model(IDS, output_hidden_states=True)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-6)


@pytest.mark.slow
def test_an_oversized_request_comes_back_with_the_servers_words(tiny_checkpoint, start_swarm):
    from petals_lightning.errors import RemoteRequestError
    from petals_lightning.server.access.limits import ServerLimits

    swarm: InProcessSwarm = start_swarm(tiny_checkpoint("llama"), [(0, 4)], limits=ServerLimits(max_batch_tokens=10))
    layers = remote_blocks(swarm.load(AutoDistributedModel))
    with pytest.raises(RemoteRequestError, match="12 tokens in one request, this server takes up to 10"):
        layers(torch.randn(1, 12, 32))
    assert layers.stats.retries == 0
    assert layers(torch.randn(3, 6, 32)).shape == (3, 6, 32)
