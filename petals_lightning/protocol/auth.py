"""Proof that a peer knows a swarm's shared token, without sending it.

Each side answers a challenge with an HMAC, keyed by the token, over both nonces and both peer ids. libp2p authenticates
the ids, so a proof is useless to a peer in the middle and on another stream. The client proves itself first. The server
sends its own proof only after that, so strangers get nothing to guess the token from.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import shlex
import stat
from pathlib import Path

from petals_lightning.errors import ConfigurationError

logger = logging.getLogger(__name__)

NONCE_BYTES = 32
MIN_TOKEN_CHARACTERS = 16


def new_nonce() -> bytes:
    """A new random challenge of NONCE_BYTES."""
    return secrets.token_bytes(NONCE_BYTES)


def prove(token: str, role: str, *, client: str, server: str, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """The proof of one side.

    Args:
        token: the swarm's secret.
        role: "client" or "server", the side that proves. So a proof cannot be sent back as the other side's.
        client, server: base58 peer ids.
        client_nonce, server_nonce: NONCE_BYTES each, new for this stream.
    """
    parts = [b"petals_lightning.auth.v1", role.encode(), client.encode(), server.encode(), client_nonce, server_nonce]
    return hmac.digest(token.encode(), b"".join(len(part).to_bytes(4, "big") + part for part in parts), "sha256")


def is_proof(given: object, expected: bytes) -> bool:
    """Compares in constant time; False for anything but bytes."""
    return isinstance(given, bytes) and hmac.compare_digest(given, expected)


def check_token(token: str) -> str:
    """Returns the token if it is long enough.

    Raises:
        ConfigurationError: it is so short that it could be guessed from a proof.
    """
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ConfigurationError(
            f"the swarm's token has {len(token)} characters: it must have at least {MIN_TOKEN_CHARACTERS}; "
            "`openssl rand -hex 32 > swarm.token` makes a good one"
        )
    return token


def read_token(path: str | Path) -> str:
    """Reads the token in a file, without surrounding white space. Warns if other users may read the file.

    Raises:
        ConfigurationError: the file cannot be read, or holds no valid token.
    """
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
        mode = stat.S_IMODE(Path(path).stat().st_mode)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigurationError(f"the token file {str(path)!r} cannot be read: {e}") from e
    if os.name == "posix" and mode & stat.S_IRWXO:
        logger.warning(
            "the token file %r has mode %03o: others on this machine may read the secret of the swarm; only its owner "
            "should, `chmod 600 %s` makes it so",
            str(path), mode, shlex.quote(str(path)),
        )  # fmt: skip
    return check_token(token)
