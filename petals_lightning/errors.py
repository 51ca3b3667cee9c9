"""Every exception that a user can meet.

Each message says what was got, what the rule is, and how to fix it. `ConfigurationError` and its children are the
user's to mend and are raised before anything has run; `SwarmError` and its children come from the network or from a
server.
"""

from __future__ import annotations


class PetalsLightningError(Exception):
    """Root of all errors raised on purpose by this package."""


class ConfigurationError(PetalsLightningError, ValueError):
    """A setting is wrong. The message names it and says how to mend it."""


class UnsupportedModelError(ConfigurationError):
    """The checkpoint is no decoder that can be split into blocks."""


class CheckpointError(ConfigurationError):
    """A model folder or a trained checkpoint is missing, incomplete or made for something else."""


class DataError(ConfigurationError):
    """A data file has no usable text or labels."""


class NoModelError(ConfigurationError, AttributeError):
    """A module is used by hand before a Trainer has loaded its model."""


class UnsupportedInputError(PetalsLightningError, ValueError):
    """A call to a distributed model asks for something that cannot cross the swarm."""


class HubError(PetalsLightningError, RuntimeError):
    """The Hugging Face hub cannot be reached, or refuses what was asked of it."""


class SwarmError(PetalsLightningError, RuntimeError):
    """Something in the swarm failed."""


class SwarmConnectionError(SwarmError):
    """This machine cannot join the swarm: no initial peer answers, or the node cannot start."""


class NoServersError(SwarmError):
    """No usable server holds some of the model's blocks."""


class NoCacheRoomError(SwarmError):
    """No server that may be used has room for the keys and values of an inference session."""


class IncompatibleServerError(SwarmError):
    """A server holds another model under the same name."""


class AccessDeniedError(SwarmError):
    """Servers that hold the blocks let only certain peers in, and this one is not among them."""


class RetriesExhaustedError(SwarmError):
    """A part of a step failed too often, on whatever servers were tried."""


class RemoteRequestError(SwarmError):
    """Servers call a request wrong, or fail on it, and none that holds the blocks is left to say otherwise."""


class PeerFailure(SwarmError):
    """One peer failed (lost stream, silence, refusal for lack of room). Retried elsewhere; seen in logs only.

    `peer` is the peer's base58 id; `code` is one of protocol.messages.ErrorCode where the peer itself answered.
    """

    def __init__(self, peer: str, reason: str, code: str | None = None):
        super().__init__(f"server …{peer[-6:]}: {reason}")
        self.peer, self.reason, self.code = peer, reason, code


class WrongResult(PeerFailure):
    """A peer's answer cannot be right. `proven`: a judge found another one, so it is no accident."""

    def __init__(self, peer: str, reason: str, *, proven: bool = False):
        super().__init__(peer, reason)
        self.proven = proven


class NonFiniteResult(WrongResult):
    """NaN, infinity or absurdly large values where the inputs had none: the peer is broken, or the model overflows."""


class ProtocolError(PetalsLightningError, ValueError):
    """Bytes from the network do not follow the protocol."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the machine or of its GPU ran out. Torch and safetensors have no common class for that."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text
