"""What transformers sees of keys and values that live on servers: a cache of one layer that knows its length only."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from petals_lightning.client.inference import InferenceSession
from petals_lightning.errors import UnsupportedInputError


class _LengthLayer(CacheLayerMixin):
    """Claims to hold positions; holds nothing, since no block of this process ever asks for them."""

    is_sliding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("no attention runs in this process")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no attention runs in this process")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class OffsetLayer(_LengthLayer):
    """Claims to hold `length` positions."""

    def __init__(self, length: int):
        super().__init__()
        self._length = length

    def get_seq_length(self) -> int:
        return self._length


class RemoteLayer(_LengthLayer):
    """Speaks for a session: going back and reordering reach its servers with the next step."""

    is_croppable = True

    def __init__(self, session: InferenceSession):
        super().__init__()
        self._session = session

    def get_seq_length(self) -> int:
        return self._session.position

    def get_max_length(self) -> int:
        return self._session.max_length

    def crop(self, tokens_to_remove: int) -> None:
        self._session.position -= abs(tokens_to_remove)

    def reset(self) -> None:
        self._session.position = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._session.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UnsupportedInputError(f"a session's batch cannot be repeated {repeats} times: repeat the inputs instead")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise UnsupportedInputError("samples cannot leave a session's batch: leave them out of the inputs instead")


class RemoteCache(Cache):
    """`past_key_values` of a model whose blocks run in `session`."""

    def __init__(self, session: InferenceSession):
        super().__init__(layers=[RemoteLayer(session)])
        self.session = session
