"""A server whose blocks are on several devices. The meta device stands in for a second one: it computes no values, and
refuses to mix its tensors with those of another device, as GPUs do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from petals_lightning.errors import ConfigurationError
from petals_lightning.hf import Checkpoint, ModelSlice, load_pruned
from petals_lightning.hf.decoder import model_class
from petals_lightning.hf.pruning import place_blocks
from petals_lightning.protocol.adapters import Adapter, LoraFactors
from petals_lightning.server.blocks.block_runner import BlockPass, BlockRunner
from petals_lightning.server.blocks.kv_cache import GrowingLayer, SpanCache
from petals_lightning.server.blocks.prefix_cache import PrefixCache
from petals_lightning.server.config import ServerConfig, parse_devices
from petals_lightning.server.memory_plan import split_blocks
from petals_lightning.server.server import Server
from petals_lightning.swarm import SwarmNode
from tests.helpers.families import ALL, HIDDEN, NUM_BLOCKS
from tests.helpers.spans import inputs

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon_alibi", "gpt2", "gemma3", "mistral", "qwen3", "opt"])
@pytest.mark.parametrize("way", ["training", "prefix", "session"])
def test_a_block_gets_all_of_its_inputs_on_its_own_device(family, way, tiny_checkpoint):
    checkpoint, seen = Checkpoint(str(tiny_checkpoint(family))), []
    part = ModelSlice(*ALL, with_embeddings_and_head=False)
    model, layout, _ = load_pruned(model_class(AutoModel, checkpoint), checkpoint, part, dtype="float32")
    place_blocks(model, layout, [CPU, CPU, META, META])
    for block in layout.blocks(model):
        block.register_forward_hook(
            lambda block, args, output: seen.append((output[0] if isinstance(output, tuple) else output).device)
        )
    runner = BlockRunner(model, layout, 0)
    adapter = inputs(*ALL).adapter
    if family == "llama":
        blocks, draw = tuple(range(NUM_BLOCKS)), torch.Generator().manual_seed(0)
        a, b = (torch.randn(NUM_BLOCKS, *shape, generator=draw) for shape in ((2, HIDDEN), (HIDDEN, 2)))
        assert adapter is not None
        adapter = Adapter(*ALL, adapter.deep, (LoraFactors("self_attn.q_proj", blocks, a, b),))
    given = BlockPass(*ALL, inputs(*ALL).hidden, adapter)
    cache: SpanCache | None = None
    if way == "prefix":
        cache = PrefixCache(NUM_BLOCKS, 0)
    elif way == "session":
        cache = SpanCache([GrowingLayer(16) for _ in range(NUM_BLOCKS)], 0)
    mask = torch.ones(*given.hidden.shape[:2], dtype=torch.bool)
    mask[0, 0] = False
    for again in (False, True):
        with torch.set_grad_enabled(way == "training"), pytest.raises(NotImplementedError, match="out of meta tensor"):
            # The values of the last block are nowhere, so only the way back fails.
            runner.run(replace(given, copies={}), cache, attention_mask=mask if way == "session" else None)
        assert seen == [CPU, CPU, META, META]
        seen.clear()
        if not again and way != "training":
            assert cache is not None
            assert [layer.keys.device for layer in cache.attention_layers if layer.keys is not None] == [
                CPU, CPU, META, META
            ]  # fmt: skip
            if way == "session":
                mask = torch.cat([mask, mask], dim=1)


def test_blocks_are_shared_out_by_free_memory():
    assert split_blocks([1] * 8, [10, 10]) == [0] * 4 + [1] * 4
    assert split_blocks([1] * 8, [30, 10]) == [0] * 6 + [1] * 2
    assert split_blocks([1, 1, 1, 5], [1, 1]) == [0, 0, 0, 1]
    assert split_blocks([1] * 7, [1, 1, 1]) == [0, 0, 1, 1, 1, 2, 2]
    assert split_blocks([1], [1, 1]) == [0]


def test_devices_are_given_in_one_word_or_several():
    assert parse_devices(["cuda:0,cuda:1"]) == parse_devices(["cuda:0", "cuda:1"]) == ("cuda:0", "cuda:1")
    config = ServerConfig(device="cpu", devices=("cpu", "cpu"))
    with pytest.raises(ConfigurationError, match="give --device or --devices, not both"):
        Server(Checkpoint("anything"), SwarmNode(), config=config)
