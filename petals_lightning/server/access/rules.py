"""Who may use a server: peers on a list, and peers that know the swarm's token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivemind.p2p import PeerID

from petals_lightning.errors import ConfigurationError
from petals_lightning.protocol.auth import NONCE_BYTES, is_proof, new_nonce, prove, read_token
from petals_lightning.protocol.messages import ErrorCode, Message, Method

_MIN_ID_BYTES = 34  # a SHA-256 multihash: one byte of kind, one of length, and the digest


@dataclass(frozen=True)
class AccessRules:
    """Who may use a server.

    Args:
        allowed_peers: base58 ids of the peers that may use this server; None: every peer may. libp2p authenticates ids.
        token: secret that clients must prove to know, or None. If both are set, a client needs both.
    """

    allowed_peers: frozenset[str] | None = None
    token: str | None = None

    @classmethod
    def of_files(cls, allow_peers: str | None, token_file: str | None) -> AccessRules:
        """The rules that a list of peer ids and a token file make; None for those that are not there.

        Raises:
            ConfigurationError: a file cannot be read, or holds something else.
        """
        return cls(
            allowed_peers=read_peer_list(allow_peers) if allow_peers is not None else None,
            token=read_token(token_file) if token_file is not None else None,
        )

    def __repr__(self) -> str:  # keeps the token out of logs
        return f"AccessRules(allowed_peers={self.allowed_peers}, token={'set' if self.token else None})"


class Gate:
    """Decides whether one client's stream is let in.

    Args:
        rules: the server's.
        peer: the client's base58 id, authenticated by the transport.
        server: this server's base58 id.
    """

    def __init__(self, rules: AccessRules, peer: str, server: str):
        self._rules, self._peer, self._server = rules, peer, server
        self._client_nonce, self._server_nonce = b"", b""
        self._has_proved = rules.token is None

    @property
    def is_open(self) -> bool:
        return self._is_listed and self._has_proved

    def refusal(self) -> Message:
        """The answer to every request of a client that is not let in."""
        if not self._is_listed:
            reason = (
                f"this server lets only listed peers in, and {self._peer} is not on its list: ask its owner to add it "
                "(serve --allow-peers), and keep your id with identity_path"
            )
        else:
            reason = "this server belongs to a swarm with a shared token: give the same one (swarm_token)"
        return Message.error(ErrorCode.NOT_ALLOWED, reason)

    def answer(self, fields: dict[str, Any]) -> Message:
        """Answers an `auth` message. The client sends two: its nonce, then its proof."""
        if not self._is_listed:
            return self.refusal()
        if self._rules.token is None:
            return Message.error(
                ErrorCode.NOT_ALLOWED, "this server knows no token: it was started without --token-file"
            )
        nonce = fields.get("nonce")
        if isinstance(nonce, bytes) and len(nonce) == NONCE_BYTES:
            self._client_nonce, self._server_nonce = nonce, new_nonce()
            return Message(Method.OK, {"nonce": self._server_nonce})
        challenge, self._server_nonce = self._server_nonce, b""  # a challenge can be answered once
        expected, own = (
            prove(
                self._rules.token,
                role,
                client=self._peer,
                server=self._server,
                client_nonce=self._client_nonce,
                server_nonce=challenge,
            )
            for role in ("client", "server")
        )
        if not challenge or not is_proof(fields.get("proof"), expected):
            return Message.error(ErrorCode.NOT_ALLOWED, "this server's swarm has another token than the one given")
        self._has_proved = True
        return Message(Method.OK, {"proof": own})

    @property
    def _is_listed(self) -> bool:
        return self._rules.allowed_peers is None or self._peer in self._rules.allowed_peers


def read_peer_list(path: str | Path) -> frozenset[str]:
    """The peer ids in a file: one per line; `#` starts a comment.

    Raises:
        ConfigurationError: the file cannot be read, names no peer, or holds something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigurationError(f"--allow-peers: {str(path)!r} cannot be read: {e}") from e
    peers = set()
    for number, line in enumerate(lines, 1):
        if peer := line.split("#")[0].strip():
            try:
                peer_id = PeerID.from_base58(peer)
                if len(peer_id.to_bytes()) < _MIN_ID_BYTES:
                    raise ValueError("too short")
                peers.add(peer_id.to_base58())
            except Exception as e:  # base58 documents no common base class for its errors
                raise ConfigurationError(
                    f"--allow-peers: line {number} of {str(path)!r} is {peer!r:.80}, which is not a peer id; one looks "
                    "like 12D3KooW… or Qm… and is the last part of a multiaddress"
                ) from e
    if not peers:
        raise ConfigurationError(f"--allow-peers: {str(path)!r} names no peer: nobody could use this server")
    return frozenset(peers)
