"""A Petals server's answer to `rpc_info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hivemind.proto.runtime_pb2 import ExpertInfo
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.petals.metadata import dump, load
from petals_lightning.protocol.petals.tensors import COMPRESSIONS, NONE

_EXAMPLE_SHAPE = (1, 2048)  # placeholder for [B, S] in the descriptors


@dataclass(frozen=True)
class ServerInfo:
    """The answer to `rpc_info`.

    Attributes:
        version: of the server's software.
        cache_tokens_available: positions of one block whose keys and values fit into the cache; None if not given.
        hidden_size, dtype: of the blocks; None if the call named no block.
        compression: of tensors that are sent to the server.
        open_requests: requests of all clients that are not answered yet; None from Petals' servers.
    """

    version: str | None = None
    cache_tokens_available: int | None = None
    hidden_size: int | None = None
    dtype: torch.dtype | None = None
    compression: int = NONE
    open_requests: int | None = None

    def to_message(self) -> ExpertInfo:
        info: dict[str, Any] = {
            "version": self.version,
            "dht_client_mode": False,
            "cache_tokens_available": self.cache_tokens_available,
        }
        if self.open_requests is not None:
            info["open_requests"] = self.open_requests
        if self.hidden_size is not None:
            hidden = BatchTensorDescriptor(
                *_EXAMPLE_SHAPE, self.hidden_size, dtype=self.dtype, compression=self.compression
            )
            prompts = BatchTensorDescriptor((), dtype=self.dtype, compression=self.compression)
            hypo_ids = BatchTensorDescriptor((), dtype=torch.int64)
            info |= {
                "forward_schema": ((hidden,), {}),
                "outputs_schema": (hidden,),
                "keyword_names": (),
                "inference_schema": ((hidden, prompts, hypo_ids), {}),
            }
        return ExpertInfo(serialized_info=dump(info))

    @classmethod
    def from_message(cls, message: ExpertInfo) -> ServerInfo:
        """Reads an answer. Fields that are missing or have the wrong type become None.

        Raises:
            ProtocolError: the answer is not a dict, or asks for a compression that is not supported.
        """
        info = load(message.serialized_info)
        if not isinstance(info, dict):
            raise ProtocolError(f"rpc_info answered {info!r:.60}")
        version, left = info.get("version"), info.get("cache_tokens_available")
        hidden = None
        match info.get("forward_schema"):
            case [[BatchTensorDescriptor() as hidden, *_], _]:
                if hidden.compression not in COMPRESSIONS:
                    raise ProtocolError(f"this server wants compression {hidden.compression}, which is not supported")
        size: object = hidden.size[-1] if hidden is not None else None
        return cls(
            version if isinstance(version, str) else None,
            left if type(left) is int else None,
            size if type(size) is int else None,
            hidden.dtype if hidden is not None else None,
            hidden.compression if hidden is not None else NONE,
            waiting if type(waiting := info.get("open_requests")) is int else None,
        )
