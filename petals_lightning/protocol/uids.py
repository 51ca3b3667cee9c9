"""Names of blocks in the DHT, in Petals' format."""

from __future__ import annotations

from petals_lightning.errors import ConfigurationError, ProtocolError

UID_DELIMITER = "."
CHAIN_DELIMITER = " "
MAX_CHAIN_CHARACTERS = 1 << 16
MODELS_KEY = "_petals.models"


def check_dht_prefix(prefix: str) -> str:
    """Returns `prefix` if it may be used in a block uid.

    Raises:
        ConfigurationError: the prefix is empty, or has a dot or white space, which separate parts of uids.
    """
    if not prefix or UID_DELIMITER in prefix or any(c.isspace() for c in prefix):
        raise ConfigurationError(
            f"dht_prefix {prefix!r} cannot name a model: it must be non-empty and hold neither dots nor spaces; "
            f"try {prefix.strip().replace(UID_DELIMITER, '-').replace(' ', '-') or 'my-model'!r}"
        )
    return prefix


def block_uid(prefix: str, block: int) -> str:
    """The DHT key of one block, e.g. `Llama-3-8B-hf.17`."""
    return f"{prefix}{UID_DELIMITER}{block}"


def derive_dht_prefix(name_or_path: str, model_type: str, *, is_local: bool) -> str:
    """The prefix under which a hub repository's blocks are announced, as Petals derives it.

    Llama: `name` with `-` for `.`, plus `-hf`; Mixtral: `org/name`; BLOOM: `org/name-petals`; Falcon and all families
    that Petals does not know: `name`.

    Raises:
        ConfigurationError: the model is a local folder, whose name other machines do not know.
    """
    if is_local:
        raise ConfigurationError(
            f"no dht_prefix for the local folder {name_or_path!r}: a folder has no name that other machines know; "
            "give the same one to servers (--dht-prefix NAME) and clients (dht_prefix=NAME)"
        )
    name = name_or_path.rsplit("/", 1)[-1]
    if model_type == "llama":
        prefix = name if name.endswith("-hf") else name + "-hf"
    elif model_type == "mixtral":
        prefix = name_or_path
    elif model_type == "bloom":
        prefix = name_or_path + "-petals"
    else:
        prefix = name
    return check_dht_prefix(prefix.replace(UID_DELIMITER, "-"))


def chain_uid(prefix: str, start: int, end: int) -> str:
    """One name for blocks [start, end) of a model, as Petals' methods take it, e.g. `m.0 m.1 m.2`."""
    return CHAIN_DELIMITER.join(block_uid(prefix, block) for block in range(start, end))


def parse_chain(uid: str) -> tuple[str, int, int]:
    """Prefix, start and end of a chain of blocks.

    Raises:
        ProtocolError: the blocks are not of one model, or do not follow one another.
    """
    if len(uid) > MAX_CHAIN_CHARACTERS:
        raise ProtocolError(f"a chain of {len(uid)} characters, the limit is {MAX_CHAIN_CHARACTERS}")
    blocks, prefix = [], uid.partition(UID_DELIMITER)[0]
    for part in uid.split(CHAIN_DELIMITER):
        name, _, number = part.partition(UID_DELIMITER)
        if name != prefix or not (number.isascii() and number.isdigit() and len(number) <= 6):
            raise ProtocolError(f"{part!r:.100} is not a block of {prefix!r:.100}; one is called PREFIX.NUMBER")
        blocks.append(int(number))
    start, end = blocks[0], blocks[0] + len(blocks)
    if not prefix or blocks != list(range(start, end)):
        raise ProtocolError(f"blocks {blocks!r:.100} of {prefix!r:.100} do not follow one another")
    return prefix, start, end
