"""A server's record in the DHT: `(state, throughput, extra)` under each block that it holds.

The tuple and the names in `extra` are Petals'. The keys under `lightning` are ours. Readers on both sides ignore keys
that they do not know.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.checks import printable

STREAM_VERSION = 3
MAX_WORD_LENGTH = 64
MAX_NAME_LENGTH = 200  # of a model or a repository
MAX_BLOCKS = 512  # of a model in the public list; the largest models have 126 blocks today
_MIN_SPEED = 1e-3  # tokens a second; slower speeds could give infinite times


class ServerState(IntEnum):
    OFFLINE = 0
    JOINING = 1
    ONLINE = 2


@dataclass(frozen=True)
class ServerRecord:
    """One server's announcement.

    Attributes:
        start, end: the span of blocks held, `end` exclusive; None if not given.
        public_name, version, torch_dtype, fingerprint: texts; in a record that was read, `printable` ones of at most
            `MAX_WORD_LENGTH` characters. None if not given. The fingerprint is a short digest of the served weights.
        quant_type: of the weights, such as "nf4"; "none" if they are not quantised.
        throughput: requests a second, as Petals counts them; used to place and compare servers.
        tokens_per_second: forward speed of one block, in tokens a second (Petals: `forward_rps`); None if not measured.
        stream_version: version of our stream method, None on servers that offer only Petals' methods.
        hidden_size: H of the served model; None if not given.
        cache_tokens_left: positions of one block whose keys and values still fit into the cache; None if not given.
        num_blocks, repository: of the served model; None if not given, or if the model is private.
    """

    state: ServerState
    throughput: float
    start: int | None = None
    end: int | None = None
    public_name: str | None = None
    version: str | None = None
    torch_dtype: str | None = None
    quant_type: str = "none"
    tokens_per_second: float | None = None
    stream_version: int | None = None
    hidden_size: int | None = None
    fingerprint: str | None = None
    cache_tokens_left: int | None = None
    num_blocks: int | None = None
    repository: str | None = None

    def without_claims(self) -> ServerRecord:
        """A copy like a Petals server's record, without the fields that only a signed record can have."""
        return replace(self, stream_version=None, hidden_size=None, fingerprint=None, num_blocks=None, repository=None)

    def to_value(self) -> tuple[int, float, dict[str, Any]]:
        """The value to store in the DHT."""
        extra: dict[str, Any] = {
            "start_block": self.start,
            "end_block": self.end,
            "public_name": self.public_name,
            "version": self.version,
            "torch_dtype": self.torch_dtype,
            "quant_type": self.quant_type,
            "adapters": [],
            "forward_rps": self.tokens_per_second,
            "cache_tokens_left": self.cache_tokens_left,
        }
        if self.stream_version is not None:
            extra["lightning"] = {
                "stream": self.stream_version,
                "hidden_size": self.hidden_size,
                "fingerprint": self.fingerprint,
                "num_blocks": self.num_blocks,
                "repository": self.repository,
            }
        return int(self.state), float(self.throughput), {k: v for k, v in extra.items() if v is not None}

    @classmethod
    def from_value(cls, value: Any) -> ServerRecord:
        """Reads a DHT value. Every key of `extra` is optional, and is dropped if it has the wrong type.

        Raises:
            ProtocolError: the value is not a tuple of a known state, a finite throughput and maybe a dict.
        """
        try:
            if not isinstance(value, (tuple, list)):
                raise TypeError(type(value).__name__)
            state, throughput, *rest = value
            state, throughput = ServerState(state), float(throughput)
        except (TypeError, ValueError, OverflowError) as e:
            raise ProtocolError(f"malformed server record {value!r:.200}") from e
        if not math.isfinite(throughput) or throughput < 0:
            raise ProtocolError(f"malformed server record: throughput {throughput}")
        extra = rest[0] if rest and isinstance(rest[0], dict) else {}
        ours = extra.get("lightning")
        ours = ours if isinstance(ours, dict) and _typed(ours, "stream", int) is not None else {}
        start, end = _typed(extra, "start_block", int), _typed(extra, "end_block", int)
        if start is None or end is None or not 0 <= start < end:
            start = end = None
        count = _typed(ours, "num_blocks", int)
        speed = _typed(extra, "forward_rps", (int, float))
        if speed is not None and not _MIN_SPEED <= speed <= sys.float_info.max:
            speed = None
        return cls(
            state=state,
            throughput=throughput,
            start=start,
            end=end,
            public_name=_word(extra, "public_name"),
            version=_word(extra, "version"),
            torch_dtype=_word(extra, "torch_dtype"),
            quant_type=_word(extra, "quant_type") or "none",
            tokens_per_second=float(speed) if speed is not None else None,
            stream_version=_typed(ours, "stream", int),
            hidden_size=_typed(ours, "hidden_size", int),
            fingerprint=_word(ours, "fingerprint"),
            cache_tokens_left=_typed(extra, "cache_tokens_left", int),
            num_blocks=count if count is not None and 0 < count <= MAX_BLOCKS else None,
            repository=_word(ours, "repository", MAX_NAME_LENGTH),
        )


def _typed(source: dict[Any, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    value = source.get(key)
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _word(source: dict[Any, Any], key: str, longest: int = MAX_WORD_LENGTH) -> str | None:
    value = _typed(source, key, str)
    return (printable(value, longest) or None) if value is not None else None
