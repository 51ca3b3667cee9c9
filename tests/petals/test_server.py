"""Petals' methods of our servers against the plain local model: calls, sessions, pushes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel

from petals_lightning.hf.compat import quiet_transformers
from petals_lightning.protocol.petals.calls import PetalsBackward, PetalsForward, read_response
from petals_lightning.protocol.petals.steps import NextServer
from petals_lightning.protocol.petals.tensors import FLOAT16
from tests.helpers.families import HIDDEN, NUM_BLOCKS
from tests.petals.calls import ROOM, SPLIT, peer_id, step
from tools.testing.swarms import PREFIX
from tools.testing.tensors import relative_error

B, S, P = 2, 7, 3


def run_locally(checkpoint, hidden, start, end, prompts=None):
    """Blocks [start, end) of the plain model, prompts [n, B or 1, P, H] added before each."""
    with quiet_transformers():
        model = AutoModel.from_pretrained(checkpoint).eval()
    taken = []

    def before(number):
        def hook(module, args):
            states = hidden if number == start else args[0]
            if prompts is not None and start <= number < end:
                added = prompts[number - start]
                states = torch.cat([states[:, : added.shape[1]] + added, states[:, added.shape[1] :]], dim=1)
            return (states, *args[1:])

        return hook

    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(before(number))
        if number == end - 1:
            layer.register_forward_hook(lambda module, args, output: taken.append(output))
    model(inputs_embeds=hidden)
    return taken[0]


@pytest.mark.slow
@pytest.mark.parametrize("samples", [None, 1, B], ids=["no_prompts", "shared_prompts", "prompts_per_sample"])
@pytest.mark.parametrize(("start", "end"), [(0, NUM_BLOCKS), (1, 3)])
def test_forward_and_backward_equal_the_local_model(samples, start, end, tiny_checkpoint, callers):
    caller, hidden = callers[0], torch.randn(B, S, HIDDEN, requires_grad=True)
    prompts = torch.randn(end - start, samples, P, HIDDEN) if samples is not None else None
    per_sample = prompts.expand(-1, B, -1, -1).clone().requires_grad_() if prompts is not None else None
    expected = run_locally(tiny_checkpoint("llama"), hidden, start, end, per_sample)
    grad = torch.randn_like(expected)
    leaves = [hidden] if per_sample is None else [hidden, per_sample]
    expected_grads = torch.autograd.grad(expected, leaves, grad)

    request = PetalsForward(PREFIX, start, end, hidden, prompts)
    assert relative_error(caller.forward(request), expected) < 1e-5
    backward = PetalsBackward(PREFIX, start, end, hidden, grad, prompts)
    streamed = read_response(caller.stream("rpc_backward_stream", backward.to_parts().to_stream()), max_bytes=ROOM)
    for grads in (caller.backward(backward), streamed):
        assert len(grads) == len(expected_grads)
        for got, reference in zip(grads, expected_grads, strict=True):
            assert got.shape == reference.shape
            assert relative_error(got, reference) < 1e-5


def test_compression_is_taken_and_given(callers):
    caller, hidden = callers[0], torch.randn(B, S, HIDDEN)
    exact = caller.forward(PetalsForward(PREFIX, 0, NUM_BLOCKS, hidden))
    request = PetalsForward(PREFIX, 0, NUM_BLOCKS, hidden, output_compression=[FLOAT16])
    response = caller.unary("rpc_forward", request.to_parts().to_request([FLOAT16]))
    assert response.tensors[0].compression == FLOAT16
    assert len(response.tensors[0].buffer) == 2 * hidden.numel()
    (got,) = read_response([response], max_bytes=ROOM)
    assert 0 < relative_error(got, exact) < 1e-2


def test_steps_equal_one_forward_whatever_is_rolled_back(tiny_checkpoint, callers):
    hidden = torch.randn(B, 9, HIDDEN)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS)
    session = callers[0].open_session()
    assert session.step(step(hidden[:, :0], max_length=12)).shape == (B, 0, HIDDEN)
    got = session.step(step(hidden[:, :4]))
    assert relative_error(got, expected[:, :4]) < 1e-5
    session.step(step(torch.randn(B, 5, HIDDEN), start_from_position=4))
    got = session.step(step(hidden[:, 4:6], start_from_position=4))
    assert relative_error(got, expected[:, 4:6]) < 1e-5
    session.step(step(torch.randn(B, 1, HIDDEN)))
    assert session.step(step(hidden[:, :0], start_from_position=3)).shape == (B, 0, HIDDEN)
    got = session.step(step(hidden[:, 3:9]))
    assert relative_error(got, expected[:, 3:9]) < 1e-5
    session.end()


def test_hypo_ids_choose_what_a_sample_goes_on_from(tiny_checkpoint, callers):
    hidden, more = torch.randn(3, 4, HIDDEN), torch.randn(3, 2, HIDDEN)
    chosen = torch.tensor([2, 0, 2])
    expected = run_locally(tiny_checkpoint("llama"), torch.cat([hidden[chosen], more], 1), 1, NUM_BLOCKS)
    session = callers[0].open_session()
    session.step(step(hidden, 1, max_length=6))
    got = session.step(step(more, 1, hypo_ids=chosen))
    assert relative_error(got, expected[:, 4:]) < 1e-5
    session.end()


def test_prompts_are_added_at_the_step_that_brings_them(tiny_checkpoint, callers):
    hidden, prompts = torch.randn(B, S, HIDDEN), torch.randn(NUM_BLOCKS, B, P, HIDDEN)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS, prompts)
    session = callers[0].open_session()
    got = [session.step(step(hidden[:, :4], prompts=prompts, max_length=S)), session.step(step(hidden[:, 4:]))]
    assert relative_error(torch.cat(got, 1), expected) < 1e-5
    session.end()
    later = torch.cat([torch.zeros(NUM_BLOCKS, B, 4, HIDDEN), prompts[:, :1].expand(-1, B, -1, -1)], 2)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS, later)
    session = callers[0].open_session()
    got = [session.step(step(hidden[:, :4], max_length=S)), session.step(step(hidden[:, 4:], prompts=prompts[:, :1]))]
    assert relative_error(torch.cat(got, 1), expected) < 1e-5
    session.end()


def test_a_step_is_pushed_to_the_next_server_and_run_once(tiny_checkpoint, swarm, callers):
    hidden = torch.randn(B, 6, HIDDEN)
    middle = run_locally(tiny_checkpoint("llama"), hidden, 0, SPLIT)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS)
    first, last = callers[1].open_session(), callers[2].open_session()
    hops = [NextServer(peer_id(swarm.servers[2]), "last", SPLIT, NUM_BLOCKS)]
    opening: dict[str, Any] = {"max_length": 6, "step_id": "0", "start_from_position": 0}
    first.step(step(hidden[:, :3], 0, SPLIT, session_id="first", **opening))
    last.step(step(middle[:, :3], SPLIT, session_id="last", **opening))
    for position in range(3, 6):
        piece = slice(position, position + 1)
        fields: dict[str, Any] = {"step_id": str(position), "start_from_position": position}
        got = first.step(step(hidden[:, piece], 0, SPLIT, session_id="first", next_servers=hops, **fields))
        pushed = last.receive()  # nothing was sent to it
        assert relative_error(pushed, expected[:, piece]) < 1e-5
        last.send(step(got, SPLIT, session_id="last", **fields))
    first.end()
    last.end()  # asserts that the copies were not answered


def test_a_push_that_does_not_fit_harms_no_session(tiny_checkpoint, callers):
    hidden = torch.randn(B, 6, HIDDEN)
    expected = run_locally(tiny_checkpoint("llama"), hidden, 0, NUM_BLOCKS)
    session = callers[0].open_session()
    session.step(step(hidden[:, :3], max_length=6, session_id="mine", step_id="a"))
    for bad in (
        step(hidden[:, :2], start_from_position=0, session_id="mine", step_id="b", pushed=True),  # a roll-back
        step(hidden[:1, :1], start_from_position=3, session_id="mine", step_id="c", pushed=True),  # another batch
        step(hidden[:, :5], session_id="mine", step_id="d", pushed=True),  # too long
        step(hidden[:, :1], 1, 2, session_id="mine", step_id="e", pushed=True),  # other blocks
        step(hidden[:, :1], session_id="nobody", step_id="f", pushed=True),
    ):
        callers[0].unary("rpc_push", bad.to_parts().to_request())
    garbage = step(hidden[:, :1], session_id="mine", pushed=True).to_parts().to_request()
    garbage.tensors[0].size[0] = 77
    callers[0].unary("rpc_push", garbage)
    got = session.step(step(hidden[:, 3:], step_id="g", start_from_position=3))
    assert relative_error(got, expected[:, 3:]) < 1e-5
    session.end()
