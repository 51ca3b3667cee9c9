"""Requests survive the trip, and every contradiction in one is found before anything is computed."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.requests import BackwardRequest, ForwardRequest, to_wire

B, S, P, H = 2, 3, 4, 8


def forward_request() -> ForwardRequest:
    return ForwardRequest(
        1, 3, torch.randn(B, S, H), torch.randn(P, H), rows=torch.tensor([0, 5], dtype=torch.int32),
        adapter_key=7, keep=True, input_grad=True, want_prefix=True, wire_dtype="bfloat16",
    )  # fmt: skip


def assert_same(got, sent) -> None:
    for field in fields(sent):
        a, b = getattr(got, field.name), getattr(sent, field.name)
        if isinstance(b, ForwardRequest):
            assert_same(a, b)
        else:
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field.name


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"rows": None}, {"adapter_key": None}, {"prefix": None},
        {"prefix": None, "adapter_key": None, "rows": None},
    ],
    ids=lambda changes: ",".join(changes) or "full",
)  # fmt: skip
def test_a_forward_survives_the_round_trip(changes):
    sent = replace(forward_request(), **changes)
    message = sent.to_message()
    assert_same(ForwardRequest.from_message(message.fields, message.tensors), sent)


@pytest.mark.parametrize("graph", [5, None])
@pytest.mark.parametrize("grad_prefix", [torch.ones(P, H), None], ids=["prefix", "no prefix"])
def test_a_backward_survives_the_round_trip(graph, grad_prefix):
    again = forward_request() if graph is None else None
    sent = BackwardRequest(torch.randn(2, H), grad_prefix, graph, again, "float16")
    message = sent.to_message()
    assert_same(BackwardRequest.from_message(message.fields, message.tensors), sent)


WRONG_FIELDS = {
    "start missing": ({"start": None}, "'start'"),
    "start no int": ({"start": 1.0}, "'start'"),
    "start a bool": ({"start": True}, "'start'"),
    "end a text": ({"end": "3"}, "'end'"),
    "empty span": ({"end": 1}, "not a span"),
    "negative span": ({"start": -1}, "not a span"),
    "wire_dtype unknown": ({"wire_dtype": "float64"}, "wire_dtype"),
    "wire_dtype no float": ({"wire_dtype": "int64"}, "wire_dtype"),
    "wire_dtype missing": ({"wire_dtype": None}, "'wire_dtype'"),
    "adapter_key a text": ({"adapter_key": "x"}, "'adapter_key'"),
    "adapter_key a bool": ({"adapter_key": True}, "'adapter_key'"),
    "keep no bool": ({"keep": 1}, "'keep'"),
    "input_grad missing": ({"input_grad": None}, "'input_grad'"),
    "want_prefix no bool": ({"want_prefix": "yes"}, "'want_prefix'"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_forward_with_a_wrong_field_is_refused(changes, words):
    message = forward_request().to_message()
    with pytest.raises(ProtocolError, match=words):
        ForwardRequest.from_message(message.fields | changes, message.tensors)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG_TENSORS = {
    "hidden missing": ({"hidden": None}, "`hidden` is missing"),
    "hidden of integers": ({"hidden": torch.zeros(B, S, H, dtype=torch.int64)}, "'hidden' is int64"),
    "hidden flat": ({"hidden": torch.zeros(B, H)}, r"'hidden' is float32 \[2, 8\]"),
    "hidden empty": ({"hidden": torch.zeros(B, 0, H), "rows": None}, "empty dimension"),
    "prefix of another width": ({"prefix": torch.zeros(P, H + 1)}, "differ in hidden size"),
    "prefix of 3 dimensions": ({"prefix": torch.zeros(1, P, H)}, "'prefix'"),
    "prefix empty": ({"prefix": torch.zeros(0, H)}, "empty dimension"),
    "prefix of bools": ({"prefix": torch.zeros(P, H, dtype=torch.bool)}, "'prefix' is bool"),
    "deep prompts, which are registered by themselves": ({"deep": torch.zeros(2, P, H)}, "unknown tensors"),
    "rows of int64": ({"rows": torch.tensor([0])}, "int32"),
    "rows of 2 dimensions": ({"rows": ints(0)[None]}, "int32"),
    "no rows": ({"rows": ints()}, "non-empty"),
    "rows below": ({"rows": ints(0, -1)}, "outside of 2 × 3"),
    "rows above": ({"rows": ints(0, B * S)}, "outside of 2 × 3"),
    "more rows than positions": ({"rows": ints(*[0] * 7)}, "7 rows of 2 × 3"),
    "unknown tensor": ({"mask": torch.ones(1)}, "unknown tensors"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_forward_with_a_wrong_tensor_is_refused(changes, words):
    message = forward_request().to_message()
    tensors = {name: tensor for name, tensor in (message.tensors | changes).items() if tensor is not None}
    with pytest.raises(ProtocolError, match=words):
        ForwardRequest.from_message(message.fields, tensors)


WRONG_BACKWARDS = {
    "graph a text": ({"graph": "5"}, {}, "'graph'"),
    "wire_dtype unknown": ({"wire_dtype": "fast"}, {}, "wire_dtype"),
    "grad missing": ({}, {"grad": None}, "`grad`"),
    "grad of integers": ({}, {"grad": ints(1)}, "`grad`"),
    "grad_prefix flat": ({}, {"grad_prefix": torch.zeros(P)}, "'grad_prefix'"),
    "inputs beside a graph": ({}, {"hidden": torch.zeros(B, S, H)}, "gradients only"),
    "neither graph nor forward": ({"graph": None}, {}, "'forward'"),
    "a broken forward": (
        {"graph": None, "forward": {**forward_request().to_message().fields, "end": 0}},
        {"hidden": torch.zeros(B, S, H)},
        "not a span",
    ),
    "a forward without hidden": ({"graph": None, "forward": forward_request().to_message().fields}, {}, "`hidden`"),
}


@pytest.mark.parametrize(("changes", "tensors", "words"), WRONG_BACKWARDS.values(), ids=WRONG_BACKWARDS)
def test_a_wrong_backward_is_refused(changes, tensors, words):
    message = BackwardRequest(torch.zeros(2, H), torch.zeros(P, H), graph=5).to_message()
    tensors = {name: tensor for name, tensor in (message.tensors | tensors).items() if tensor is not None}
    with pytest.raises(ProtocolError, match=words):
        BackwardRequest.from_message(message.fields | changes, tensors)


def test_reading_a_backward_leaves_its_message_as_it_was():
    message = BackwardRequest(torch.zeros(2, H), torch.zeros(P, H), graph=5).to_message()
    BackwardRequest.from_message(message.fields, message.tensors)
    assert set(message.tensors) == {"grad", "grad_prefix"}


def test_tensors_travel_detached_in_the_agreed_dtype():
    travelling = to_wire(torch.ones(2, requires_grad=True), "bfloat16")
    assert (travelling.dtype, travelling.requires_grad) == (torch.bfloat16, False)
