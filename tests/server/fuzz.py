"""A fuzzer of the server's message handling: mutated requests and random bytes against live sessions.

    python -m tests.server.fuzz --inputs 100000

An input is one message or one piece of garbage. Meanwhile a well-behaved client asks all the time and must be answered
rightly each time. The run fails if a session ends by anything but its own will, if a request ends in an internal error
(a check that is missing), if the well-behaved client waits or is answered wrongly, or if anything stays reserved.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import msgpack
import torch

from petals_lightning.protocol.adapters import Adapter, LoraFactors, PastKeyValues
from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import FRAME_PREFIX, FrameKind, Message, Method
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.blocks.graphs import GraphCost
from petals_lightning.server.client_stream import ClientStream
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.resources import ServerResources
from tests.helpers.families import HIDDEN
from tests.helpers.fuzzing import INTS, PATIENCE, Budget, Report, main, make_span, run_clients

LIMITS = ServerLimits(
    graph_bytes=1 << 20, graph_lifetime=2.0, max_batch_tokens=64, max_message_bytes=1 << 20, max_open_requests=16,
    max_streams_per_client=4, max_client_bytes=4 << 20, max_total_bytes=16 << 20,
)  # fmt: skip


class Mutator:
    """Makes inputs: bytes to write, and whether the stream can be used after them."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._ids = itertools.count(1)

    def next(self) -> tuple[bytes, bool]:
        kind = self._random.random()
        if kind < 0.05:
            return self._random.randbytes(self._random.choice([1, 20, 21, 22, 100, 5000])), False
        message = self._request()
        if kind < 0.15:
            return self._flip(self._frames(message)), False
        if kind < 0.45:
            return self._with_wrong_header(message)
        if kind < 0.85:
            self._mutate(message)
        return self._frames(message), True

    def _request(self) -> Message:
        choose = self._random.choice
        batch, tokens = choose([1, 2]), choose([1, 3])
        hidden = torch.randn(batch, tokens, HIDDEN, generator=self._generator)
        prefix = torch.randn(2, HIDDEN, generator=self._generator) if choose([True, False]) else None
        start, end = choose([(1, 3), (1, 2), (2, 3)])
        key = choose([None, 1, 2])
        rows = torch.tensor([0], dtype=torch.int32) if choose([True, False]) else None
        forward = ForwardRequest(
            start, end, hidden, prefix, None, rows, key, keep=choose([True, False]), input_grad=choose([True, False]),
            want_prefix=choose([True, False]), want_past=choose([True, False, False]),
            wire_dtype=choose(["float32", "float16", "bfloat16", "int8_blockwise"]),
        )  # fmt: skip
        grad = torch.randn(1, HIDDEN) if rows is not None else torch.randn_like(hidden)
        match self._random.randrange(10):
            case 0 | 1 | 2:
                return forward.to_message()
            case 3 | 4:
                forward.keep = False
                return BackwardRequest(grad, forward=forward).to_message()
            case 5:
                return BackwardRequest(grad, graph=self._random.randrange(50)).to_message()
            case 8:
                fields = {"stream": choose(INTS), "call": choose(INTS), "permit": self._random.randbytes(32)}
                inner = forward.to_message()
                fields |= {"method": choose(["forward", "step", "info"]), "fields": inner.fields}
                return Message(Method.HANDOVER, fields, inner.tensors)
            case 9:
                message = forward.to_message() if choose([True, False]) else self._adapter()
                hop = {"peer": "Qm", "stream": choose(INTS), "call": choose(INTS), "permit": b"", "fields": {}}
                message.fields["route"] = choose([[hop], [hop | {"fields": message.fields.copy()}], hop, []])
                return message
            case 6:
                return Message(choose([Method.CANCEL, Method.PING, Method.INFO]))
            case _:
                return Message(Method.AUTH, {"nonce": self._random.randbytes(32)})

    def _adapter(self) -> Message:
        """Registers deep prompts or a prefix's keys and values, and LoRA, under a key that forwards name."""
        choose = self._random.choice
        start, end = choose([(1, 3), (1, 2), (2, 3)])
        deep = torch.randn(end - start, 2, HIDDEN) if choose([True, False]) else None
        blocks = tuple(range(start, end))
        a, b = torch.randn(len(blocks), 2, HIDDEN), torch.randn(len(blocks), HIDDEN, 2)
        lora = LoraFactors(choose(["self_attn.q_proj", "self_attn.o_proj", "x"]), blocks, a, b)
        keys, values = (torch.randn(len(blocks), 2, 2, choose([8, 8, 8, 4])) for _ in range(2))
        past = choose([(), (PastKeyValues(blocks, keys, values),)])
        return Adapter(start, end, deep, choose([(lora,), (lora, lora), ()]), past=past).to_message(choose([1, 2]))

    def _mutate(self, message: Message) -> None:
        """Changes up to three fields and tensors; the frame stays well-formed."""
        for _ in range(self._random.randint(1, 3)):
            target: dict[str, Any] = message.fields
            if isinstance(target.get("forward"), dict) and self._random.random() < 0.5:
                target = target["forward"]
            if message.tensors and self._random.random() < 0.5:
                name = self._random.choice(list(message.tensors))
                if self._random.random() < 0.2:
                    message.tensors[self._random.choice(["x", "hidden", "grad", "deep"])] = message.tensors.pop(name)
                else:
                    message.tensors[name] = self._tensor(message.tensors[name])
            elif target and self._random.random() < 0.8:
                name = self._random.choice(list(target))
                if self._random.random() < 0.2:
                    del target[name]
                else:
                    target[name] = self._value()
            else:
                target[self._random.choice(["start", "x", "", "forward", "graph", "ü" * 30])] = self._value()
        if self._random.random() < 0.05:
            message.method = self._random.choice(list(Method))

    def _tensor(self, like: torch.Tensor) -> torch.Tensor:
        match self._random.randrange(6):
            case 0:
                return like.to(self._random.choice([torch.int64, torch.int32, torch.bool, torch.float16]))
            case 1:
                return like.repeat(self._random.choice([1, 2, 40]), *[1] * (like.ndim - 1))
            case 2:
                return like[..., : self._random.randrange(like.shape[-1] + 1)]
            case 3:
                return like[None]
            case 4:
                return torch.full_like(like, self._random.choice([0, 1, 9, 100]))
            case _:
                return like.float() * self._random.choice([float("nan"), float("inf"), 1e38])

    def _value(self) -> Any:
        return self._random.choice(
            [None, True, False, 0.5, float("nan"), float("inf"), "", "float64", "hidden", "x" * 1000, b"\0" * 32, [],
             {}, [[[]]], {"a": {"b": []}}, [1, 2], self._random.choice(INTS), self._random.choice(INTS)]
        )  # fmt: skip

    def _with_wrong_header(self, message: Message) -> tuple[bytes, bool]:
        """The description of the tensors, or the frame's lengths, are not those of the body."""
        (_, header, *chunks), *_ = message.frames(next(self._ids))
        parsed, body = msgpack.unpackb(header), b"".join(bytes(chunk) for chunk in chunks)
        description = parsed["t"]
        if description and self._random.random() < 0.7:
            entry = self._random.choice(description)
            match self._random.randrange(4):
                case 0:
                    entry[1] = self._random.choice(["int8", "int8_blockwise", "float64", "", 5, "bool", None])
                case 1:
                    entry[2] = [self._random.choice(INTS) for _ in range(self._random.randrange(8))]
                case 2:
                    entry[self._random.randrange(3)] = self._value()
                case _:
                    description.append(list(entry))
        else:
            parsed[self._random.choice(["m", "f", "t", "x"])] = self._value()
        header = msgpack.packb(parsed)
        lengths = [len(header), len(body)]
        if self._random.random() < 0.2:
            lengths[self._random.randrange(2)] = self._random.choice([0, 1, 2**16, 2**20, 2**32 - 1])
        kind = self._random.choice([FrameKind.HEAD] * 6 + [FrameKind.MORE, 0, 255])
        return FRAME_PREFIX.pack(kind, next(self._ids), *lengths) + header + body, False

    def _flip(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self._random.choice([1, 2, 10])):
            changed[self._random.randrange(min(len(changed), self._random.choice([21, 200, 10**6])))] ^= 1 << (
                self._random.randrange(8)
            )
        return bytes(changed[: self._random.choice([len(changed), self._random.randrange(len(changed) + 1)])])

    def _frames(self, message: Message) -> bytes:
        call_id = self._random.choice([next(self._ids), next(self._ids), next(self._ids), 0, 1, 2**64 - 1])
        return b"".join(b"".join(bytes(part) for part in frame) for frame in message.frames(call_id))


async def _attack(address: tuple[str, int], mutator: Mutator, report: Report, budget: Budget) -> None:
    """One hostile client: writes inputs, reads whatever comes, begins anew when its stream has ended."""
    while budget.left > 0:
        reader, writer = await asyncio.open_connection(*address)
        replies = asyncio.create_task(_count_replies(reader, report))
        try:
            for _ in range(mutator._random.choice([1, 5, 50])):
                if budget.left <= 0 or replies.done():
                    break
                budget.left -= 1
                report.inputs += 1
                data, goes_on = mutator.next()
                writer.write(data)
                await asyncio.wait_for(writer.drain(), PATIENCE)
                if not goes_on:
                    break
            if mutator._random.random() < 0.7:
                writer.write_eof()
                await asyncio.wait_for(asyncio.shield(replies), PATIENCE)
        except ConnectionError:
            pass  # the server has ended the stream, as it may
        finally:
            replies.cancel()
            writer.close()


async def _count_replies(reader: asyncio.StreamReader, report: Report) -> None:
    replies = MessageReader(reader, max_message_bytes=1 << 24, max_open=1000)
    while (item := await replies.next()) is not None:
        report.replies[str(item[1].fields.get("code", "ok"))] += 1


@asynccontextmanager
async def _client(address: tuple[str, int]) -> AsyncIterator[Callable[[], Awaitable[torch.Tensor]]]:
    """A client as it should be: one stream from the first input to the last."""
    reader, writer = await asyncio.open_connection(*address)
    replies, requests = MessageReader(reader, max_message_bytes=1 << 24, max_open=10), MessageWriter(writer)
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    ids = itertools.count(1)

    async def ask() -> torch.Tensor:
        await requests.send(next(ids), ForwardRequest(1, 3, hidden).to_message())
        item = await replies.next()
        assert item is not None, "the well-behaved client's stream was ended"
        assert item[1].method is Method.OK, f"the well-behaved client was told {item[1].fields}"
        return item[1].tensors["hidden"]

    try:
        yield ask
    finally:
        writer.close()


async def fuzz(folder: Path, *, inputs: int, seed: int = 0, clients: int = 4) -> Report:
    """Runs `inputs` inputs from several hostile clients at once; raises AssertionError on a finding."""
    report, compute = Report(), ComputeThread().start()
    resources = ServerResources(make_span(folder), compute, LIMITS, {"hidden_size": HIDDEN})
    resources.graph_cost = GraphCost(per_token=1000.0, per_pair=0.0)
    numbers, sessions = itertools.count(), set()
    streams: dict[int, ClientStream] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sessions.add(asyncio.current_task())
        try:
            await ClientStream(resources, streams, f"QmClient{next(numbers) % 50}", reader, writer).serve()
        except Exception as e:
            report.crashes.append(f"{type(e).__name__}: {e}")
        finally:
            sessions.discard(asyncio.current_task())

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    attackers = [partial(_attack, address, Mutator(seed * 1000 + n), report) for n in range(clients)]
    try:
        await run_clients(
            report, inputs=inputs, attackers=attackers, client=_client(address), num_open=lambda: len(sessions)
        )
        left = resources.quotas.num_bytes, resources.quotas.clients, resources.graphs.num_bytes, resources.open_requests
        assert left == (0, {}, 0, 0), f"something stays reserved: {left}"
    finally:
        server.close()
        compute.stop()
    return report


def run(folder: Path, *, inputs: int, seed: int) -> Report:
    return asyncio.run(fuzz(folder, inputs=inputs, seed=seed))


if __name__ == "__main__":
    main("Fuzz the server's message handling.", run)
