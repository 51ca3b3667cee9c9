"""The cache that transformers sees of keys and values on servers: one layer, which knows only its length."""

from __future__ import annotations

import torch

from petals_lightning.client.block_pass import LengthLayer
from petals_lightning.client.inference_session import InferenceSession
from petals_lightning.errors import UnsupportedInputError
from petals_lightning.hf.compat import Cache


class RemoteLayer(LengthLayer):
    """Represents a session. Going back and reordering reach its servers with the next step."""

    def __init__(self, session: InferenceSession):
        super().__init__()
        self._session = session

    def get_seq_length(self) -> int:
        return self._session.position

    def get_max_length(self) -> int:
        return self._session.max_length

    def keep_first(self, length: int) -> None:
        self._session.position = length

    def reset(self) -> None:
        self._session.position = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._session.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UnsupportedInputError(f"a session's batch cannot be repeated {repeats} times: repeat the inputs instead")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise UnsupportedInputError(
            "samples cannot be removed from a session's batch: remove them from the inputs instead"
        )


class RemoteCache(Cache):
    """The cache of a model whose blocks run in `session`."""

    def __init__(self, session: InferenceSession):
        super().__init__(layers=[RemoteLayer(session)])
        self.session = session
