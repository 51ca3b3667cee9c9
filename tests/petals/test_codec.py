"""The wire of Petals: recorded messages are read and built again, byte for byte; anything else is refused."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import msgpack
import pytest
import torch
from google.protobuf.message import DecodeError
from hivemind.compression import serialize_torch_tensor
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse, Tensor
from hivemind.utils import MSGPackSerializer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.messages import ErrorCode
from petals_lightning.protocol.petals import metadata
from petals_lightning.protocol.petals.calls import (
    Parts,
    PetalsBackward,
    PetalsForward,
    RequestJoiner,
    read_request,
    read_response,
    split_response,
    to_response,
)
from petals_lightning.protocol.petals.info import ServerInfo
from petals_lightning.protocol.petals.metadata import error_text, parse_error, unpack_arguments
from petals_lightning.protocol.petals.steps import NextServer, PetalsStep
from petals_lightning.protocol.petals.tensors import (
    FLOAT16,
    MEANSTD_16BIT,
    QUANTILE_8BIT,
    TensorJoiner,
    check_compressions,
    pack_tensor,
    split_tensor,
    unpack_tensor,
)
from petals_lightning.protocol.uids import chain_uid, parse_chain
from tests.petals.recorded import recorded_calls

ROOM = 1 << 24


def join(messages: list[ExpertRequest]) -> Parts:
    joiner = RequestJoiner(max_bytes=ROOM)
    for message in messages:
        joiner.add(message)
    return joiner.finish()


def test_recorded_requests_are_read_and_built_again():
    seen = set()
    for call in recorded_calls():
        seen.add(call.method)
        match call.method:
            case "rpc_info":
                assert parse_chain(call.requests[0].uid) == ("stories260K", 0, 1)
            case "rpc_forward" | "rpc_forward_stream" | "rpc_backward" | "rpc_backward_stream":
                parts = join(call.requests)
                kind = PetalsForward if "forward" in call.method else PetalsBackward
                request = kind.from_parts(parts)
                assert (request.start, request.end) == ((1, 4) if call.case == "slice_of_blocks" else (0, 5))
                assert (request.prompts is not None) == (call.case == "deep_ptune_classification_step")
                built = request.to_parts()
                assert ([built.to_request()] if call.kind == "unary" else built.to_stream()) == call.requests
            case "rpc_inference":
                *steps, end = call.requests
                assert not end.tensors
                for number, message in enumerate(steps):
                    step = PetalsStep.from_parts(read_request(message, max_bytes=ROOM))
                    assert (step.max_length is not None) == (number == 0)
                    built = step.to_parts().to_request()
                    assert (built.uid, list(built.tensors)) == (message.uid, list(message.tensors))
                    assert metadata.load(built.metadata) == metadata.load(message.metadata)
            case _:
                raise AssertionError(f"{call.method} is not read by this test")
    assert len(seen) == 6


def test_recorded_responses_are_read_and_built_again():
    for call in recorded_calls():
        if call.method == "rpc_info":
            (message,) = call.responses
            info = ServerInfo.from_message(message)
            assert info == ServerInfo("2.3.0.dev2", 40960, 64, torch.float32)
            ours, theirs = (metadata.load(m.serialized_info) for m in (info.to_message(), message))
            assert ours == theirs
        elif call.method == "rpc_inference":
            for message in call.responses:
                assert to_response(read_response([message], max_bytes=ROOM)) == message
        else:
            whole = to_response(read_response(call.responses, max_bytes=ROOM))
            assert (list(split_response(whole)) if call.kind == "stream" else [whole]) == call.responses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 8), (3, 5, 8)])
def test_tensors_come_back_as_they_went(dtype, shape):
    tensor = (10 * torch.randn(shape)).to(dtype)
    packed = pack_tensor(tensor)
    back = unpack_tensor(packed)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    assert len(packed.buffer) == tensor.nbytes
    legacy = unpack_tensor(serialize_torch_tensor(tensor))  # hivemind's default sends bfloat16 in four bytes
    assert torch.equal(legacy, tensor)


@pytest.mark.parametrize(("compression", "tolerance"), [(FLOAT16, 1e-3), (MEANSTD_16BIT, 1e-3), (QUANTILE_8BIT, 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compressed_tensors_come_back_nearly_so(compression, tolerance, dtype):
    tensor = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack_tensor(tensor, compression)
    assert len(packed.buffer) < 4 * tensor.numel()
    back = unpack_tensor(packed)
    assert back.dtype == dtype
    assert (back.float() - tensor.float()).norm() / tensor.float().norm() < tolerance


def test_large_tensors_travel_in_parts():
    request = PetalsForward("m", 0, 2, torch.randn(2, 700, 1024))
    messages = request.to_parts().to_stream()
    assert [len(message.tensors) for message in messages] == [1] * 3  # 5.5 MiB, and the empty prompts
    assert all(message.uid == "m.0 m.1" and message.ByteSize() < 4.1 * 2**20 for message in messages)
    assert torch.equal(PetalsForward.from_parts(join(messages)).hidden, request.hidden)
    response = list(split_response(to_response([request.hidden, torch.ones(3)])))
    assert len(response) == 3
    assert torch.equal(read_response(response, max_bytes=ROOM)[0], request.hidden)


def test_the_same_tensor_takes_one_slot():
    hidden = torch.randn(1, 2, 4)
    request = PetalsBackward("m", 0, 1, hidden, hidden).to_parts().to_request()
    assert len(request.tensors) == 2
    assert metadata.load(request.metadata)["args_structure"] == ((b"__T0", b"__T0", b"__T1"), {})
    assert torch.equal(PetalsBackward.from_parts(read_request(request, max_bytes=ROOM)).grad, hidden)


def test_steps_carry_what_they_are_given():
    step = PetalsStep(
        "m", 1, 3, torch.randn(2, 3, 4), torch.randn(2, 1, 2, 4), torch.tensor([1, 0]), "session", "step", 7, 20, 1.5,
        [NextServer("QmA", "b", 3, 4), NextServer("QmB", "c", 4, 6)], True, 1.0, "adapter",
    )  # fmt: skip
    back = PetalsStep.from_parts(read_request(step.to_parts().to_request(), max_bytes=ROOM))
    for name, value in vars(step).items():
        same = torch.equal(getattr(back, name), value) if torch.is_tensor(value) else getattr(back, name) == value
        assert same, name


def test_errors_carry_their_code():
    text = error_text(ErrorCode.OVERLOADED, "no room: sorry")
    assert parse_error(f"Failed to call handler `x` at QmA: {text}") == (ErrorCode.OVERLOADED, "no room: sorry")
    assert parse_error("ValueError('Maximum length exceeded')") == (None, "ValueError('Maximum length exceeded')")


@pytest.mark.parametrize(
    "uid", ["", "m", "m.", "m.0 m.2", "m.1 m.0", "m.0 n.1", "m.0  m.1", ".0", "m.-1", "m.0.1", "m.²", "m.0 " * 30000]
)
def test_chains_that_are_none_are_refused(uid):
    with pytest.raises(ProtocolError):
        parse_chain(uid)
    assert parse_chain(chain_uid("m", 3, 6)) == ("m", 3, 6)


def packed(**changes) -> Tensor:
    message = pack_tensor(torch.ones(2, 3, 4))
    for name, value in changes.items():
        if name == "size":
            message.ClearField("size")
            message.size.extend(value)
        else:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float128"}, {"dtype": "object"}, {"dtype": ""}, {"dtype": "float64"}, {"dtype": "int64"},
        {"size": [2, 3, 5]}, {"size": [2**32 - 1] * 2}, {"size": [0, 2**32 - 1, 2**32 - 1]},
        {"size": [1] * 9}, {"size": []}, {"buffer": b""}, {"buffer": b"x" * 97},
        {"compression": 1, "buffer": b"x" * 95}, {"compression": 2}, {"compression": 3}, {"compression": 5},
        {"compression": 2, "dtype": "bool"}, {"compression": 1, "dtype": "bfloat16"},
        {"compression": 4, "buffer": b"\xff" * (8 + 1024 + 24)}, {"compression": 1, "size": []},
    ],
)  # fmt: skip
def test_tensors_that_are_not_what_they_announce_are_refused(changes):
    with pytest.raises(ProtocolError):
        unpack_tensor(packed(**changes))


def test_a_call_over_its_limits_is_refused_before_it_is_there():
    joiner = TensorJoiner(max_bytes=1 << 20, max_tensors=2)
    first = next(iter(split_tensor(pack_tensor(torch.ones(1 << 20)))))
    with pytest.raises(ProtocolError, match=f"limit of {1 << 20} bytes"):
        joiner.add([first])
    joiner = TensorJoiner(max_bytes=1 << 20, max_tensors=2)
    with pytest.raises(ProtocolError, match="in 3 tensors"):
        joiner.add([pack_tensor(torch.ones(1))] * 3)
    with pytest.raises(ProtocolError, match="more bytes than it announced"):
        TensorJoiner(max_bytes=99, max_tensors=2).add([packed(), Tensor(buffer=b"x")])
    with pytest.raises(ProtocolError, match="without its beginning"):
        TensorJoiner(max_bytes=99, max_tensors=2).add([Tensor(buffer=b"x")])
    incomplete = TensorJoiner(max_bytes=99, max_tensors=2)
    incomplete.add([packed(buffer=b"x" * 95)])
    with pytest.raises(ProtocolError, match="95 bytes where"):
        incomplete.finish()


def test_metadata_that_would_overflow_the_stack_is_refused():
    data = msgpack.packb([])
    for _ in range(900):
        data = msgpack.packb([msgpack.ExtType(0x40, data)])
    with pytest.raises(ProtocolError, match="nested too deeply"):
        metadata.load(data)
    descriptor = msgpack.packb(msgpack.ExtType(0x51, data))
    with pytest.raises(ProtocolError, match="nested too deeply"):
        metadata.load(descriptor)


@given(st.binary(max_size=200))
def test_metadata_of_random_bytes_is_read_or_refused(data):
    with suppress(ProtocolError):
        metadata.load_dict(data)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = ["session_id", "step_id", "start_from_position", "max_length", "alloc_timeout", "next_servers", "points",
           "active_adapter", "output_compression", "args_structure", "pushed"]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first draw is slow where other work runs beside it
@given(st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=4), st.sampled_from(["forward", "backward", "step"]))
def test_calls_with_any_metadata_are_read_or_refused(fields, kind):
    message = ExpertRequest(
        uid="m.0 m.1", tensors=[pack_tensor(torch.ones(1, 2, 4))] * 2, metadata=MSGPackSerializer.dumps(fields)
    )
    kinds: dict[str, Any] = {"forward": PetalsForward, "backward": PetalsBackward, "step": PetalsStep}
    with suppress(ProtocolError):
        kinds[kind].from_parts(read_request(message, max_bytes=ROOM))


@given(st.binary(max_size=300))
def test_responses_of_random_bytes_are_read_or_refused(data):
    with suppress(ProtocolError, DecodeError):
        read_response([ExpertResponse.FromString(data)], max_bytes=ROOM)


@pytest.mark.parametrize("structure", [5, [], [[], []], [[b"__T2"], {}], [[b"__T-1"], {}], [[b"T0"], {}], [[None], {}],
                                       [[b"__T0"], {"x": b"__T1"}], [[b"__T" + b"9" * 50], {}]])  # fmt: skip
def test_structures_that_name_no_tensors_are_refused(structure):
    with pytest.raises(ProtocolError):
        unpack_arguments([torch.ones(1)] * 2, structure)


@pytest.mark.parametrize("value", [5, [], [9], [True], ["0"], [0, 0, 0], [5]])
def test_compressions_that_are_none_are_refused(value):
    with pytest.raises(ProtocolError):
        check_compressions(value, 2)
    assert check_compressions((0, 2), 2) == [0, 2]


def test_random_tensors_of_random_bytes_are_read_or_refused():
    for _ in range(300):
        message = packed(buffer=os.urandom(96))
        data = bytearray(message.SerializeToString())
        data[int.from_bytes(os.urandom(2), "big") % len(data)] ^= 1 << (os.urandom(1)[0] % 8)
        with suppress(ProtocolError, DecodeError):
            unpack_tensor(Tensor.FromString(bytes(data)))
