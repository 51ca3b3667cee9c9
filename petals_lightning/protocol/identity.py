"""A peer's private key, and the peer id that follows from it.

Ids and encodings are those of libp2p: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import hashlib
from typing import Self

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2

_MAX_INLINE_BYTES = 42  # up to this length, a public key is its own id; for a longer one the id is its SHA-256
_MAX_KEY_BYTES = 1024  # of a public key; an RSA key of 4096 bits has 550 bytes


class Identity:
    """A peer's private key: Ed25519 (libp2p's default) or RSA (hivemind's).

    Attributes:
        encoded: the key in libp2p's file format.
        peer_id: base58.
        public_key: in libp2p's encoding; others check signatures with it.

    Raises:
        ValueError: `encoded` is not such a key.
    """

    def __init__(self, encoded: bytes):
        self.encoded = encoded
        try:
            parsed = crypto_pb2.PrivateKey.FromString(encoded)
            self._key = _private_key(parsed.key_type, parsed.data)
        except Exception as e:  # errors of protobuf and cryptography have no common base class
            raise ValueError("no private key of libp2p of the kinds Ed25519 and RSA") from e
        self.public_key = _encode(self._key.public_key())
        self.peer_id = _peer_id(self.public_key)

    @classmethod
    def new(cls) -> Self:
        """Makes a new Ed25519 key."""
        key = ed25519.Ed25519PrivateKey.generate()
        data = key.private_bytes_raw() + key.public_key().public_bytes_raw()
        return cls(crypto_pb2.PrivateKey(key_type=crypto_pb2.Ed25519, data=data).SerializeToString())

    def sign(self, data: bytes) -> bytes:
        if isinstance(self._key, rsa.RSAPrivateKey):
            return self._key.sign(data, padding.PKCS1v15(), hashes.SHA256())
        return self._key.sign(data)


def is_signed_by(peer_id: str, public_key: bytes, data: bytes, signature: bytes) -> bool:
    """Whether the peer with this base58 id has signed the data; False for malformed input."""
    if len(public_key) > _MAX_KEY_BYTES or _peer_id(public_key) != peer_id:
        return False
    try:
        parsed = crypto_pb2.PublicKey.FromString(public_key)
        if parsed.key_type == crypto_pb2.Ed25519:
            ed25519.Ed25519PublicKey.from_public_bytes(parsed.data).verify(signature, data)
            return True
        key = serialization.load_der_public_key(parsed.data)
        if not isinstance(key, rsa.RSAPublicKey):
            return False
        key.verify(signature, data, padding.PKCS1v15(), hashes.SHA256())
    except Exception:  # wrong or malformed; errors of protobuf and cryptography have no common base class
        return False
    return True


def _private_key(kind: int, data: bytes) -> ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey:
    if kind == crypto_pb2.Ed25519:
        return ed25519.Ed25519PrivateKey.from_private_bytes(data[:32])  # the public key follows it, once or twice
    key = serialization.load_der_private_key(data, password=None)
    if kind != crypto_pb2.RSA or not isinstance(key, rsa.RSAPrivateKey):
        raise ValueError(f"kind {kind}")
    return key


def _encode(key: ed25519.Ed25519PublicKey | rsa.RSAPublicKey) -> bytes:
    if isinstance(key, rsa.RSAPublicKey):
        kind, encoding = crypto_pb2.RSA, serialization.Encoding.DER
        data = key.public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    else:
        kind, data = crypto_pb2.Ed25519, key.public_bytes_raw()
    return bytes(crypto_pb2.PublicKey(key_type=kind, data=data).SerializeToString())


def _peer_id(public_key: bytes) -> str:
    """A multihash of the encoded key: kind, length, digest."""
    if len(public_key) <= _MAX_INLINE_BYTES:
        return PeerID(bytes([0x00, len(public_key)]) + public_key).to_base58()
    return PeerID(bytes([0x12, 0x20]) + hashlib.sha256(public_key).digest()).to_base58()
