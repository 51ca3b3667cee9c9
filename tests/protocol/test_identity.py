"""Peer ids and signatures, compared with libp2p's own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hivemind.p2p import P2P, PeerID
from hivemind.proto import crypto_pb2

from petals_lightning.protocol.identity import Identity, is_signed_by
from petals_lightning.swarm import SwarmNode
from tools.testing.swarms import LOOPBACK


@pytest.fixture(params=["Ed25519", "RSA"])
def identity(request: pytest.FixtureRequest, tmp_path: Path) -> Identity:
    if request.param == "Ed25519":
        return Identity.new()
    P2P.generate_identity(str(tmp_path / "rsa.id"))
    return Identity((tmp_path / "rsa.id").read_bytes())


def test_the_daemon_makes_the_same_id_of_a_key(identity: Identity, tmp_path: Path) -> None:
    path = tmp_path / "peer.id"
    path.write_bytes(identity.encoded)
    with SwarmNode(host_maddrs=LOOPBACK, identity_path=str(path)).start() as node:
        assert node.peer_id.to_base58() == node.identity.peer_id == identity.peer_id


def test_the_id_of_an_rsa_key_is_hiveminds(tmp_path: Path) -> None:
    P2P.generate_identity(str(tmp_path / "rsa.id"))
    key = (tmp_path / "rsa.id").read_bytes()
    assert Identity(key).peer_id == PeerID.from_identity(key).to_base58()


def test_a_throw_away_key_signs_and_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # `tmp_path` is too long for sockets
        monkeypatch.setattr("tempfile.tempdir", folder)
        with SwarmNode(host_maddrs=LOOPBACK).start() as node:
            assert node.identity.peer_id == node.peer_id.to_base58()
            assert not list(Path(folder).glob("*.id"))


def test_only_the_key_of_an_id_signs_for_it(identity: Identity) -> None:
    data, other = b"words", Identity.new()
    signature = identity.sign(data)
    assert is_signed_by(identity.peer_id, identity.public_key, data, signature)
    assert not is_signed_by(identity.peer_id, identity.public_key, b"other words", signature)
    assert not is_signed_by(identity.peer_id, identity.public_key, data, other.sign(data))
    assert not is_signed_by(identity.peer_id, other.public_key, data, other.sign(data))
    assert not is_signed_by(other.peer_id, other.public_key, data, signature)
    for nonsense in (b"", b"\xff" * 64, identity.public_key + b"\0", b"x" * 100_000):
        assert not is_signed_by(identity.peer_id, nonsense, data, signature)
        assert not is_signed_by(identity.peer_id, identity.public_key, data, nonsense)


def test_other_kinds_of_keys_are_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    data = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    encoded = crypto_pb2.PrivateKey(key_type=crypto_pb2.ECDSA, data=data).SerializeToString()
    for wrong in (encoded, b"", b"nonsense"):
        with pytest.raises(ValueError, match="no private key of libp2p of the kinds Ed25519 and RSA"):
            Identity(wrong)
