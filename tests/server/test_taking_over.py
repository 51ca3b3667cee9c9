"""What one server hands over to another is its client's request, by the client's permit, at the client's expense."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.handover import Hop, UsedCalls, carried_tensors, make_permit, read_route, split_reply
from petals_lightning.protocol.messages import CHUNK_BYTES, ErrorCode, Message, Method
from petals_lightning.protocol.requests import ForwardRequest
from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server import peer_links
from petals_lightning.server.access.rules import AccessRules
from petals_lightning.server.blocks.graphs import GraphCost
from petals_lightning.server.blocks.span import BlockSpan, SpanInputs
from petals_lightning.server.client_stream import ClientStream
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.resources import ServerResources
from tests.helpers.families import HIDDEN
from tests.helpers.streams import LIMITS, Client, forward

CLIENT, SERVER = "QmClient", "QmServer"


def with_streams(span: BlockSpan, talk, rules: AccessRules | None = None) -> ServerResources:
    """Runs `talk(client, server, resources)`: the other ends of a client's and of a server's stream."""

    async def main() -> ServerResources:
        compute = ComputeThread().start()
        resources = ServerResources(span, compute, LIMITS, {"hidden_size": HIDDEN}, rules=rules)
        resources.graph_cost = GraphCost(100.0, 0.0)
        resources.cache_bytes_per_token = 100.0
        streams: dict[int, ClientStream] = {}
        peers, ended = [CLIENT, SERVER], asyncio.Semaphore(0)

        async def serve(reader, writer):
            await ClientStream(resources, streams, peers.pop(0), reader, writer).serve()
            ended.release()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        ends = []
        for _ in range(2):
            ends.append(await asyncio.open_connection(*listening.sockets[0].getsockname()))
            while len(peers) + len(ends) > 2:
                await asyncio.sleep(0.01)
        try:
            await talk(*(Client(*end) for end in ends), resources)
        finally:
            for _, writer in ends:
                writer.close()
            for _ in ends:
                await asyncio.wait_for(ended.acquire(), 30)
            listening.close()
            compute.stop()
        assert (resources.quotas.num_bytes, resources.quotas.clients, streams) == (0, {}, {})
        return resources

    return asyncio.run(main())


async def permitted(client: Client, request: Message, call: int, bearer: str = SERVER) -> Message:
    """The handover of a request under the client's call id `call`."""
    info = (await client.ask(Message(Method.INFO))).fields
    permit = make_permit(info["stream_key"], bearer, call)
    fields = {"stream": info["stream"], "call": call, "permit": permit, "method": request.method.value}
    return Message(Method.HANDOVER, {**fields, "fields": request.fields}, request.tensors)


def step(position: int, *, opens: bool = False) -> Message:
    hidden = torch.ones(1, 1, HIDDEN) * (position + 1)
    return StepRequest(7, 1, 3, hidden, position, max_length=9 if opens else None).to_message()


@pytest.mark.parametrize("rules", [None, AccessRules(allowed_peers=frozenset([CLIENT]))], ids=["open", "private"])
def test_a_permitted_request_is_answered_on_the_clients_stream(rules, span):
    async def talk(client, server, resources):
        expected = (await client.ask(forward())).tensors["hidden"]
        assert (await server.ask(await permitted(client, forward(), 50))).method is Method.OK
        call_id, reply, _ = await client.next()
        assert call_id == 50
        assert torch.equal(reply.tensors["hidden"], expected)

    with_streams(span, talk, rules)


def test_it_counts_on_the_clients_share_from_its_first_byte(span, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    honest = span.forward

    def wait(inputs):
        begun.set()
        assert go_on.wait(30)
        return honest(inputs)

    monkeypatch.setattr(span, "forward", wait)

    async def talk(client, server, resources):
        size = 2 * 3 * HIDDEN * 4
        await server.ask(await permitted(client, forward(), 50))
        assert await asyncio.to_thread(begun.wait, 30)
        accounts = resources.quotas.clients
        assert (accounts[CLIENT].requests, accounts[CLIENT].num_bytes) == (1, size)
        assert (accounts[SERVER].requests, accounts[SERVER].num_bytes) == (0, 0)
        standings = (await client.ask(Message(Method.PING))).fields["calls"]
        assert standings == [[50, 0]], "the client is told where its request stands"
        go_on.set()
        assert (await client.next())[0] == 50
        large = await permitted(client, Message(Method.FORWARD, {}, {"hidden": torch.zeros(3 * CHUNK_BYTES)}), 51)
        server.writer._writer.writelines(next(iter(large.frames(60))))
        while not accounts[CLIENT].num_bytes:
            await asyncio.sleep(0.01)
        assert accounts[CLIENT].num_bytes == CHUNK_BYTES, "what has come counts, not what is announced"
        server.writer.close()  # in the middle of it
        while accounts[CLIENT].num_bytes:
            await asyncio.sleep(0.01)

    with_streams(span, talk)


@pytest.mark.parametrize("wrong", ["bearer", "call", "stream", "permit"])
def test_without_the_clients_permit_nothing_is_taken(wrong, span):
    async def talk(client, server, resources):
        message = await permitted(client, forward(), 50, bearer="QmOther" if wrong == "bearer" else SERVER)
        changes = {"call": 51, "stream": 10**9, "permit": b"x" * 32}
        if wrong in changes:
            message.fields[wrong] = changes[wrong]
        reply = await server.ask(message)
        assert (reply.method, reply.fields["code"]) == (Method.ERROR, ErrorCode.NOT_ALLOWED)
        assert resources.open_requests == 0
        assert (await client.ask(Message(Method.PING))).method is Method.OK, "the client hears nothing of it"

    with_streams(span, talk)


def test_what_the_client_gave_up_or_has_already_is_not_run_again(span, monkeypatch):
    runs, honest = [], span.forward
    monkeypatch.setattr(span, "forward", lambda inputs: runs.append(1) or honest(inputs))

    async def talk(client, server, resources):
        await client.writer.send(50, Message(Method.CANCEL))
        reply = await server.ask(await permitted(client, forward(), 50))
        assert "given up by its client" in reply.fields["message"]
        assert runs == []
        copies = await permitted(client, forward(), 51)
        for frames in (copies.frames(1000), copies.frames(1001)):
            for frame in frames:
                server.writer._writer.writelines(frame)
        assert [(await server.next())[1].method for _ in range(2)] == [Method.OK, Method.ERROR]
        assert (await client.next())[0] == 51
        reply = await server.ask(await permitted(client, forward(), 51))
        assert (reply.fields["code"], "good once" in reply.fields["message"]) == (ErrorCode.NOT_ALLOWED, True)
        assert (await client.ask(Message(Method.PING))).fields["calls"] == []
        assert len(runs) == 1

    with_streams(span, talk)


def test_used_calls_are_remembered_within_bounds_and_never_come_back():
    used = UsedCalls()
    calls = [call + 1 if call % 2 else call - 1 for call in range(1, 20_001)]  # in pairs that change places
    assert all(used.add(call) for call in calls)
    assert not any(used.add(call) for call in calls)
    assert len(used._ids) == len(used._lowest) < 5000


def test_a_step_that_comes_after_a_newer_one_is_refused(span):
    async def talk(client, server, resources):
        for call, message in ((1, step(0, opens=True)), (100, step(1))):
            await client.writer.send(call, message)
            assert (await client.next())[1].method is Method.OK
        assert (await server.ask(await permitted(client, step(1), 99))).method is Method.OK
        call, reply, _ = await client.next()
        assert (call, reply.fields["code"]) == (99, ErrorCode.BAD_REQUEST)
        assert "newer step" in reply.fields["message"]

    with_streams(span, talk)


def test_a_request_waits_for_an_adapter_that_comes_another_way(span, monkeypatch):
    prefix, deep = torch.ones(2, HIDDEN), torch.randn(2, 2, HIDDEN)

    async def talk(client, server, resources):
        expected, _ = span.forward(SpanInputs(1, 3, torch.ones(2, 3, HIDDEN), prefix, Adapter(1, 3, deep)))
        await server.ask(await permitted(client, forward(prefix=prefix, adapter_key=5), 50))
        await client.writer.send(51, Adapter(1, 3, deep).to_message(5))
        call, reply, _ = await client.next()
        assert call == 50
        assert torch.equal(reply.tensors["hidden"], expected)
        monkeypatch.setattr("petals_lightning.server.stream_requests._ADAPTER_TIMEOUT", 0.05)
        await server.ask(await permitted(client, forward(prefix=prefix, adapter_key=6), 60))
        assert (await client.next())[1].fields["code"] == ErrorCode.ADAPTER_LOST

    with_streams(span, talk)


def test_a_server_without_links_says_so(span):
    hop = Hop("QmNext", 1, 1, b"", forward().fields)

    async def talk(client, server, resources):
        request = forward()
        request.fields["route"] = [hop.to_value()]
        reply = await client.ask(request)
        assert reply.fields["code"] == ErrorCode.NOT_HANDED_OVER
        routes: list[Any] = ["x", [1], [{}], [hop.to_value()] * 300, [replace(hop, fields={}).to_value()]]
        for route in routes:
            request.fields["route"] = route
            assert (await client.ask(request)).fields["code"] == ErrorCode.BAD_REQUEST

    with_streams(span, talk)


def test_a_link_whose_other_end_takes_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(peer_links, "_ANSWER_TIMEOUT", 0.2)

    async def main() -> None:
        writers = []
        silent = await asyncio.start_server(lambda reader, writer: writers.append(writer), "127.0.0.1", 0)
        link = peer_links.PeerLink(*await asyncio.open_connection(*silent.sockets[0].getsockname()))
        with pytest.raises(ConnectionError, match="does not take"):
            await link.send(forward())
        assert not link.is_open
        with pytest.raises(ConnectionError, match="ended"):
            await link.send(forward())
        writers[0].close()
        silent.close()
        await asyncio.sleep(0.05)

    asyncio.run(main())


def test_replies_are_split_between_the_next_server_and_the_client():
    fields = {"wire_dtype": "bfloat16"}
    route = [Hop("QmA", 1, 2, b"p", fields), Hop("QmB", 3, 4, b"q", fields)]
    out, prefix, deep, rows = torch.ones(2, 3, 4), torch.ones(2, 4), torch.ones(1, 2, 4), torch.zeros(1).int()
    request = ForwardRequest(0, 1, out, rows=rows).to_message()
    carried = carried_tensors(request)
    assert list(carried) == ["rows"]
    reply = Message(Method.OK, {"kept": True}, {"hidden": out, "prefix": prefix})
    onward, home = split_reply(Method.FORWARD, reply, carried, route)
    assert {name: tensor.dtype for name, tensor in onward.tensors.items()} == {
        "hidden": torch.bfloat16, "prefix": torch.bfloat16, "rows": torch.int32,
    }  # fmt: skip
    assert (home.fields, home.tensors) == ({"kept": True}, {})
    assert read_route(onward.fields["fields"]) == route[1:]
    reply = Message(Method.OK, {}, {"hidden": out, "prefix": prefix, "deep": deep})
    onward, home = split_reply(Method.BACKWARD, reply, {}, route)
    assert set(onward.tensors) == {"grad", "grad_prefix"}
    assert set(home.tensors) == {"deep"}
    onward, home = split_reply(Method.STEP, Message(Method.OK, {}, {"hidden": out}), {}, route)
    assert set(onward.tensors) == set(home.tensors) == {"hidden"}
