"""What a server refuses Petals clients, with which words, and that it costs nothing."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertUID

from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.petals.calls import PetalsBackward, PetalsForward, read_response
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.swarm import SwarmNode
from tests.helpers.families import HIDDEN, NUM_BLOCKS
from tests.petals.calls import ROOM, SPLIT, PetalsCaller, failure, peer_id, step
from tools.testing.swarms import PREFIX

B, S, P = 2, 7, 3


@pytest.mark.slow
def test_wrong_requests_are_told_why(callers):
    caller, hidden = callers[1], torch.randn(B, S, HIDDEN)
    good = PetalsForward(PREFIX, 0, SPLIT, hidden)

    def forward(**changes):
        return failure(lambda: caller.forward(replace(good, **changes)))

    def backward(grad, **changes):
        return failure(lambda: caller.backward(PetalsBackward(PREFIX, 0, SPLIT, hidden, grad, **changes)))

    cases = [
        (forward(end=3), ErrorCode.NOT_SERVED, "0:2"),
        (forward(prefix="other"), ErrorCode.NOT_SERVED, "of 'tiny'"),
        (forward(active_adapter="lora"), ErrorCode.NOT_SERVED, "no adapter"),
        (forward(hidden=torch.randn(B, S, 8)), ErrorCode.BAD_REQUEST, "hidden size 8"),
        (forward(hidden=torch.ones(B, S, HIDDEN, dtype=torch.int64)), ErrorCode.BAD_REQUEST, "int64"),
        (forward(hidden=torch.randn(B, 300, HIDDEN)), ErrorCode.BAD_REQUEST, "up to 512"),
        (forward(hidden=torch.randn(S, HIDDEN)), ErrorCode.BAD_REQUEST, r"[B, S, H]"),
        (forward(prompts=torch.randn(3, B, P, HIDDEN)), ErrorCode.BAD_REQUEST, "prompts"),
        (forward(prompts=torch.randn(2, B, S + 1, HIDDEN)), ErrorCode.BAD_REQUEST, "at most 7"),
        (forward(prompts=torch.randn(2, B + 1, P, HIDDEN)), ErrorCode.BAD_REQUEST, "2 or 1"),
        (forward(output_compression=[5]), ErrorCode.BAD_REQUEST, "output_compression"),
        (backward(torch.randn(B, S + 1, HIDDEN)), ErrorCode.BAD_REQUEST, "not like the inputs"),
        (failure(lambda: caller.unary("rpc_info", ExpertUID(uid=f"{PREFIX}.3"))), ErrorCode.NOT_SERVED, "0:2"),
        (failure(lambda: caller.unary("rpc_forward", ExpertRequest(uid="x"))), ErrorCode.BAD_REQUEST, ""),
    ]  # fmt: skip
    for (code, words), expected_code, expected_words in cases:
        assert code is expected_code, words
        assert expected_words in words
    assert caller.forward(good).shape == hidden.shape


OPENING = step(torch.ones(1, 1, HIDDEN), max_length=3)


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        ([step(torch.ones(1, 1, HIDDEN))], ErrorCode.BAD_REQUEST, "max_length"),
        ([step(torch.ones(1, 4, HIDDEN), max_length=3)], ErrorCode.BAD_REQUEST, "max_length 3"),
        ([step(torch.ones(1, 1, HIDDEN), max_length=10**6)], ErrorCode.OVERLOADED, "no room for the keys and values"),
        ([step(torch.ones(1, 1, HIDDEN), max_length=3, start_from_position=1)], ErrorCode.BAD_REQUEST, "0 positions"),
        ([OPENING, step(torch.ones(2, 1, HIDDEN))], ErrorCode.BAD_REQUEST, "batch"),
        ([OPENING, step(torch.ones(1, 1, HIDDEN), 1)], ErrorCode.BAD_REQUEST, "1:4"),
        ([step(torch.ones(1, 1, HIDDEN), max_length=3, active_adapter="x")], ErrorCode.NOT_SERVED, "adapter"),
        ([step(torch.ones(10**6, 0, HIDDEN), max_length=0)], ErrorCode.BAD_REQUEST, "up to 512"),
    ],
)  # fmt: skip
def test_wrong_steps_end_their_session_with_a_reason(steps, code, words, callers):
    session = callers[0].open_session()
    *good, bad = steps
    for item in good:
        session.step(item)
    got_code, got_words = failure(lambda: session.step(bad))
    assert (got_code, words in got_words) == (code, True), got_words


def test_room_for_a_session_is_waited_for(callers):
    large = step(torch.ones(1, 1, HIDDEN), max_length=1200)  # two of it are over the budget
    first = callers[0].open_session()
    first.step(large)
    code, _ = failure(lambda: callers[0].open_session().step(large))
    assert code is ErrorCode.OVERLOADED
    second = callers[0].open_session()
    second.send(replace(large, alloc_timeout=20.0))
    first.end()
    assert second.receive().shape == (1, 1, HIDDEN)
    second.end()


def test_requests_over_the_limits_are_refused_before_they_are_read(swarm, client, callers):
    huge = PetalsForward(PREFIX, 0, SPLIT, torch.zeros(1, 10_000, HIDDEN)).to_parts().to_stream()
    code, words = failure(lambda: callers[1].stream("rpc_forward_stream", huge))
    assert code is ErrorCode.BAD_REQUEST
    assert "limit" in words

    async def claim(length: int) -> bytes:
        """What a peer is told that claims to send so much, and sends nothing."""
        name = "TransformerConnectionHandler.rpc_inference"
        _, reader, writer = await client.p2p.call_binary_stream_handler(swarm.servers[1].node.peer_id, name)
        writer.write(b"\0" + length.to_bytes(8, "big"))
        try:
            return await asyncio.wait_for(reader.readuntil(b"bytes"), 10)
        finally:
            writer.close()

    assert f"bad_request: a message of {2**60} bytes".encode() in client.run(claim(2**60))


def test_a_client_may_have_so_much_open_and_no_more(tiny_checkpoint, start_swarm):
    limits = ServerLimits(max_open_requests=3, max_client_bytes=64 << 10)
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 1)], limits=limits)
    with closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node:
        caller = PetalsCaller(node, peer_id(swarm.servers[0]))
        sessions = [caller.open_session() for _ in range(3)]
        for session in sessions:
            session.step(step(torch.ones(1, 1, HIDDEN), 0, 1, max_length=4))
        code, words = failure(lambda: caller.forward(PetalsForward(PREFIX, 0, 1, torch.ones(1, 1, HIDDEN))))
        assert (code, "requests open" in words) == (ErrorCode.OVERLOADED, True)
        for session in sessions:
            session.end()
        code, words = failure(lambda: caller.forward(PetalsForward(PREFIX, 0, 1, torch.ones(1, 600, HIDDEN))))
        assert (code, "MiB open, its limit is 0.0625 MiB" in words) == (ErrorCode.OVERLOADED, True)
        assert caller.forward(PetalsForward(PREFIX, 0, 1, torch.ones(1, 1, HIDDEN))).shape == (1, 1, HIDDEN)


@pytest.mark.parametrize(
    "rules", [AccessRules(allowed_peers=frozenset()), AccessRules(token="x" * 20)], ids=["list", "token"]
)
def test_strangers_are_refused_every_method(rules, tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, 1)], rules=rules)
    with closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node:
        server, hidden = swarm.servers[0], torch.ones(1, 2, HIDDEN)
        caller, computed = PetalsCaller(node, peer_id(server)), []
        server.span.forward = lambda inputs, *cached: computed.append(inputs)
        server.span.step = lambda *args, **kwargs: computed.append(args)
        forward, backward = PetalsForward(PREFIX, 0, 1, hidden), PetalsBackward(PREFIX, 0, 1, hidden, hidden)
        calls = [
            lambda: caller.unary("rpc_info", ExpertUID(uid=f"{PREFIX}.0")),
            lambda: caller.forward(forward),
            lambda: caller.backward(backward),
            lambda: caller.unary("rpc_push", step(hidden, 0, 1, session_id="x").to_parts().to_request()),
            lambda: caller.stream("rpc_forward_stream", forward.to_parts().to_stream()),
            lambda: caller.stream("rpc_backward_stream", backward.to_parts().to_stream()),
            lambda: caller.open_session().step(step(hidden, 0, 1, max_length=4)),
        ]
        for call in calls:
            assert failure(call)[0] is ErrorCode.NOT_ALLOWED
        assert computed == []
        assert not server.resources.quotas.clients


@pytest.mark.slow
def test_answers_that_are_too_large_for_one_message_are_refused_and_streamed(tiny_checkpoint, start_swarm):
    swarm = start_swarm(tiny_checkpoint("llama"), [(0, NUM_BLOCKS)], dtype="bfloat16")
    with closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node:
        caller, hidden = PetalsCaller(node, peer_id(swarm.servers[0])), torch.randn(260, 60, HIDDEN).bfloat16()
        request = PetalsBackward(
            PREFIX, 0, NUM_BLOCKS, hidden, hidden, torch.ones(NUM_BLOCKS, 1, 60, HIDDEN).bfloat16()
        )
        code, words = failure(lambda: caller.backward(request))
        assert (code, "call the _stream method" in words) == (ErrorCode.BAD_REQUEST, True)
        responses = caller.stream("rpc_backward_stream", request.to_parts().to_stream())
        grads = read_response(responses, max_bytes=ROOM)
        assert [list(grad.shape) for grad in grads] == [[260, 60, HIDDEN], [NUM_BLOCKS, 260, 60, HIDDEN]]
        assert {grad.dtype for grad in grads} == {torch.bfloat16}  # as the blocks run, in two bytes a value
        assert sum(response.ByteSize() for response in responses) < 2.1 * sum(grad.numel() for grad in grads)
        assert all(response.ByteSize() < 4.1 * 2**20 for response in responses)
