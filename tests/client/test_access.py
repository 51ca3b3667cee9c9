"""Private servers: known peers are served, strangers are told why not, and cost nothing."""

from __future__ import annotations

import asyncio
import logging
import os

import pytest
import torch

from petals_lightning.errors import AccessDeniedError, ConfigurationError
from petals_lightning.models import AutoDistributedModel, remote_blocks
from petals_lightning.protocol.auth import new_nonce, prove, read_token
from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import STREAM_METHOD, ErrorCode, Message, Method
from petals_lightning.protocol.requests import ForwardRequest
from petals_lightning.server.access.rules import AccessRules, Gate, read_peer_list
from petals_lightning.swarm.streams import open_stream
from tests.helpers.families import ALL, HIDDEN, NUM_BLOCKS
from tools.testing.swarms import InProcessSwarm

TOKEN = "a token of some length"


def run_once(model) -> torch.Tensor:
    return model(input_ids=torch.arange(1, 7)[None]).last_hidden_state


def strangers_answers(swarm: InProcessSwarm, server, messages: list[Message]) -> list[Message]:
    """What a peer that has proved nothing is told, by a server of the swarm."""
    node = swarm.servers[-1].node

    async def talk() -> list[Message]:
        reader, writer = await open_stream(node.p2p, server.node.peer_id.to_base58(), STREAM_METHOD)
        incoming, outgoing = MessageReader(reader, max_message_bytes=1 << 20, max_open=10), MessageWriter(writer)
        replies = []
        for call_id, message in enumerate(messages, 1):
            await outgoing.send(call_id, message)
            item = await asyncio.wait_for(incoming.next(), 10)
            assert item is not None, "the stream ended without a word"
            replies.append(item[1])
        outgoing.close()
        return replies

    return node.run(talk())


@pytest.mark.slow
def test_a_shared_token_lets_in_and_a_stranger_is_refused_everywhere(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, (0, 1)], rules=AccessRules(token=TOKEN))
    assert run_once(swarm.load(AutoDistributedModel, swarm_token=TOKEN)).isfinite().all()
    with pytest.raises(AccessDeniedError, match=r"swarm with a shared token.*swarm_token"):
        swarm.load(AutoDistributedModel)
    with pytest.raises(AccessDeniedError, match="another token"):
        swarm.load(AutoDistributedModel, swarm_token=TOKEN + " or not")
    server = swarm.servers[0]
    computed = []
    server.span.forward = lambda inputs, *cached: computed.append(inputs)
    big = ForwardRequest(0, NUM_BLOCKS, torch.ones(4, 200, HIDDEN))
    messages = [
        Message(Method.INFO), Message(Method.PING), big.to_message(), Message(Method.BACKWARD), Message(Method.CANCEL),
        Message(Method.AUTH, {"proof": b"x" * 32}), Message(Method.AUTH, {"nonce": "text"}), Message(Method.OK),
    ]  # fmt: skip
    for reply in strangers_answers(swarm, server, messages):
        assert (reply.method, reply.fields["code"]) == (Method.ERROR, ErrorCode.NOT_ALLOWED)
    assert computed == []
    assert server.resources.quotas.num_bytes == 0


@pytest.mark.slow
def test_a_list_of_peers_lets_in_those_on_it(tiny_checkpoint, tmp_path, start_swarm):
    checkpoint, identity = tiny_checkpoint("llama"), str(tmp_path / "client.id")
    swarm = start_swarm(checkpoint, [ALL], rules=AccessRules(allowed_peers=frozenset()))
    with pytest.raises(AccessDeniedError, match=r"not on its list.*--allow-peers") as refused:
        swarm.load(AutoDistributedModel, initial_peers=swarm.initial_peers, identity_path=identity)
    own_id = str(refused.value).split("listed peers in, and ")[1].split()[0]
    swarm.servers[0].resources.rules = AccessRules(allowed_peers=frozenset([own_id]))
    assert (
        run_once(swarm.load(AutoDistributedModel, initial_peers=swarm.initial_peers, identity_path=identity))
        .isfinite()
        .all()
    )
    with pytest.raises(AccessDeniedError):
        swarm.load(AutoDistributedModel)


def test_a_client_with_a_token_uses_no_server_without_it(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL])
    with pytest.raises(AccessDeniedError, match="--token-file"):
        swarm.load(AutoDistributedModel, swarm_token=TOKEN)


@pytest.mark.slow
def test_where_some_servers_refuse_others_are_used(tiny_checkpoint, start_swarm):
    checkpoint = tiny_checkpoint("llama")
    swarm = start_swarm(checkpoint, [ALL, ALL])
    model = swarm.load(AutoDistributedModel)
    closed, _ = swarm.servers
    closed.resources.rules = AccessRules(allowed_peers=frozenset())
    model = swarm.load(AutoDistributedModel)
    assert run_once(model).isfinite().all()
    assert remote_blocks(model).route()[0].peer_id != closed.node.peer_id.to_base58() or (
        remote_blocks(model).stats.retries == 0
    )


def test_a_proof_is_good_for_one_stream_one_side_and_one_pair_of_peers():
    rules = AccessRules(token=TOKEN)
    nonce = new_nonce()
    gate = Gate(rules, "QmClient", "QmServer")
    challenge = gate.answer({"nonce": nonce}).fields["nonce"]

    def proof(role: str = "client", client: str = "QmClient", server: str = "QmServer", token: str = TOKEN) -> bytes:
        return prove(token, role, client=client, server=server, client_nonce=nonce, server_nonce=challenge)

    for wrong in (
        proof(role="server"), proof(client="QmOther"), proof(server="QmOther"), proof(token="x" * 20), b"", None, 5,
    ):  # fmt: skip
        gate = Gate(rules, "QmClient", "QmServer")
        gate.answer({"nonce": nonce})
        gate._server_nonce = challenge
        assert gate.answer({"proof": wrong}).method is Method.ERROR
        assert not gate.is_open
        assert gate.answer({"proof": proof()}).method is Method.ERROR, "a challenge can be answered once"
    gate = Gate(rules, "QmClient", "QmServer")
    gate.answer({"nonce": nonce})
    gate._server_nonce = challenge
    assert gate.answer({"proof": proof()}).fields == {"proof": proof(role="server")}
    assert gate.is_open
    fresh = Gate(rules, "QmClient", "QmServer")
    fresh.answer({"nonce": nonce})
    assert fresh.answer({"proof": proof()}).method is Method.ERROR, "it was for another stream"
    assert TOKEN not in repr(rules)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# nobody\n", "names no peer"),
        ("Qm\n", "line 1"),
        ("# me\n\nhello world # x\n", "line 3"),
        (None, "cannot be read"),
    ],
    ids=["empty", "short", "words", "missing"],
)
def test_a_wrong_list_of_peers_is_an_error_before_anything_runs(text, words, tmp_path):
    path = tmp_path / "peers"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        read_peer_list(path)


def test_a_list_of_peers_may_have_comments(tmp_path):
    peer = "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"
    (tmp_path / "peers").write_text(f"# our lab\n{peer}  # Ada's laptop\n\n")
    assert read_peer_list(tmp_path / "peers") == {peer}


def test_a_token_comes_from_a_file_and_must_be_hard_to_guess(tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert read_token(tmp_path / "token") == TOKEN
    (tmp_path / "token").write_text("secret\n")
    with pytest.raises(ConfigurationError, match="at least 16"):
        read_token(tmp_path / "token")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_token(tmp_path / "none")


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_token_file_that_others_may_read_is_warned_of_once(tmp_path, caplog):
    path = tmp_path / "swarm token"
    path.write_text(TOKEN)
    path.chmod(0o640)
    assert read_token(path) == TOKEN
    assert caplog.text == ""
    path.chmod(0o644)
    assert read_token(path) == TOKEN
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{str(path)!r} has mode 644" in record.getMessage()
    assert f"`chmod 600 '{path}'`" in record.getMessage()
