"""A server without --num-blocks holds as many blocks as fit beside its clients' budgets."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from petals_lightning.errors import ConfigurationError
from petals_lightning.hf import Checkpoint, block_bytes
from petals_lightning.hf.decoder import model_class
from petals_lightning.server.config import ServerConfig
from petals_lightning.server.loading import load_span
from petals_lightning.server.memory_plan import free_memory, plan_memory
from tests.helpers.families import NUM_BLOCKS, TINY_CONFIGS

GIB = 1 << 30


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
@pytest.mark.parametrize(
    ("dtype", "quant_type"), [("auto", "none"), ("bfloat16", "none"), ("auto", "int8"), ("bfloat16", "nf4")]
)
def test_bytes_of_blocks_are_known_before_they_are_loaded(family, dtype, quant_type, tiny_checkpoint):
    checkpoint = Checkpoint(tiny_checkpoint(family))
    expected = block_bytes(model_class(AutoModel, checkpoint), checkpoint, dtype, quant_type)
    span = load_span(
        checkpoint, 0, NUM_BLOCKS, devices=[torch.device("cpu")] * NUM_BLOCKS, dtype=dtype, quant_type=quant_type
    )
    assert expected == [span.weight_bytes(block, block + 1) for block in range(NUM_BLOCKS)]


def test_blocks_budgets_and_reserve_fit_in_the_free_memory():
    plan = plan_memory([GIB // 2] * 32, ServerConfig(), 24 * GIB, is_gpu=True)
    assert plan.budgets == {"graph_bytes": 2 * GIB, "cache_bytes": 3 * GIB}, "the latter's default is an eighth at most"
    assert plan.num_blocks == 32  # 16 GiB: 24 - 2.4 - 2 - 3 = 16.6
    assert plan.weights + plan.reserve + sum(plan.budgets.values()) <= plan.free
    assert "24 GiB are free; weights of 32 of 32 blocks 16, graphs 2, keys and values 3, reserve 2.4" in str(plan)
    smaller = plan_memory([GIB // 2] * 32, ServerConfig(), 16 * GIB, is_gpu=True)
    assert smaller.num_blocks == 20  # 16 - 1.6 - 2 - 2 = 10.4


def test_requests_take_host_memory():
    blocks = [GIB] * 64
    assert "max_total_bytes" not in plan_memory(blocks, ServerConfig(), 64 * GIB, is_gpu=True).budgets
    assert plan_memory(blocks, ServerConfig(), 64 * GIB, is_gpu=False).budgets["max_total_bytes"] == 8 * GIB


def test_budgets_that_were_chosen_are_kept():
    config = ServerConfig(graph_bytes=6 * GIB, cache_bytes=GIB)
    plan = plan_memory([GIB] * 8, config, 16 * GIB, is_gpu=True)
    assert plan.budgets == {"graph_bytes": 6 * GIB, "cache_bytes": GIB}
    assert plan.num_blocks == 7  # 16 - 1.6 - 6 - 1 = 7.4
    assert plan.applied_to(config) == ServerConfig(graph_bytes=6 * GIB, cache_bytes=GIB, num_blocks=7)


def test_blocks_of_uneven_size_fit_wherever_they_are():
    plan = plan_memory([GIB, GIB, 3 * GIB, 3 * GIB], ServerConfig(graph_bytes=0, cache_bytes=0), 6 * GIB, is_gpu=True)
    assert (plan.num_blocks, plan.weights) == (1, 3 * GIB)


def test_a_model_whose_blocks_are_too_large_is_refused_with_the_plan():
    with pytest.raises(
        ConfigurationError, match=r"not one block fits, each takes 20 GiB: 24 GiB are free; weights of 0 of 2"
    ):
        plan_memory([20 * GIB] * 2, ServerConfig(), 24 * GIB, is_gpu=True)


def test_free_memory_is_what_this_machine_has():
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50
