"""A server's record with its signature, as our servers store it once for each model.

Petals' records stand under each block's key, where anybody may store one under anybody's id. What our servers say of
themselves stands under one key of the model besides, signed with the key that the server's peer id follows from. In a
private swarm it also carries a code that only those can make who know the swarm's token.
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
"""Stands before the server's id in a subkey. Peers of ours keep no such record whose signature is wrong."""

_PURPOSE = b"petals_lightning.server_record.v1\0"  # so that no other signature of the same key can stand for one


LISTED_KEY = "_petals_lightning.models"
"""The DHT key of the same records of all models that are not private."""


def signed_key(dht_prefix: str) -> str:
    """The DHT key of a model's signed records; block keys end in a number."""
    return f"{dht_prefix}{UID_DELIMITER}servers"


@dataclass(frozen=True)
class SignedRecord:
    """A record whose signature is right.

    Attributes:
        dht_prefix: the model that it is about.
        expires: DHT time at which it ends; it must be stored until then, not longer.
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
        """Reads a value that was found under `peer`.

        Raises:
            ProtocolError: it is malformed, or not signed by that peer.
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
    """A key that is slow to compute: strangers can read the codes, and try tokens at home."""
    return hashlib.scrypt(token.encode(), salt=_PURPOSE, n=1 << 14, r=8, p=1, dklen=32)
