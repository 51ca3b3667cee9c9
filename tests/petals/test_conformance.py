"""What a Petals client sent to a Petals server, sent to ours: the answers are the recorded ones."""

from __future__ import annotations

from contextlib import closing

import pytest
from hivemind.proto.runtime_pb2 import ExpertUID

from petals_lightning.protocol.petals.calls import read_response
from petals_lightning.protocol.petals.info import ServerInfo
from petals_lightning.swarm import SwarmNode
from tests.petals.calls import ROOM, PetalsCaller
from tests.petals.recorded import Call, recorded_calls
from tools.testing.swarms import InProcessSwarm

PREFIX, NUM_BLOCKS = "stories260K", 5
CASES = [
    "forward_backward_no_prompts-rpc_info",
    "forward_backward_no_prompts-rpc_forward",
    "forward_backward_no_prompts-rpc_backward",
    "forward_backward_stream-rpc_forward_stream",
    "forward_backward_stream-rpc_backward_stream",
    "deep_ptune_classification_step-rpc_info",
    "deep_ptune_classification_step-rpc_forward",
    "deep_ptune_classification_step-rpc_backward",
    "inference_session_rollback-rpc_inference",
    "generate_greedy-rpc_inference",
    "slice_of_blocks-rpc_forward",
]


@pytest.fixture(scope="module")
def calls() -> dict[str, Call]:
    found = {call.name: call for call in recorded_calls()}
    assert list(found) == CASES, "the recording has other cases than are tested"
    return found


@pytest.fixture(scope="module", params=["ours", "petals"])
def caller(calls, shared_data, request):
    model = shared_data / "models" / PREFIX
    with (
        InProcessSwarm(model, [(0, NUM_BLOCKS)], prefix=PREFIX, servers=request.param) as swarm,
        closing(SwarmNode(swarm.initial_peers, host_maddrs=(), client_mode=True).start()) as node,
    ):
        yield PetalsCaller(node, swarm.servers[0].node.peer_id.to_base58())


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_call_gets_the_recorded_answer(name, calls, caller):
    call = calls[name]
    if call.kind == "unary":
        responses = [caller.unary(call.method, request) for request in call.requests]
    else:
        responses = caller.stream(call.method, call.requests)
    assert len(responses) == len(call.responses)
    for got, recorded in zip(responses, call.responses, strict=True):
        if call.method == "rpc_info":
            ours, theirs = ServerInfo.from_message(got), ServerInfo.from_message(recorded)
            assert (ours.hidden_size, ours.dtype, ours.compression) == (theirs.hidden_size, theirs.dtype, 0)
            assert ours.cache_tokens_available is not None
            assert ours.cache_tokens_available > 10_000
            continue
        # Parts, sizes and dtypes are the same to the byte; values are those of another build of torch.
        for field in ("size", "dtype", "compression", "chunks"):
            assert [getattr(t, field) for t in got.tensors] == [getattr(t, field) for t in recorded.tensors]
        tensors = [read_response([message], max_bytes=ROOM) for message in (got, recorded)]
        for mine, reference in zip(*tensors, strict=True):
            assert (mine - reference).abs().max() < 1e-4


def test_a_server_may_be_asked_without_a_block(caller):
    info = ServerInfo.from_message(caller.unary("rpc_info", ExpertUID()))
    assert info.version is not None
    assert info.hidden_size is None
