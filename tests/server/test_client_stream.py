"""One client's stream, spoken to directly: what a client does wrong, in whatever order, harms nobody else."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.messages import CHUNK_BYTES, ErrorCode, Message, Method
from petals_lightning.protocol.requests import BackwardRequest
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.blocks.graphs import GraphCost
from petals_lightning.server.blocks.span import BlockSpan, SpanInputs
from petals_lightning.server.client_stream import ClientStream
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.resources import ServerResources
from petals_lightning.server.stream_requests import RegisteredAdapters
from tests.helpers.families import HIDDEN
from tests.helpers.streams import LIMITS, Client, forward


def with_stream(span: BlockSpan, talk, limits: ServerLimits = LIMITS) -> ServerResources:
    """Runs `talk(client, resources)` against a live stream; returns the resources as the stream left them."""

    async def main() -> ServerResources:
        compute = ComputeThread().start()
        resources = ServerResources(span, compute, limits, {"hidden_size": HIDDEN})
        resources.graph_cost = GraphCost(100.0, 0.0)
        ended = asyncio.Event()

        async def serve(reader, writer):
            await ClientStream(resources, {}, "QmClient", reader, writer).serve()
            ended.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            await talk(Client(reader, writer), resources)
        finally:
            writer.close()
            await asyncio.wait_for(ended.wait(), 30)
            server.close()
            compute.stop()
        return resources

    return asyncio.run(main())


def test_a_kept_graph_serves_one_backward_and_ends_with_its_stream(span):
    async def talk(client, resources):
        assert (await client.ask(forward(keep=True, input_grad=True))).fields["kept"]
        backward = BackwardRequest(torch.ones(2, 3, HIDDEN), graph=1).to_message()
        assert (await client.ask(backward)).tensors["hidden"].shape == (2, 3, HIDDEN)
        assert (await client.ask(backward)).fields["code"] == ErrorCode.GRAPH_LOST
        assert (await client.ask(forward(keep=True))).fields["kept"]
        assert resources.graphs.num_bytes > 0

    assert with_stream(span, talk).graphs.num_bytes == 0


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (forward(start=0), ErrorCode.NOT_SERVED),
        (forward(end=4), ErrorCode.NOT_SERVED),
        (forward(hidden=torch.ones(2, 3, HIDDEN + 1)), ErrorCode.BAD_REQUEST),
        (forward(hidden=torch.ones(5, 13, HIDDEN)), ErrorCode.BAD_REQUEST),
        (forward(hidden=torch.ones(8, 7, HIDDEN), prefix=torch.ones(2, HIDDEN)), ErrorCode.BAD_REQUEST),
        (forward(prefix=torch.ones(2, HIDDEN), adapter_key=9), ErrorCode.ADAPTER_LOST),
        (Message(Method.FORWARD), ErrorCode.BAD_REQUEST),
        (Message(Method.BACKWARD), ErrorCode.BAD_REQUEST),
    ],
)
def test_a_wrong_request_is_answered_and_the_stream_goes_on(message, code, span):
    async def talk(client, resources):
        reply = await client.ask(message)
        assert (reply.method, reply.fields["code"]) == (Method.ERROR, code)
        assert (await client.ask(forward())).method is Method.OK

    assert with_stream(span, talk).open_requests == 0


def test_a_registered_adapter_serves_later_requests_on_its_stream(span):
    async def talk(client, resources):
        prefix, deep = torch.ones(2, HIDDEN), torch.randn(2, 2, HIDDEN)
        await client.writer.send(100, Adapter(1, 3, deep).to_message(5))
        out, _ = span.forward(SpanInputs(1, 3, torch.ones(2, 3, HIDDEN), prefix, Adapter(1, 3, deep)))
        for _ in range(2):
            assert torch.equal((await client.ask(forward(prefix=prefix, adapter_key=5))).tensors["hidden"], out)
        reply = await client.ask(forward(prefix=torch.ones(3, HIDDEN), adapter_key=5))
        assert reply.fields["code"] == ErrorCode.BAD_REQUEST

    with_stream(span, talk)


def test_a_failure_inside_is_told_by_its_kind_only(span, monkeypatch):
    def fail(inputs):
        raise FileNotFoundError("/secret/path")

    async def talk(client, resources):
        with monkeypatch.context() as patch:
            patch.setattr(span, "forward", fail)
            reply = await client.ask(forward())
        assert reply.fields["code"] == ErrorCode.INTERNAL
        assert "FileNotFoundError" in reply.fields["message"]
        assert "secret" not in reply.fields["message"]
        assert (await client.ask(forward())).method is Method.OK

    with_stream(span, talk)


def test_requests_cancelled_at_once_leave_room_for_others(span):
    async def talk(client, resources):
        for call_id in range(100, 100 + 3 * LIMITS.max_open_requests):
            for message in (forward(), Message(Method.CANCEL)):  # both are read before the first can begin
                for frame in message.frames(call_id):
                    client.writer._writer.writelines(frame)
        assert (await client.ask(forward())).method is Method.OK
        assert resources.open_requests == 0

    with_stream(span, talk)


def test_a_request_cancelled_while_it_is_sent_does_not_end_the_stream(span):
    async def talk(client, resources):
        large = Message(Method.FORWARD, {}, {"hidden": torch.zeros(3 * CHUNK_BYTES, dtype=torch.bool)})
        for call_id in range(100, 110):
            client.writer._writer.writelines(next(iter(large.frames(call_id))))
            await client.writer.send(call_id, Message(Method.CANCEL))
        assert (await client.ask(Message(Method.PING))).method is Method.OK

    with_stream(span, talk)


@pytest.mark.slow
def test_a_broken_protocol_is_answered_and_ends_the_stream(span):
    async def talk(client, resources):
        client.writer._writer.write(b"\xff" * 100)
        call_id, reply, _ = await client.next()
        assert (call_id, reply.fields["code"]) == (0, ErrorCode.BAD_REQUEST)
        assert await client.next() is None

    with_stream(span, talk)


@pytest.mark.slow
def test_a_server_may_not_be_answered(span):
    async def talk(client, resources):
        await client.writer.send(1, Message(Method.OK))
        assert (await client.next())[1].method is Method.ERROR
        assert await client.next() is None

    with_stream(span, talk)


def test_an_answer_larger_than_its_request_is_charged_too(span):
    async def talk(client, resources):
        reply = await client.ask(forward(hidden=torch.ones(8, 7, HIDDEN, dtype=torch.float16)))
        assert reply.fields["code"] == ErrorCode.OVERLOADED
        assert "no room for the answer: this client has" in reply.fields["message"]
        assert (await client.ask(forward())).method is Method.OK

    limits = replace(LIMITS, max_client_bytes=2 * 8 * 7 * HIDDEN + 1000)
    assert with_stream(span, talk, limits).quotas.num_bytes == 0


def test_registered_adapters_are_charged_until_they_are_dropped(span):
    deep = torch.ones(2, 3, HIDDEN)

    async def talk(client, resources):
        for key in range(20):
            await client.writer.send(100, Adapter(1, 3, deep).to_message(key % 10))
        assert (await client.ask(Message(Method.PING))).method is Method.OK
        assert resources.quotas.num_bytes == 8 * deep.nbytes

    assert with_stream(span, talk).quotas.num_bytes == 0


def test_a_request_whose_adapter_found_no_room_says_so(span):
    deep, prefix, hidden = torch.ones(2, 20, HIDDEN), torch.ones(20, HIDDEN), torch.ones(1, 1, HIDDEN)

    async def talk(client, resources):
        await client.writer.send(100, Adapter(1, 3, deep).to_message(1))
        reply = await client.ask(forward(hidden=hidden, prefix=prefix, adapter_key=1))
        assert reply.fields["code"] == ErrorCode.OVERLOADED
        assert "no room for the adapter: " in reply.fields["message"]
        assert (await client.ask(forward(hidden=hidden, prefix=prefix))).method is Method.OK

    # Room for the message as it comes and for the forward, and not for the message and a copy that is kept.
    with_stream(span, talk, replace(LIMITS, max_client_bytes=300 * HIDDEN))


def test_what_a_session_was_sent_lives_no_longer_than_its_use(span):
    """No garbage collection is needed, neither between messages nor at the end of a stream."""
    kept: list[weakref.ref[torch.Tensor]] = []
    honest = RegisteredAdapters.register

    def register(adapters: RegisteredAdapters, key: int, adapter: Adapter) -> None:
        honest(adapters, key, adapter)
        kept.extend(weakref.ref(each.deep) for each in (adapter, adapters.get(key)) if each.deep is not None)

    async def talk(client, resources):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RegisteredAdapters, "register", register)
            await client.writer.send(100, Adapter(1, 3, torch.ones(2, 3, HIDDEN)).to_message(1))
            await client.ask(Message(Method.PING))
        sent, registered = kept
        assert sent() is None
        assert registered() is not None

    gc.disable()
    try:
        with_stream(span, talk)
        assert kept[1]() is None
    finally:
        gc.enable()


def test_a_kept_graph_counts_its_prefix(span):
    async def talk(client, resources):
        await client.ask(forward(keep=True))
        without = resources.graphs.num_bytes
        await client.ask(forward(keep=True, prefix=torch.ones(20, HIDDEN)))
        assert resources.graphs.num_bytes - without == without + int(2 * 20 * 100.0 * 1.05)

    with_stream(span, talk)
