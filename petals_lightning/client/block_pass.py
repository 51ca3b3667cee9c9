"""One pass through remote blocks, in the form of a cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from petals_lightning.client.inference_session import InferenceSession
from petals_lightning.hf.compat import Cache, CacheLayer
from petals_lightning.protocol.adapters import Adapter


class LengthLayer(CacheLayer):
    """A cache layer with a length and no contents: no attention runs in this process."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("no attention runs in this process")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no attention runs in this process")


class _Offset(LengthLayer):
    def __init__(self, length: int):
        super().__init__()
        self._length = length

    def get_seq_length(self) -> int:
        return self._length


class BlockPass(Cache):
    """What the model around the blocks requests of one pass, besides the hidden states.

    Decoders ask their cache how many positions precede the batch, and pass it to their blocks. So a pass is a cache,
    and `RemoteSequential` finds it among its arguments. No state of one pass can leak into another, and a decoder that
    drops the cache, whose positions would be wrong, is detected.

    Args:
        length: positions that precede this pass, including the prefix.
        prefix: [P, H] hidden states before every sample, or None.
        adapter: of the blocks, or None.
        rows: [N] indices into B·S of the positions that are read, or None for all. Other outputs are zeros.
        identity: skip the blocks, and return their input.
        session: run the input as the session's next positions, instead of as a batch of its own.
        attention_mask, position_ids: for the session's step.
        keep: number of last positions of the step that are read, or 0 for all. Other outputs are zeros.
        caller_cache: the cache that the model's caller passed, and gets back.

    Attributes:
        entered: [B, S, H] hidden states that reached the blocks; None if the pass has not reached them.
    """

    def __init__(
        self,
        length: int = 0,
        *,
        prefix: torch.Tensor | None = None,
        adapter: Adapter | None = None,
        rows: torch.Tensor | None = None,
        identity: bool = False,
        session: InferenceSession | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        keep: int = 0,
        caller_cache: Cache | None = None,
    ):
        super().__init__(layers=[_Offset(length)])
        self.prefix, self.adapter, self.rows, self.identity = prefix, adapter, rows, identity
        self.session, self.attention_mask, self.position_ids, self.keep = session, attention_mask, position_ids, keep
        self.caller_cache = caller_cache
        self.entered: torch.Tensor | None = None

    @staticmethod
    def among(arguments: Iterable[Any]) -> BlockPass | None:
        """The pass among a block's arguments, whatever its family names that argument; None if there is none."""
        return next((value for value in arguments if isinstance(value, BlockPass)), None)
