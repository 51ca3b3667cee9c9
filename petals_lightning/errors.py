"""All exceptions that a user can meet.

Each message says what was got, what the rule is, and how to fix it. `ConfigurationError` and its subclasses are the
user's to fix and are raised before anything has run. `SwarmError` and its subclasses come from the network or from a
server.
"""

from __future__ import annotations


class PetalsLightningError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigurationError(PetalsLightningError, ValueError):
    """A setting is wrong. The message names it and says how to fix it."""


class UnsupportedModelError(ConfigurationError):
    """The checkpoint is not a decoder that can be split into blocks."""


class CheckpointError(ConfigurationError):
    """A model folder or a trained checkpoint is missing, incomplete or made for something else."""


class DataError(ConfigurationError):
    """A data file has no usable text or labels."""


class NoModelError(ConfigurationError, AttributeError):
    """A module is used without a Trainer, before one has loaded its model."""


class UnsupportedInputError(PetalsLightningError, ValueError):
    """A call to a distributed model requests something that cannot be computed in a swarm."""


class HubError(PetalsLightningError, RuntimeError):
    """The Hugging Face hub cannot be reached, or refuses a request."""


class SwarmError(PetalsLightningError, RuntimeError):
    """Something in the swarm failed."""


class SwarmConnectionError(SwarmError):
    """This machine cannot join the swarm: no initial peer answers, or the node cannot start."""


class NoServersError(SwarmError):
    """No usable server holds some of the model's blocks."""


class CacheFullError(SwarmError):
    """No usable server has room for the keys and values of an inference session."""


class IncompatibleServerError(SwarmError):
    """A server holds another model under the same name."""


class AccessDeniedError(SwarmError):
    """Every server that holds the blocks refuses this peer."""


class RetriesExhaustedError(SwarmError):
    """A part of a step failed too often, on all servers that were tried."""


class RemoteRequestError(SwarmError):
    """Servers reject a request or fail on it, and no other server holds the blocks."""


class PeerFailure(SwarmError):
    """One peer failed (lost stream, silence, refusal for lack of room). Retried elsewhere; appears only in logs.

    `peer` is the peer's base58 id; `code` is one of protocol.messages.ErrorCode if the peer itself answered.
    """

    def __init__(self, peer: str, reason: str, code: str | None = None):
        super().__init__(f"server …{peer[-6:]}: {reason}")
        self.peer, self.reason, self.code = peer, reason, code


class WrongResult(PeerFailure):
    """A peer's answer cannot be right. `proven`: a judge got another result, so it is not an accident."""

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
