"""A fuzzer of the server's Petals methods: mutated calls and random bytes, as streams and as unary calls.

    python -m tests.petals.fuzz --inputs 100000

An input is one message or one piece of garbage. It fails as tests/server/fuzz.py does: if a call ends in an internal
error (a check that is missing), if a well-behaved client waits or is answered wrongly, or if anything stays reserved.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from google.protobuf.message import DecodeError
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.datastructures import StreamInfo
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertUID
from hivemind.utils.multiaddr import Multiaddr

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.petals.calls import PetalsBackward, PetalsForward, read_response
from petals_lightning.protocol.petals.metadata import dump, load_dict, parse_error
from petals_lightning.protocol.petals.steps import NextServer, PetalsStep
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.blocks.span import BlockSpan
from petals_lightning.server.execution.compute import ComputeThread
from petals_lightning.server.petals import PetalsMethods
from petals_lightning.server.petals.methods import CallFailed
from petals_lightning.server.resources import ServerResources
from petals_lightning.swarm import SwarmNode
from tests.helpers.families import HIDDEN
from tests.helpers.fuzzing import INTS, PATIENCE, Budget, Report, main, make_span, run_clients
from tools.testing.swarms import LOOPBACK, PREFIX

LIMITS = ServerLimits(
    cache_bytes=1 << 20, cache_lifetime=5.0, max_batch_tokens=64, max_message_bytes=1 << 20, max_open_requests=8,
    max_client_bytes=4 << 20, max_total_bytes=16 << 20,
)  # fmt: skip
SILENCE = 0.1  # seconds after which the server counts as waiting for more
NOBODY = "QmS9KwZptnVdB9FFV7uGgaTq4sEKBwcYeKZDfSpyKDUd1g"
ADDRESS = Multiaddr("/ip4/127.0.0.1/tcp/1")


class Mutator:
    """Makes messages, and the bytes of streams of them."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def stream(self, method: str) -> tuple[bytes, int]:
        """What one connection sends, and how many inputs that is."""
        data, count = b"", self.random.choice([1, 1, 2, 6])
        for message in itertools.islice(self._messages(method), count):
            raw, kind = self._raw(message), b"\0"
            length = len(raw)
            if self.random.random() < 0.05:
                length = self.random.choice([0, 1, length - 1, length + 1, 2**20, 2**33, 2**64 - 1]) % 2**64
            if self.random.random() < 0.03:
                kind = self.random.choice([b"\1", b"\2", b"\xff"])
            data += kind + length.to_bytes(8, "big") + raw
        if self.random.random() < 0.05:
            data += self.random.randbytes(self.random.choice([1, 8, 9, 500]))
        elif self.random.random() < 0.8:
            data += b"\1" + bytes(8)
        return data, count

    def unary(self, method: str) -> ExpertRequest | ExpertUID:
        if method == "rpc_info":
            return ExpertUID(uid=self._uid())
        while True:
            with suppress(DecodeError):
                return ExpertRequest.FromString(self._raw(next(self._messages(method))))

    def _messages(self, method: str) -> Any:
        while True:
            if method in ("rpc_inference", "rpc_push"):
                yield self._step().to_parts().to_request()
                continue
            call = self._call("backward" in method).to_parts()
            yield from call.to_stream() if "stream" in method else [call.to_request()]

    def _call(self, backward: bool) -> PetalsForward | PetalsBackward:
        start, end = self.random.choice([(1, 3), (1, 2), (2, 3)])
        hidden, prompts = self._hidden(), self._prompts(end - start)
        if backward:
            return PetalsBackward(PREFIX, start, end, hidden, torch.randn_like(hidden), prompts)
        return PetalsForward(PREFIX, start, end, hidden, prompts)

    def _step(self) -> PetalsStep:
        choose = self.random.choice
        return PetalsStep(
            PREFIX, 1, 3, self._hidden()[:, choose([0, 0, 1]) :], self._prompts(2) if choose([True, False]) else None,
            choose([None, None, torch.tensor([0, 0])]), session_id=choose(["a", "b", "c", None]),
            step_id=choose([None, "1", "2", "3", "4"]), start_from_position=choose([None, None, 0, 1, 3]),
            max_length=choose([None, 8, 8, 40]), alloc_timeout=choose([0.0, 0.0, 0.1]),
            next_servers=choose([[], [NextServer(NOBODY, "x", 3, 4)]]), pushed=choose([True, False]),
        )  # fmt: skip

    def _hidden(self) -> torch.Tensor:
        return torch.randn(2, self.random.choice([2, 3]), HIDDEN, generator=self._generator)

    def _prompts(self, num_blocks: int) -> torch.Tensor | None:
        shape = num_blocks, self.random.choice([1, 2]), self.random.choice([1, 2]), HIDDEN
        return torch.randn(shape, generator=self._generator) if self.random.random() < 0.5 else None

    def _uid(self) -> str:
        return self.random.choice(["", PREFIX, f"{PREFIX}.1", f"{PREFIX}.1 {PREFIX}.2", f"{PREFIX}.9", "x.1", "ü" * 99])

    def _raw(self, message: ExpertRequest) -> bytes:
        """The message's bytes, in most cases after something was done to it."""
        kind = self.random.random()
        if kind < 0.6:
            for _ in range(self.random.randint(0, 3)):
                self._mutate(message)
            return message.SerializeToString()
        raw = bytearray(message.SerializeToString())
        if kind < 0.9:
            return bytes(raw)
        for _ in range(self.random.choice([1, 2, 10])):
            raw[self.random.randrange(min(len(raw), self.random.choice([100, 10**6])))] ^= 1 << self.random.randrange(8)
        return bytes(raw[: self.random.choice([len(raw), self.random.randrange(len(raw))])])

    def _mutate(self, message: ExpertRequest) -> None:
        kind = self.random.random()
        if kind < 0.1:
            message.uid = self._uid()
        elif kind < 0.2:
            message.metadata = self.random.choice([b"", self.random.randbytes(20), dump(self._value()), dump({1: 2})])
        elif kind < 0.5:
            with suppress(ProtocolError, OverflowError):  # it was changed before; the largest numbers have no msgpack
                fields = load_dict(message.metadata)
                name = self.random.choice([*fields, "output_compression", "next_servers", "args_structure", "x"])
                message.metadata = dump({**fields, name: self._value()})
        elif message.tensors:
            self._mutate_tensor(message, self.random.randrange(len(message.tensors)))

    def _mutate_tensor(self, message: ExpertRequest, number: int) -> None:
        tensor, choose = message.tensors[number], self.random.choice
        match self.random.randrange(7):
            case 0:
                tensor.dtype = choose(["", "float16", "bfloat16", "int64", "float64", "object", "x" * 100])
            case 1 if tensor.size:
                tensor.size[self.random.randrange(len(tensor.size))] = choose([0, 1, 2, 3, 64, 2**31, 2**32 - 1])
            case 2:
                tensor.size.append(choose([0, 1, 2**32 - 1]))
            case 3:
                tensor.buffer = choose([b"", tensor.buffer[:-1], tensor.buffer * 2, self.random.randbytes(1100)])
            case 4:
                tensor.compression = choose([0, 1, 2, 3, 4, 5])
            case 5:
                message.tensors.append(tensor)
            case _:
                del message.tensors[number]

    def _value(self) -> Any:
        return self.random.choice(
            [None, True, 0.5, float("nan"), float("inf"), "", "a", b"__T0", b"__T9", [], {}, [[]], ([], {}),
             ([b"__T0", b"__T0"], {}), ([b"__T1", b"__T0"], {}), [[NOBODY, "x", 3, 4]], [["", "", 3, 2**70 % 2**63]],
             [0], [1, 2], [[NOBODY]], "x" * 70_000, self.random.choice(INTS), self.random.choice([-1, 0, 1, 5, 40])]
        )  # fmt: skip


class Target:
    """A server's Petals methods: streams on a port each, unary calls directly."""

    def __init__(self, span: BlockSpan, p2p: P2P, report: Report):
        self.report, self.compute = report, ComputeThread().start()
        self.resources = ServerResources(span, self.compute, LIMITS, {})
        self.resources.cache_bytes_per_token = 256.0
        self.methods = PetalsMethods(self.resources, PREFIX, p2p)
        self._numbers, self.open = itertools.count(), 0
        self.servers: dict[str, asyncio.Server] = {}
        self.unary = {
            "rpc_info": self.methods._info, "rpc_forward": self.methods._forward_unary,
            "rpc_backward": self.methods._backward_unary, "rpc_push": self.methods._push,
        }  # fmt: skip

    def _peer(self) -> PeerID:
        return PeerID(bytes([18, 32, next(self._numbers) % 50]) + bytes(31))

    async def start(self) -> None:
        for name, method in self.methods.streams.items():

            async def serve(reader: Any, writer: Any, method: Any = method) -> None:
                self.open += 1
                try:
                    await self.methods.serve_stream(method, StreamInfo(self._peer(), ADDRESS, ""), reader, writer)
                except Exception as e:
                    self.report.crashes.append(f"{type(e).__name__}: {e}")
                finally:
                    self.open -= 1

            self.servers[name.split(".")[1]] = await asyncio.start_server(serve, "127.0.0.1", 0)

    async def call(self, method: str, request: Any) -> Any:
        context = P2PContext(method, PeerID(bytes(34)), self._peer())
        return await self.methods.answer_unary(self.unary[method], request, context)


async def _attack(target: Target, mutator: Mutator, budget: Budget) -> None:
    """One hostile client: calls of all kinds, some of which it leaves before their answer."""
    report = target.report
    while budget.left > 0:
        count = 1
        if mutator.random.random() < 0.4:
            method = mutator.random.choice(list(target.unary))
            try:
                await asyncio.wait_for(target.call(method, mutator.unary(method)), PATIENCE)
                report.replies["ok"] += 1
            except CallFailed as e:
                code, _ = parse_error(repr(e))
                report.replies[str(code)] += 1
        else:
            method = mutator.random.choice(list(target.servers))
            data, count = mutator.stream(method)
            reader, writer = await asyncio.open_connection(*target.servers[method].sockets[0].getsockname())
            try:
                writer.write(data)
                await asyncio.wait_for(writer.drain(), PATIENCE)
                if mutator.random.random() < 0.8:
                    if mutator.random.random() < 0.5:
                        writer.write_eof()
                    await _count_replies(reader, report)
            except ConnectionError:
                pass  # the server has ended the stream, as it may
            finally:
                writer.close()
        budget.left -= count
        report.inputs += count


async def _count_replies(reader: asyncio.StreamReader, report: Report) -> None:
    """Reads until the server ends the stream, or goes silent because it waits for more."""
    with suppress(asyncio.IncompleteReadError, TimeoutError):
        while True:
            kind = await asyncio.wait_for(reader.readexactly(1), SILENCE)
            body = await reader.readexactly(int.from_bytes(await reader.readexactly(8), "big"))
            code = parse_error(RPCError.FromString(body).message)[0] if kind == b"\1" else "ok"
            report.replies[str(code)] += 1


@asynccontextmanager
async def _client(target: Target) -> AsyncIterator[Callable[[], Awaitable[torch.Tensor]]]:
    """A client as it should be."""
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1))

    async def ask() -> torch.Tensor:
        request = PetalsForward(PREFIX, 1, 3, hidden).to_parts().to_request()
        context = P2PContext("rpc_forward", PeerID(bytes(34)), PeerID(bytes(34)))
        answer = await target.methods.answer_unary(target.unary["rpc_forward"], request, context)
        return read_response([answer], max_bytes=1 << 20)[0]

    yield ask


async def fuzz(span: BlockSpan, p2p: P2P, *, inputs: int, seed: int = 0, clients: int = 4) -> Report:
    """Runs `inputs` inputs from several hostile clients at once; raises AssertionError on a finding."""
    report = Report()
    target = Target(span, p2p, report)
    await target.start()
    attackers = [partial(_attack, target, Mutator(seed * 1000 + n)) for n in range(clients)]
    try:
        await run_clients(
            report, inputs=inputs, attackers=attackers, client=_client(target), num_open=lambda: target.open
        )
        assert not report.replies["None"], "an error came without its code"
        resources = target.resources
        left = resources.quotas.num_bytes, resources.quotas.clients, len(resources.caches), resources.open_requests
        assert left == (0, {}, 0, 0), f"something stays reserved: {left}"
        assert target.methods._sessions == {}
    finally:
        for server in target.servers.values():
            server.close()
        target.compute.stop()
    return report


def run(folder: Path, *, inputs: int, seed: int) -> Report:
    with closing(SwarmNode(host_maddrs=LOOPBACK).start()) as node:
        return node.run(fuzz(make_span(folder), node.p2p, inputs=inputs, seed=seed))


if __name__ == "__main__":
    main("Fuzz the server's Petals methods.", run)
