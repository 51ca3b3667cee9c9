"""Messages as frames on a stream: what is sent arrives, limits hold, and no bytes do worse than a ProtocolError."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.framing import MessageReader, MessageWriter
from petals_lightning.protocol.messages import (
    CHUNK_BYTES,
    FRAME_PREFIX,
    MAX_HEADER_BYTES,
    FrameKind,
    Message,
    Method,
)
from petals_lightning.protocol.tensors import DTYPES, unpack_tensors

LIMIT = 64 << 20


def wire(message: Message, call_id: int) -> list[bytes]:
    """The message's frames as bytes."""
    return [b"".join(bytes(buffer) for buffer in frame) for frame in message.frames(call_id)]


def raw(kind: int, call_id: int, header: bytes = b"", chunk: bytes = b"") -> bytes:
    return FRAME_PREFIX.pack(kind, call_id, len(header), len(chunk)) + header + chunk


def head(tensors: Any = (), method: str = "forward", fields: object = None) -> bytes:
    return msgpack.packb({"m": method, "f": fields if fields is not None else {}, "t": list(tensors)})


def read_all(data: bytes, *, max_message_bytes: int = LIMIT, max_open: int = 8) -> list[tuple[int, Message, int]]:
    """Feeds bytes to a reader until they end."""

    async def read() -> list[tuple[int, Message, int]]:
        stream = asyncio.StreamReader()
        stream.feed_data(data)
        stream.feed_eof()
        reader = MessageReader(stream, max_message_bytes=max_message_bytes, max_open=max_open)
        found = []
        while (item := await reader.next()) is not None:
            found.append(item)
        return found

    return asyncio.run(read())


def assert_same(got: Message, sent: Message) -> None:
    assert (got.method, got.fields, list(got.tensors)) == (sent.method, sent.fields, list(sent.tensors))
    for name, tensor in sent.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert got.tensors[name].shape == tensor.shape
        # as bytes: NaN is a value like any other on the wire
        assert got.tensors[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_arrives(dtype):
    values = torch.tensor([[0.0, -1.5, 3.0], [7.25, 1e4, -0.0]])
    sent = Message(Method.OK, {}, {"t": values.to(dtype), "scalar": torch.ones((), dtype=dtype)})
    ((call_id, got, _),) = read_all(b"".join(wire(sent, 3)))
    assert call_id == 3
    assert_same(got, sent)


def test_quantised_messages_arrive_and_count_as_what_they_become():
    sent = {
        "hidden": torch.randn(3, 7, 100), "half": torch.randn(5).half(), "rows": torch.arange(3),
        "empty": torch.ones(0), "scalar": torch.tensor(0.3), "last": torch.randn(2, 64).T,
    }  # fmt: skip
    data = b"".join(wire(Message(Method.FORWARD, {}, sent, int8_blockwise=True), 1))
    ((_, got, num_bytes),) = read_all(data)
    assert num_bytes == len(data) < 0.5 * sum(tensor.nbytes for tensor in sent.values())
    for name, tensor in sent.items():
        assert (got.tensors[name].shape, got.tensors[name].dtype) == (tensor.shape, tensor.dtype)
        is_rounded = name in ("hidden", "last")
        assert torch.allclose(got.tensors[name], tensor, atol=0.02 if is_rounded else 0.0)
        assert torch.equal(got.tensors[name], tensor) == (not is_rounded)
    body = num_bytes - FRAME_PREFIX.size - len(data[FRAME_PREFIX.size :].split(b"last")[0])
    assert got.reserved > body + 4 * (3 * 7 * 100 + 2 * 64) - 100  # what came, and what it became
    with pytest.raises(ProtocolError, match="over this peer's limit"):
        read_all(data, max_message_bytes=got.reserved - 1)
    assert read_all(data, max_message_bytes=got.reserved)


def test_tensors_that_are_not_contiguous_arrive():
    sent = Message(Method.OK, {}, {"t": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1)})
    assert torch.equal(read_all(b"".join(wire(sent, 1)))[0][1].tensors["t"], sent.tensors["t"])


_shapes = st.lists(st.integers(0, 5), max_size=5)
_fields = st.dictionaries(st.text(max_size=5), st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=9))


@settings(deadline=None)
@given(st.lists(st.tuples(_shapes, st.sampled_from(list(DTYPES.values()))), max_size=5), _fields, st.integers(0))
def test_messages_of_any_shapes_arrive_and_their_bytes_are_counted(described, fields, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    tensors = {
        f"t{number}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for number, (shape, dtype) in enumerate(described)
    }
    sent = Message(Method.BACKWARD, fields, tensors)
    data = b"".join(wire(sent, 2**64 - 1))
    ((call_id, got, num_bytes),) = read_all(data)
    assert (call_id, num_bytes) == (2**64 - 1, len(data))
    assert_same(got, sent)


def test_long_messages_go_one_after_another_and_short_ones_in_between():
    async def write() -> list[int]:
        """The call ids of the frames, in the order in which they are on the stream."""
        near, far = socket.socketpair()
        reader, far_writer = await asyncio.open_connection(sock=far)
        _, writer = await asyncio.open_connection(sock=near)
        messages = MessageWriter(writer)
        long = Message(Method.FORWARD, {}, {"a": torch.zeros(8 * CHUNK_BYTES, dtype=torch.bool)})
        sending = [asyncio.create_task(messages.send(number, long)) for number in (1, 2)]
        await asyncio.sleep(0)  # the first ones have begun, and wait for a reader
        sending.append(asyncio.create_task(messages.send(3, Message(Method.PING))))
        order = []
        for _ in range(2 * 8 + 1):
            _, call_id, *lengths = FRAME_PREFIX.unpack(await reader.readexactly(FRAME_PREFIX.size))
            await reader.readexactly(sum(lengths))
            order.append(call_id)
        await asyncio.gather(*sending)
        messages.close()
        far_writer.close()
        return order

    order = asyncio.run(write())
    assert [number for number in order if number != 3] == [1] * 8 + [2] * 8
    assert order.index(3) < 4, "a short message must not wait behind a long one"


def test_large_messages_arrive_interleaved_with_short_ones():
    generator = torch.Generator().manual_seed(0)
    sent = {
        number: Message(Method.FORWARD, {}, {"a": torch.randn(size << 18, generator=generator), "b": torch.empty(0, 3)})
        for number, size in enumerate([3, 5, 2], start=1)  # MiB
    }
    queues = {number: wire(message, number) for number, message in sent.items()}
    assert all(len(frame) <= CHUNK_BYTES + 200 for frames in queues.values() for frame in frames)
    data, number = [], 3
    while any(queues.values()):
        data += [frames.pop(0) for frames in queues.values() if frames]
        number += 1
        sent[number] = Message(Method.PING)
        data += wire(sent[number], number)
    got = read_all(b"".join(data))
    assert len(got) == len(sent)
    for call_id, message, _ in got:
        assert message.method is sent[call_id].method
        assert all(torch.equal(message.tensors[name], t) for name, t in sent[call_id].tensors.items())
    assert got[0][1].method is Method.PING, "a short message must not wait behind a long one"


def test_a_call_cancelled_while_it_is_sent_leaves_nothing_behind():
    large = Message(Method.FORWARD, {}, {"a": torch.zeros(3 * CHUNK_BYTES, dtype=torch.bool)})
    data = b"".join(wire(large, 1)[:2] + wire(Message(Method.CANCEL), 1) + wire(large, 2))
    got = read_all(data, max_message_bytes=4 * CHUNK_BYTES, max_open=1)
    assert [(call_id, message.method) for call_id, message, _ in got] == [(1, Method.CANCEL), (2, Method.FORWARD)]


def test_a_stream_that_ends_within_a_message_ends():
    data = b"".join(wire(Message(Method.OK, {}, {"a": torch.ones(100)}), 1))
    for cut in (0, 1, FRAME_PREFIX.size, FRAME_PREFIX.size + 3, len(data) - 1):
        assert read_all(data[:cut]) == []


BROKEN = {
    "header too long": (FRAME_PREFIX.pack(1, 1, MAX_HEADER_BYTES + 1, 0), "over the limit"),
    "chunk too long": (FRAME_PREFIX.pack(1, 1, 0, CHUNK_BYTES + 1), "over the limit"),
    "unknown kind": (raw(7, 1, head()), "unexpected frame of kind 7"),
    "more without head": (raw(FrameKind.MORE, 1, b"", b"x"), "unexpected frame of kind 2"),
    "more with a header": (
        raw(FrameKind.HEAD, 1, head([["a", "bool", [9]]])) + raw(FrameKind.MORE, 1, b"h", b"x"),
        "unexpected frame",
    ),
    "one id twice": (raw(FrameKind.HEAD, 1, head([["a", "bool", [9]]])) * 2, "two messages under call id 1"),
    "more bytes than announced": (raw(FrameKind.HEAD, 1, head([["a", "bool", [2]]]), b"xyz"), "more bytes than"),
    "bytes without tensors": (raw(FrameKind.HEAD, 1, head(), b"x"), "more bytes than"),
    "not msgpack": (raw(FrameKind.HEAD, 1, b"\xc1\xff"), "malformed header"),
    "empty header": (raw(FrameKind.HEAD, 1), "malformed header"),
    "no map": (raw(FrameKind.HEAD, 1, msgpack.packb([1])), "malformed header"),
    "unknown method": (raw(FrameKind.HEAD, 1, head(method="shutdown")), "malformed header"),
    "fields not a map": (raw(FrameKind.HEAD, 1, head(fields=[1])), "fields are not a map"),
    "tensors no list": (raw(FrameKind.HEAD, 1, msgpack.packb({"m": "ok", "f": {}, "t": {}})), "described by a list"),
    "tensor without shape": (raw(FrameKind.HEAD, 1, head([["a", "bool"]])), "malformed description"),
    "unknown dtype": (raw(FrameKind.HEAD, 1, head([["a", "float64", [1]]])), "malformed description"),
    "a name twice": (raw(FrameKind.HEAD, 1, head([["a", "bool", [1]]] * 2)), "malformed description"),
    "negative size": (raw(FrameKind.HEAD, 1, head([["a", "bool", [-1]]])), "impossible shape"),
    "size no number": (raw(FrameKind.HEAD, 1, head([["a", "bool", [1.0]]])), "impossible shape"),
    "too many dimensions": (raw(FrameKind.HEAD, 1, head([["a", "bool", [1] * 6]])), "impossible shape"),
    "empty but immense": (raw(FrameKind.HEAD, 1, head([["a", "bool", [0, *[2**39] * 4]]])), "impossible shape"),
    "quantised but without dimensions": (raw(FrameKind.HEAD, 1, head([["a", "int8_blockwise", []]])), "no dimension"),
    "quantised and larger than memory": (
        raw(FrameKind.HEAD, 1, head([["a", "int8_blockwise", [LIMIT // 5]]])),
        "over this peer's limit",
    ),
    "quantised and too short": (raw(FrameKind.HEAD, 1, head([["a", "int8_blockwise", [2]]]), b"1234567"), "more bytes"),
    "larger than memory": (raw(FrameKind.HEAD, 1, head([["a", "int64", [2**39]]])), "over this peer's limit"),
}


@pytest.mark.parametrize(("data", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_bytes_are_a_protocol_error(data, words):
    with pytest.raises(ProtocolError, match=words):
        read_all(data + b"\0" * (MAX_HEADER_BYTES + CHUNK_BYTES + 1))


def test_limits_hold_for_all_messages_under_way_together():
    def begin(call_id: int) -> bytes:
        return raw(FrameKind.HEAD, call_id, head([["a", "bool", [100]]]))

    assert read_all(begin(1) + begin(2), max_message_bytes=200) == []
    with pytest.raises(ProtocolError, match="limit of 200 bytes"):
        read_all(begin(1) + begin(2) + begin(3), max_message_bytes=200)
    with pytest.raises(ProtocolError, match="limit"):
        read_all(begin(1) + begin(2) + begin(3), max_open=2)


def test_a_finished_message_gives_its_room_back():
    whole = raw(FrameKind.HEAD, 1, head([["a", "bool", [100]]]), b"\1" * 100)
    assert len(read_all(whole * 5, max_message_bytes=100, max_open=1)) == 5


def test_a_body_of_another_length_than_described_is_refused():
    with pytest.raises(ProtocolError, match="a body of 3 bytes"):
        unpack_tensors([["a", "bool", [4]]], bytearray(3))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_only_end_the_stream_or_break_the_protocol(data):
    with contextlib.suppress(ProtocolError):
        read_all(data)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_random_headers_only_break_the_protocol(header):
    with contextlib.suppress(ProtocolError):
        read_all(raw(FrameKind.HEAD, 1, header))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_mutated_frames_only_end_the_stream_or_break_the_protocol(seed, flips):
    draw = random.Random(seed)
    messages = [
        Message(Method.FORWARD, {"start": 0, "end": 2}, {"hidden": torch.ones(2, 3, 4), "rows": torch.zeros(2).int()}),
        Message(Method.OK, {"kept": True}, {"a": torch.zeros(0, 3), "b": torch.ones(5)}),
        Message(Method.OK, {}, {"a": torch.ones(2, 70), "b": torch.zeros(0, 3)}, int8_blockwise=True),
    ]
    data = bytearray(b"".join(frame for number, m in enumerate(messages) for frame in wire(m, number)))
    for _ in range(flips):
        data[draw.randrange(len(data))] = draw.choice([0, 1, 0x7F, 0x80, 0xDC, 0xFF, draw.randrange(256)])
    with contextlib.suppress(ProtocolError):
        read_all(bytes(data))
