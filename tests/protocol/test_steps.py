"""Steps of sessions survive the wire, and nonsense is refused before it costs anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.messages import Method
from petals_lightning.protocol.steps import StepRequest

H, P = 8, 2
OPENING = StepRequest(
    session=3, start=1, end=4, hidden=torch.randn(2, 5, H), position=0, max_length=20, keep=1,
    prefix=torch.randn(P, H), adapter_key=7, want_prefix=True, wire_dtype="bfloat16",
    attention_mask=torch.tensor([[False, True, True, True, True], [True] * 5]),
    position_ids=torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]),
)  # fmt: skip
LATER = StepRequest(session=3, start=1, end=4, hidden=torch.randn(2, 1, H), position=5, hypo_ids=torch.tensor([1, 1]))


@pytest.mark.parametrize("request_", [OPENING, LATER], ids=["opening", "later"])
def test_a_step_is_the_same_after_the_wire(request_):
    message = request_.to_message()
    assert message.method is Method.STEP
    received = StepRequest.from_message(message.fields, message.tensors)
    for name, value in vars(request_).items():
        got = getattr(received, name)
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, name


def test_a_decode_step_carries_hardly_more_than_its_activations():
    message = replace(LATER, hypo_ids=None).to_message()
    assert set(message.tensors) == {"hidden"}
    frames = [b"".join(map(bytes, frame)) for frame in message.frames(1)]
    assert len(frames) == 1
    assert len(frames[0]) < LATER.hidden.nbytes + 200


@pytest.mark.parametrize(
    ("request_", "changes", "words"),
    [
        (OPENING, {"max_length": 4}, "cannot open with 0:5"),
        (OPENING, {"position": 2, "attention_mask": None}, "cannot open with 2:7"),
        (OPENING, {"max_length": None}, "when a session is opened"),
        (OPENING, {"keep": 6}, "keep 6"),
        (OPENING, {"attention_mask": torch.ones(2, 4, dtype=torch.bool)}, "attention_mask"),
        (OPENING, {"position_ids": torch.ones(2, 5)}, "position_ids"),
        (LATER, {"adapter_key": 7}, "when a session is opened"),
        (OPENING, {"start": 4}, "not a span"),
        (LATER, {"hypo_ids": torch.tensor([0, 2])}, "outside of 2 samples"),
        (LATER, {"position": -1}, "position -1"),
        (LATER, {"session": "x"}, "'session'"),
        (LATER, {"wire_dtype": "int8"}, "wire_dtype"),
        (LATER, {"hidden": torch.randn(2, 0, H)}, "empty dimension"),
    ],
)
def test_contradictions_are_refused(request_, changes, words):
    message = replace(request_, **changes).to_message()
    with pytest.raises(ProtocolError, match=words):
        StepRequest.from_message(message.fields, message.tensors)
