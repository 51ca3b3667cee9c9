from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from petals_lightning.protocol.steps import StepRequest
from petals_lightning.server.blocks.cpu_decoding import DecodingLinear, order_weights_for_decoding, threads_for
from petals_lightning.server.sessions.session_cache import SessionCache


@pytest.mark.parametrize(("dtype", "by_column"), [(torch.float32, True), (torch.bfloat16, False)])
def test_float32_weights_lie_by_column_and_stay_what_they_are(dtype, by_column):
    model = nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = torch.randn(2, 8, dtype=dtype)
    expected = model(inputs)
    order_weights_for_decoding(model)
    first: Any = model[0]
    assert (first.weight.stride() == (1, 5)) == by_column
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(inputs), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8), (2, 1, 8), (0, 1, 8)], ids=str)
def test_single_positions_are_multiplied_as_all_others(shape, bias):
    layer, inputs = nn.Linear(8, 5, bias=bias).requires_grad_(False), torch.randn(shape)
    expected = layer(inputs)
    order_weights_for_decoding(layer)
    assert isinstance(layer, DecodingLinear)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            out = layer(inputs)
        assert out.shape == expected.shape
        torch.testing.assert_close(out, expected)
    strided = torch.randn(8, 2)[:, 0].expand(1, 1, 8)
    with torch.inference_mode():
        torch.testing.assert_close(layer(strided), torch.nn.functional.linear(strided, layer.weight, layer.bias))


def test_numpy_multiplies_single_positions_and_no_others():
    layer: Any = nn.Linear(8, 5, bias=False).requires_grad_(False)
    inputs = torch.randn(2, 8)
    order_weights_for_decoding(layer)
    assert np.shares_memory(layer.columns, layer.weight.numpy())
    layer.columns = 2 * layer.columns  # tells which one was read
    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs[:1]), 2 * inputs[:1] @ layer.weight.T)
        torch.testing.assert_close(layer(inputs), inputs @ layer.weight.T)
    torch.testing.assert_close(layer(inputs[:1]), inputs[:1] @ layer.weight.T)


def test_single_positions_have_gradients():
    layer, inputs = nn.Linear(8, 5).requires_grad_(False), torch.randn(1, 8, requires_grad=True)
    order_weights_for_decoding(layer)
    layer(inputs).sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad[0], layer.weight.sum(0))


def test_layers_of_another_class_keep_their_own_forward():
    class Doubling(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    layer, inputs = Doubling(8, 5).requires_grad_(False), torch.randn(1, 8)
    with torch.no_grad():
        expected = layer(inputs)
        order_weights_for_decoding(layer)
        assert torch.equal(layer(inputs), expected)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "length", "dtype", "expected"),
    [
        ((1, 1, 512), 100, torch.float32, 1),
        ((2, 2, 512), 100, torch.float32, 1),
        ((5, 1, 512), 100, torch.float32, 2),
        ((1, 1, 512), 2000, torch.float32, 2),
        ((1, 1, 512), 100, torch.bfloat16, 2),
    ],
    ids=str,
)
def test_short_steps_of_few_positions_have_one_thread(shape, length, dtype, expected, two_threads):
    seen = []

    def fail() -> None:
        with threads_for(torch.zeros(shape, dtype=dtype), length):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [expected]
    assert torch.get_num_threads() == 2


def test_a_step_runs_with_the_threads_that_suit_it(tiny_checkpoint, start_swarm, two_threads):
    (server,) = start_swarm(tiny_checkpoint("llama"), [(0, 2)]).servers
    span, seen = server.span, []
    span.blocks[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    session = SessionCache(span, StepRequest(0, 0, 2, torch.zeros(1, 6, span.hidden_size), 0, max_length=7), 0)
    session.step(span, StepRequest(0, 0, 2, torch.zeros(1, 6, span.hidden_size), 0, max_length=7))
    session.step(span, StepRequest(0, 0, 2, torch.zeros(1, 1, span.hidden_size), 6))
    assert seen == [2, 1]


def test_a_server_orders_what_it_has_loaded(tiny_checkpoint, start_swarm):
    (server,) = start_swarm(tiny_checkpoint("llama"), [(0, 2)]).servers
    weight = server.span.blocks[0].self_attn.q_proj.weight
    assert weight.stride(0) == 1
