"""A fuzzer of the server's message handling: mutated requests and random bytes against live sessions.

    python -m tests.server.fuzz --inputs 100000

An input is one message or one piece of garbage. Meanwhile a well-behaved client asks all the time and must be answered
rightly each time. The run fails if a session ends by anything but its own will, if a request ends in an internal error
(a check that is missing), if the well-behaved client waits or is answered wrongly, or if anything stays reserved.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import msgpack
import psutil
import torch
from transformers import AutoModel

from petals_lightning.hf import Checkpoint, Part, load_pruned
from petals_lightning.hf.loading import model_class
from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import FRAME_PREFIX, FrameKind, Message, Method
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest
from petals_lightning.server.backend import Backend
from petals_lightning.server.compute import ComputeThread
from petals_lightning.server.graphs import GraphCost
from petals_lightning.server.limits import ServerLimits
from petals_lightning.server.session import Session
from petals_lightning.server.span import BlockSpan
from tests.families import HIDDEN, TINY_CONFIGS, save_tiny_checkpoint

LIMITS = ServerLimits(
    graph_bytes=1 << 20, graph_lifetime=2.0, max_batch_tokens=64, max_message_bytes=1 << 20, max_open_requests=16,
    max_streams_per_client=4, max_client_bytes=4 << 20, max_total_bytes=16 << 20,
)  # fmt: skip
PATIENCE = 20.0  # seconds after which the server counts as hung
INTS = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**64 - 1]


@dataclass
class Report:
    """What a run has seen."""

    inputs: int = 0
    replies: Counter[str] = field(default_factory=Counter)
    served: int = 0
    longest_wait: float = 0.0
    rss_growth: int = 0
    seconds: float = 0.0
    crashes: list[str] = field(default_factory=list)


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
        key = choose([None, 1, 2]) if prefix is not None else None
        deep = torch.randn(end - start, 2, HIDDEN) if prefix is not None and choose([True, False]) else None
        rows = torch.tensor([0], dtype=torch.int32) if choose([True, False]) else None
        forward = ForwardRequest(
            start, end, hidden, prefix, deep, rows, key, keep=choose([True, False]), input_grad=choose([True, False]),
            want_prefix=choose([True, False]), wire_dtype=choose(["float32", "float16", "bfloat16", "int8_blockwise"]),
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
                message = forward.to_message() if choose([True, False]) else Message(Method.PROMPTS, {"key": 1})
                hop = {"peer": "Qm", "stream": choose(INTS), "call": choose(INTS), "permit": b"", "fields": {}}
                message.fields["route"] = choose([[hop], [hop | {"fields": message.fields.copy()}], hop, []])
                return message
            case 6:
                return Message(choose([Method.CANCEL, Method.PING, Method.INFO]))
            case _:
                return Message(Method.AUTH, {"nonce": self._random.randbytes(32)})

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


def make_span(folder: Path) -> BlockSpan:
    checkpoint = Checkpoint(str(save_tiny_checkpoint(TINY_CONFIGS["llama"](), folder)))
    model, layout = load_pruned(model_class(AutoModel, checkpoint), checkpoint, Part(1, 3, ends=False))
    return BlockSpan(model, layout, 1)


async def _attack(address: tuple[str, int], mutator: Mutator, budget: list[int], report: Report) -> None:
    """One hostile client: writes inputs, reads whatever comes, begins anew when its stream has ended."""
    while budget[0] > 0:
        reader, writer = await asyncio.open_connection(*address)
        replies = asyncio.create_task(_count_replies(reader, report))
        try:
            for _ in range(mutator._random.choice([1, 5, 50])):
                if budget[0] <= 0 or replies.done():
                    break
                budget[0] -= 1
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


async def _behave(address: tuple[str, int], span: BlockSpan, stop: asyncio.Event, report: Report) -> None:
    """A client as it should be: one stream from the first input to the last."""
    reader, writer = await asyncio.open_connection(*address)
    replies, requests = MessageReader(reader, max_message_bytes=1 << 24, max_open=10), MessageWriter(writer)
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = None
    for call_id in itertools.count(1):
        began = time.monotonic()
        await requests.send(call_id, ForwardRequest(1, 3, hidden).to_message())
        item = await asyncio.wait_for(replies.next(), PATIENCE)
        assert item is not None, "the well-behaved client's stream was ended"
        assert item[1].method is Method.OK, f"the well-behaved client was told {item[1].fields}"
        got = item[1].tensors["hidden"]
        expected = expected if expected is not None else got
        assert torch.equal(got, expected), "the well-behaved client was answered wrongly"
        report.served += 1
        report.longest_wait = max(report.longest_wait, time.monotonic() - began)
        if stop.is_set():
            break
        await asyncio.sleep(0.01)
    writer.close()


async def fuzz(span: BlockSpan, *, inputs: int, seed: int = 0, clients: int = 4) -> Report:
    """Runs `inputs` inputs from several hostile clients at once; raises AssertionError on a finding."""
    report, compute = Report(), ComputeThread()
    backend = Backend(span, compute, LIMITS, {"hidden_size": HIDDEN})
    backend.graph_cost = GraphCost(per_token=1000.0, per_pair=0.0)
    numbers, sessions = itertools.count(), set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sessions.add(asyncio.current_task())
        try:
            await Session(backend, f"QmClient{next(numbers) % 50}", reader, writer).serve()
        except Exception as e:
            report.crashes.append(f"{type(e).__name__}: {e}")
        finally:
            sessions.discard(asyncio.current_task())

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address, stop, budget = server.sockets[0].getsockname(), asyncio.Event(), [inputs]
    honest = asyncio.create_task(_behave(address, span, stop, report))
    await asyncio.sleep(0.1)
    began, process, early = time.monotonic(), psutil.Process(), 0

    async def measure() -> None:
        nonlocal early
        while not early and budget[0] > 0.8 * inputs:  # after a fifth: caches and allocators are warm
            await asyncio.sleep(0.02)
        early = process.memory_info().rss

    attackers = [_attack(address, Mutator(seed * 1000 + n), budget, report) for n in range(clients)]
    try:
        await asyncio.gather(measure(), *attackers)
        stop.set()
        await honest
        deadline = time.monotonic() + PATIENCE
        while sessions and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert not sessions, f"{len(sessions)} sessions hang"
        report.rss_growth = process.memory_info().rss - early
        report.seconds = time.monotonic() - began
        assert not report.crashes, report.crashes[:5]
        assert not report.replies["internal"], f"{report.replies['internal']} requests ended in internal errors"
        left = backend.accounts.num_bytes, backend.accounts._accounts, backend.graphs.num_bytes, backend.under_way
        assert left == (0, {}, 0, 0), f"something stays reserved: {left}"
    finally:
        honest.cancel()
        server.close()
        compute.stop()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the server's message handling.")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(fuzz(make_span(Path(folder)), inputs=arguments.inputs, seed=arguments.seed))
    print(f"{report.inputs} inputs in {report.seconds:.0f} s; replies: {dict(report.replies.most_common())}")
    print(f"a well-behaved client was served {report.served} times, at most after {report.longest_wait:.2f} s")
    print(f"memory grew by {report.rss_growth / 2**20:.1f} MiB after the first fifth; no crash, no hang, nothing left")


if __name__ == "__main__":
    main()
