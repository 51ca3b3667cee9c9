"""What a Petals server answered to a Petals client, played to ours by a real peer: the same requests, read rightly."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from hivemind.p2p import P2PContext
from hivemind.proto.runtime_pb2 import ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.client import ClientConfig, RemoteSequential
from petals_lightning.client.petals import calls as petals_calls
from petals_lightning.errors import PeerFailure, PetalsLightningError, RemoteRequestError, RetriesExhaustedError
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.petals.calls import Parts, RequestJoiner, read_response
from petals_lightning.protocol.petals.metadata import error_text
from petals_lightning.protocol.petals.methods import TransformerConnectionHandler
from petals_lightning.protocol.uids import MODELS_KEY, block_uid
from petals_lightning.swarm import SwarmDirectory, SwarmNode
from tests.petals.recorded import CALLS, Call, recorded_calls
from tools.testing.swarms import LOOPBACK

PREFIX, NUM_BLOCKS, HIDDEN = "stories260K", 5, 64
ROOM = 1 << 26
IDS = ("session_id", "step_id")


class RecordedServer(TransformerConnectionHandler):
    """Answers with what was recorded, or with errors, through hivemind's own server code."""

    def __init__(self, info: ExpertInfo):
        self.info = info
        self.requests: list[Any] = []
        self.responses: list[Any] = []
        self.error: str | None = None

    def play(self, call: Call) -> None:
        self.requests, self.responses, self.error = [], list(call.responses), None

    async def rpc_info(self, request: ExpertUID, context: P2PContext) -> ExpertInfo:
        return self.info

    async def rpc_forward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        self.requests.append(request)
        if self.error is not None:
            raise RuntimeError(self.error)
        return self.responses.pop(0)

    async def rpc_backward(self, request: ExpertRequest, context: P2PContext) -> ExpertResponse:
        return await self.rpc_forward(request, context)

    async def rpc_forward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        self.requests += [request async for request in requests]
        while self.responses:
            yield self.responses.pop(0)

    async def rpc_backward_stream(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        async for response in self.rpc_forward_stream(requests, context):
            yield response

    async def rpc_inference(
        self, requests: AsyncIterator[ExpertRequest], context: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        async for request in requests:
            yield await self.rpc_forward(request, context)


@pytest.fixture(scope="module")
def calls() -> dict[str, Call]:
    return {call.name: call for call in recorded_calls()}


@pytest.fixture(scope="module")
def server(calls) -> Iterator[tuple[RecordedServer, SwarmNode]]:
    """A peer with the recorded record in the DHT."""
    info = next(call.responses[0] for call in calls.values() if call.method == "rpc_info")
    written = json.loads(CALLS.read_text())["dht_values"][block_uid(PREFIX, 0)]
    found = re.search(r"value=(\(2, .*\}\)), expiration", written)
    assert found is not None
    value = ast.literal_eval(found[1])
    with closing(SwarmNode(host_maddrs=LOOPBACK).start()) as node:
        served = RecordedServer(info)

        async def announce() -> None:
            await TransformerConnectionHandler().add_p2p_handlers(node.p2p, wrapper=served)
            uids = [block_uid(PREFIX, block) for block in range(NUM_BLOCKS)]
            stored = await node.dht.store_many(
                uids,
                values=[value] * NUM_BLOCKS,
                subkeys=[node.peer_id.to_base58()] * NUM_BLOCKS,
                expiration_time=get_dht_time() + 600,
            )
            assert all(stored.values())
            listed = {"num_blocks": NUM_BLOCKS, "repository": None}
            await node.dht.store(MODELS_KEY, subkey=PREFIX, value=listed, expiration_time=get_dht_time() + 600)

        node.run(announce())
        yield served, node


@pytest.fixture
def connect(server):
    """`connect()` gives the model's blocks, by a client of its own."""
    opened: list[RemoteSequential] = []

    def connect(**options: Any) -> RemoteSequential:
        node = SwarmNode(server[1].visible_maddrs(), host_maddrs=(), client_mode=True).start()
        opened.append(
            RemoteSequential.connect(
                node, dht_prefix=PREFIX, num_blocks=NUM_BLOCKS, hidden_size=HIDDEN, owns_node=True,
                config=ClientConfig(**options),
            )
        )  # fmt: skip
        return opened[-1]

    yield connect
    for layers in opened:
        layers.close()


def assert_same_requests(got: list[ExpertRequest], recorded: list[ExpertRequest]) -> None:
    """Blocks, tensors to the byte and metadata, but for ids that are drawn at random and patience that we ask for."""
    recorded = [request for request in recorded if request.tensors]  # an end that is said: ours ends the stream
    assert len(got) == len(recorded)
    opening = parts(recorded[0]).metadata.get("max_length") is not None
    assert (parts(got[0]).metadata.get("alloc_timeout") is not None) == opening
    for mine, theirs in zip(map(parts, got), map(parts, recorded), strict=True):
        assert mine.uid == theirs.uid
        assert {k: v for k, v in mine.metadata.items() if k not in {*IDS, "alloc_timeout"}} == {
            k: v for k, v in theirs.metadata.items() if k not in IDS
        }
        assert mine.structure == theirs.structure
        for a, b in zip(mine.tensors, theirs.tensors, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def parts(request: ExpertRequest) -> Parts:
    joiner = RequestJoiner(max_bytes=ROOM)
    joiner.add(request)
    return joiner.finish()


def tensors_of(messages: list[ExpertResponse]) -> list[torch.Tensor]:
    return read_response(messages, max_bytes=ROOM)


def arguments(call: Call) -> list[torch.Tensor]:
    joiner = RequestJoiner(max_bytes=ROOM)
    for request in call.requests:
        joiner.add(request)
    return joiner.finish().tensors


@pytest.mark.parametrize("case", ["forward_backward_no_prompts", "forward_backward_stream"])
def test_forward_and_backward_are_as_recorded(case, calls, server, connect, monkeypatch):
    suffix = "_stream" if case.endswith("stream") else ""
    if suffix:
        monkeypatch.setattr(petals_calls, "MAX_UNARY_BYTES", 0)
    forward, backward = (calls[f"{case}-{method}{suffix}"] for method in ("rpc_forward", "rpc_backward"))
    served, layers = server[0], connect()
    hidden = arguments(forward)[0].requires_grad_()
    served.play(forward)
    out = layers(hidden)
    if not suffix:
        assert_same_requests(served.requests, forward.requests)
    else:
        assert [m.SerializeToString() for m in served.requests] == [m.SerializeToString() for m in forward.requests]
    assert (out - tensors_of(forward.responses)[0]).abs().max() < 1e-4
    served.play(backward)
    out.backward(arguments(backward)[1])
    if not suffix:
        assert_same_requests(served.requests, backward.requests)
    else:
        assert [m.SerializeToString() for m in served.requests] == [m.SerializeToString() for m in backward.requests]
    assert hidden.grad is not None
    assert (hidden.grad - tensors_of(backward.responses)[0]).abs().max() < 1e-4


def test_prompts_are_sent_once_for_all_samples_and_their_gradients_are_summed(calls, server, connect):
    forward, backward = (
        calls[f"deep_ptune_classification_step-{method}"] for method in ("rpc_forward", "rpc_backward")
    )
    served, layers = server[0], connect()
    whole, prompts = arguments(forward)
    length = prompts.shape[2]
    assert torch.equal(whole[0, :length], whole[1, :length])
    assert torch.equal(prompts[:, 0], prompts[:, 1])
    prefix, deep, hidden = (
        tensor.clone().requires_grad_() for tensor in (whole[0, :length], prompts[:, 0], whole[:, length:])
    )
    served.play(forward)
    out, _ = layers.run(hidden, prefix=prefix, adapter=Adapter(0, len(layers), deep))
    (request,) = map(parts, served.requests)
    assert torch.equal(request.tensors[0], whole)
    assert torch.equal(request.tensors[1], prompts[:, :1])
    assert (out - tensors_of(forward.responses)[0][:, length:]).abs().max() < 1e-4
    grad, (inputs, grad_prompts) = arguments(backward)[1], tensors_of(backward.responses)
    assert not grad[:, :length].any(), "nothing reads the prefix behind the last block"
    assert grad_prompts.shape == prompts.shape
    served.play(backward)
    out.backward(grad[:, length:])
    (request,) = map(parts, served.requests)
    assert torch.equal(request.tensors[1], grad)
    wanted = inputs[:, length:], inputs[:, :length].sum(0), grad_prompts.sum(1)
    for tensor, expected in zip((hidden, prefix, deep), wanted, strict=True):
        assert tensor.grad is not None
        assert (tensor.grad - expected).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["inference_session_rollback", "generate_greedy"])
def test_sessions_are_as_recorded(case, calls, server, connect):
    call = calls[f"{case}-rpc_inference"]
    served, layers = server[0], connect()
    served.play(call)
    steps = [parts(request) for request in call.requests if request.tensors]
    with layers.inference_session(max_length=steps[0].metadata["max_length"]) as session:
        for step, response in zip(steps, call.responses, strict=True):
            session.position = step.metadata["start_from_position"]
            out = session.step(step.tensors[0])
            assert (out - tensors_of([response])[0]).abs().max() < 1e-4
    assert_same_requests(served.requests, call.requests)


def test_a_slice_of_blocks_is_as_recorded(calls, server, connect):
    call = calls["slice_of_blocks-rpc_forward"]
    served, layers = server[0], connect()
    served.play(call)
    blocks = [int(uid.rpartition(".")[2]) for uid in call.requests[0].uid.split(" ")]
    assert len(blocks) < NUM_BLOCKS
    out = layers[blocks[0] : blocks[-1] + 1](arguments(call)[0])
    assert_same_requests(served.requests, call.requests)
    assert (out - tensors_of(call.responses)[0]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "error", "tries"),
    [
        ("hidden_states should be a tensor of 3 dimensions", RemoteRequestError, 2),
        ("Remote peer does not serve stories260K.0", RetriesExhaustedError, 3),
        ("Could not allocate 4096 bytes", RetriesExhaustedError, 3),
        ("CUDA error: device-side assert triggered", RetriesExhaustedError, 3),
    ],
)
def test_errors_are_ours(words, error, tries, server, connect):
    """All is tried again, here on the only one; what it says of the request is believed the second time."""
    served, layers = server[0], connect(max_retries=2, ban_period=0.2, recovery_timeout=10.0)
    served.requests, served.error = [], words
    with pytest.raises(PetalsLightningError, match=re.escape(words)) as raised:
        layers(torch.randn(1, 3, HIDDEN))
    assert type(raised.value) is error
    assert len(served.requests) == tries


@pytest.mark.parametrize("code", ErrorCode)
def test_errors_of_our_servers_carry_a_code(code):
    error = petals_calls.remote_error("12D3", error_text(code, "no room for 3 bytes"))
    assert isinstance(error, PeerFailure)
    assert (error.code, error.reason) == (code.value, "no room for 3 bytes")
    assert str(error).endswith("no room for 3 bytes")


def test_an_answer_of_another_shape_is_a_failure_of_the_server(calls, server, connect):
    served, layers = server[0], connect(max_retries=0)
    served.play(calls["forward_backward_no_prompts-rpc_forward"])
    with pytest.raises(RetriesExhaustedError, match=r"answers \[\[2, 5, 64\]\], asked for \[\[2, 7, 64\]\]"):
        layers(torch.randn(2, 7, HIDDEN))


def test_the_recorded_record_is_read(server):
    directory = SwarmDirectory(server[1])
    (listed,) = server[1].run(directory.models())
    table = server[1].run(directory.servers(PREFIX, listed.num_blocks))
    assert len(table) == NUM_BLOCKS
    for records in table:
        (record,) = records.values()
        assert (record.start, record.end, record.version, record.torch_dtype) == (0, 5, "2.3.0.dev2", "float32")
        assert (record.cache_tokens_left, record.stream_version, record.throughput) == (81920, None, 1.0)
        assert math.isfinite(record.throughput)
