"""A server's signed record, which our servers store once for each model.

Petals' records are stored under each block's key, where any peer can store one under any id. Our servers also store a
record under one key of the model, signed with the private key that their peer id follows from. In a private swarm it
also carries a code that can only be made with the swarm's token.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from dataclasses import dataclass
from typing import Any, Self

import msgpack

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.identity import Identity, is_signed_by
from petals_lightning.protocol.records import ServerRecord
from petals_lightning.protocol.uids import UID_DELIMITER

SUBKEY_PREFIX = "signed:"
"""Precedes the server's id in a subkey. Our peers store no such record with an invalid signature."""

_PURPOSE = b"petals_lightning.server_record.v1\0"  # separates these signatures from others of the same key


LISTED_KEY = "_petals_lightning.models"
"""The DHT key of these records for all models that are not private."""


def signed_key(dht_prefix: str) -> str:
    """The DHT key of a model's signed records; block keys end in a number."""
    return f"{dht_prefix}{UID_DELIMITER}servers"


@dataclass(frozen=True)
class SignedRecord:
    """A record with a valid signature.

    Attributes:
        dht_prefix: of the model.
        expires: DHT time at which it expires; it must be stored with this expiration.
    """

    record: ServerRecord
    dht_prefix: str
    expires: float
    _payload: bytes
    _code: bytes | None

    @staticmethod
    def sign(
        record: ServerRecord, dht_prefix: str, expires: float, identity: Identity, token: str | None
    ) -> tuple[bytes, bytes, bytes, bytes | None]:
        """The value to store under `signed_key` and `SUBKEY_PREFIX` + the peer's id."""
        payload = msgpack.packb([dht_prefix, expires, record.to_value()])
        signature = identity.sign(_PURPOSE + payload)
        return payload, identity.public_key, signature, _code(token, identity.peer_id, payload) if token else None

    @classmethod
    def open(cls, value: Any, peer: str) -> Self:
        """Reads a value that was stored under `peer`.

        Raises:
            ProtocolError: the value is malformed, or not signed by that peer.
        """
        try:
            payload, public_key, signature, code = value
            if not all(isinstance(part, bytes) for part in (payload, public_key, signature, code or b"")):
                raise TypeError("not bytes")
            if not is_signed_by(peer, public_key, _PURPOSE + payload, signature):
                raise ValueError("the signature is wrong")
            dht_prefix, expires, record = msgpack.unpackb(payload, use_list=False)
            if not isinstance(dht_prefix, str) or not isinstance(expires, float):
                raise TypeError("no prefix or no time")
            return cls(ServerRecord.from_value(record), dht_prefix, expires, payload, code)
        except (TypeError, ValueError, msgpack.UnpackException) as e:
            raise ProtocolError(f"no signed record of {peer}: {e}") from e

    def is_of_swarm(self, token: str, peer: str) -> bool:
        """Whether the server knows the swarm's token."""
        return self._code is not None and hmac.compare_digest(self._code, _code(token, peer, self._payload))


def _code(token: str, peer: str, payload: bytes) -> bytes:
    return hmac.digest(_stretched(token), peer.encode() + b"\0" + payload, "sha256")


@functools.lru_cache(maxsize=8)
def _stretched(token: str) -> bytes:
    """Derives a key slowly: strangers can read the codes and try to guess the token offline."""
    return hashlib.scrypt(token.encode(), salt=_PURPOSE, n=1 << 14, r=8, p=1, dklen=32)
