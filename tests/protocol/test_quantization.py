"""Blockwise 8-bit: how far what arrives is from what was sent, for values, shapes and sizes of all kinds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_lightning.protocol.quantization import BLOCK_SIZE, dequantize, quantize, quantized_size


def round_trip(tensor: torch.Tensor) -> torch.Tensor:
    codes, scales = quantize(tensor)
    assert (codes.dtype, codes.shape, scales.dtype) == (torch.int8, tensor.shape, torch.float32)
    assert codes.nbytes + scales.nbytes == quantized_size(tensor.shape)
    back = dequantize(codes, scales)
    assert (back.dtype, back.shape) == (torch.float32, tensor.shape)
    return back


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 200), st.integers(0, 2**32), st.floats(1e-30, 1e30))
def test_no_value_is_further_off_than_a_254th_of_its_blocks_largest(leading, width, seed, scale):
    sent = torch.randn(*leading, width, generator=torch.Generator().manual_seed(seed)) * scale
    error = (round_trip(sent) - sent).abs()
    for first in range(0, width, BLOCK_SIZE):
        own = slice(first, first + BLOCK_SIZE)
        bound = sent[..., own].abs().amax(-1, keepdim=True) / 254
        assert (error[..., own] <= bound * (1 + 1e-4)).all()


def test_normal_values_lose_less_than_a_hundredth():
    sent = torch.randn(100, 512, generator=torch.Generator().manual_seed(0))
    error = (round_trip(sent) - sent).norm() / sent.norm()
    assert 0.004 < error < 0.008


def test_rounding_has_no_bias():
    sent = torch.rand(2000, 64, generator=torch.Generator().manual_seed(0))  # all of one sign
    mean_step = (sent.amax(-1) / 127).mean()
    assert (round_trip(sent) - sent).mean().abs() < 0.01 * mean_step


def test_an_outlier_costs_its_own_block_only():
    sent = torch.randn(4, 3 * BLOCK_SIZE, generator=torch.Generator().manual_seed(0))
    spoilt = sent.clone()
    spoilt[2, BLOCK_SIZE] = 1e4
    same = torch.ones_like(sent, dtype=torch.bool)
    same[2, BLOCK_SIZE : 2 * BLOCK_SIZE] = False
    assert torch.equal(round_trip(spoilt)[same], round_trip(sent)[same])


def test_a_row_does_not_depend_on_those_it_travels_with():
    sent = torch.randn(5, 7, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(sent)[3:, 2:5], round_trip(sent[3:, 2:5]))


def test_what_was_quantised_once_is_not_changed_again():
    once = round_trip(torch.randn(9, 130, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(round_trip(once), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.5, -3e38, 1e-45, 3e-43, -1e-38], ids=str)
def test_constant_blocks_keep_their_value(value):
    sent = torch.full((2, 70), value)
    # Down where float32 itself has few digits left, a scale has them too.
    assert torch.allclose(round_trip(sent), sent, rtol=1e-6, atol=1.3e-43)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_value_that_is_not_finite_shows(bad):
    sent = torch.ones(3, 2 * BLOCK_SIZE)
    sent[1, 5] = bad
    back = round_trip(sent)
    assert back[1, :BLOCK_SIZE].isnan().all()
    assert back[1, BLOCK_SIZE:].isfinite().all()
    assert back[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 64), (2, 0, 5)], ids=str)
def test_empty_tensors_arrive(shape):
    assert quantized_size(shape) == 0
    assert round_trip(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tensors_are_taken(dtype):
    sent = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(round_trip(sent), round_trip(sent.float()))
