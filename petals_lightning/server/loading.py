"""Loads a span of blocks, tests what its family allows, and measures its speed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModel

from petals_lightning import __version__
from petals_lightning.errors import CheckpointError, ConfigurationError, ProtocolError
from petals_lightning.heap import map_large_tensors, trim_heap
from petals_lightning.hf import Checkpoint, ModelSlice, load_pruned
from petals_lightning.hf.adapter_files import read_adapter
from petals_lightning.hf.decoder import model_class
from petals_lightning.hf.pruning import num_blocks, place_blocks
from petals_lightning.protocol.adapters import Adapter
from petals_lightning.protocol.checks import WIRE_DTYPES
from petals_lightning.protocol.quant_types import UNQUANTIZED
from petals_lightning.server.access.limits import ServerLimits
from petals_lightning.server.blocks.cpu_decoding import order_weights_for_decoding
from petals_lightning.server.blocks.held_adapters import HeldAdapters
from petals_lightning.server.blocks.self_checks import (
    check_family,
    check_quantized,
    measure_past_shapes,
    verify_sessions,
    verify_shared_prefix,
    verify_skipping,
)
from petals_lightning.server.blocks.span import BlockSpan, SpanInputs
from petals_lightning.server.sessions.batched_decoding import verify_batched_decoding

logger = logging.getLogger(__name__)


def load_span(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    *,
    devices: Sequence[torch.device],
    dtype: str | torch.dtype,
    quant_type: str = UNQUANTIZED,
    share_prefix: bool = True,
    on_shard: Callable[[str, int, int], None] | None = None,
) -> BlockSpan:
    """Loads blocks [start, end) and tests them.

    Args:
        checkpoint: the model.
        start, end: the blocks.
        devices: where each block runs.
        dtype: how they run; "auto" is the checkpoint's.
        quant_type: how the weights of their linears are kept.
        share_prefix: run a prefix once for the batch, if the family allows it.
        on_shard: called with the progress of loading.

    Raises:
        UnsupportedModelError: the family cannot be served.
    """
    logger.info("loading blocks %d:%d of %s", start, end, checkpoint.name_or_path)
    if quant_type != UNQUANTIZED and any(device.type == "cpu" for device in devices):
        map_large_tensors()
    model, layout, _ = load_pruned(
        model_class(AutoModel, checkpoint),
        checkpoint,
        ModelSlice(start, end, with_embeddings_and_head=False),
        dtype=dtype,
        quant_type=quant_type,
        devices=devices,
        on_shard=on_shard,
    )
    place_blocks(model, layout, devices)
    order_weights_for_decoding(model)
    span = BlockSpan(model, layout, start)
    check_family(span)
    if span.quant_type != UNQUANTIZED:
        check_quantized(span)
    may_share = verify_shared_prefix(span)
    span.share_prefix = share_prefix and may_share
    if not may_share:
        logger.info("the prefix runs once per sample: this family gave different results when samples shared it")
    span.skips_unread = span.share_prefix and verify_skipping(span)
    if span.share_prefix and not span.skips_unread:
        logger.info("the last block runs on all positions: this family gave different results when it skipped some")
    span.has_sessions = verify_sessions(span)
    if not span.has_sessions:
        logger.warning("this family keeps more than keys and values: it is served for training and evaluation only")
    if may_share and span.has_sessions:
        span.past_shapes = measure_past_shapes(span)
    span.batches_sessions = span.has_sessions and verify_batched_decoding(span)
    if span.has_sessions and not span.batches_sessions:
        logger.info("steps of several sessions are not batched: this family gave different results when they were")
    trim_heap()  # of what the tests have freed
    return span


def load_adapters(span: BlockSpan, checkpoint: Checkpoint, sources: Sequence[str]) -> HeldAdapters:
    """Loads the hosted blocks' part of adapters, in the blocks' dtype, to their device.

    Args:
        span: the blocks.
        checkpoint: the model. Its access token is used for adapters too.
        sources: folders or hub ids.

    Raises:
        CheckpointError: there is no such adapter, or it is for another model.
        ConfigurationError: a setting of it is not supported, or two have one name.
    """
    adapters: dict[str, Adapter] = {}
    for source in sources:
        count = num_blocks(checkpoint.config)
        adapter = read_adapter(source, span.layout, count, span.start, span.end, token=checkpoint.token)
        assert adapter.name is not None
        if adapter.name in adapters:
            raise ConfigurationError(f"two adapters are called {adapter.name!r}: rename one's folder")
        try:
            span.check_adapter(adapter)
        except ProtocolError as e:
            raise CheckpointError(f"adapter {source!r} is for another model: {e}") from e
        factors = {name: tensor.to(span.device, span.dtype) for name, tensor in adapter.tensors().items()}
        adapters[adapter.name] = adapter.with_tensors(factors)
        logger.info("holding adapter %s, %.1f MiB", adapter.name, adapter.num_bytes / 2**20)
    return HeldAdapters(list(adapters.values()))


def server_info(
    span: BlockSpan, checkpoint: Checkpoint, limits: ServerLimits, adapters: HeldAdapters
) -> dict[str, Any]:
    """The answer to `info`."""
    return {
        "start": span.start,
        "end": span.end,
        "num_blocks": num_blocks(checkpoint.config),
        "hidden_size": span.hidden_size,
        "dtype": str(span.dtype).removeprefix("torch."),
        "quant_type": span.quant_type,
        "wire_dtypes": sorted(WIRE_DTYPES),
        "fingerprint": checkpoint.fingerprint,
        "adapters": adapters.fingerprints,
        "version": __version__,
        "max_batch_tokens": limits.max_batch_tokens,
        "max_message_bytes": limits.max_message_bytes,
        "max_open_requests": limits.max_open_requests,
    }


@torch.no_grad()
def forward_seconds(span: BlockSpan, batch: int, tokens: int) -> float:
    """The shortest of three forwards of random samples [batch, tokens, H]: others may be using the machine."""
    hidden = torch.randn(batch, tokens, span.hidden_size, device=span.device, dtype=span.dtype)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        span.forward(SpanInputs(span.start, span.end, hidden))[0].sum().item()  # `item` waits for a GPU too
        seconds.append(time.perf_counter() - began)
    return min(seconds)
