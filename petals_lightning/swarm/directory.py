"""The swarm's directory in the DHT: which server holds which block, and which models there are."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.checks import printable
from petals_lightning.protocol.records import ServerRecord
from petals_lightning.protocol.uids import MODELS_KEY, block_uid

logger = logging.getLogger(__name__)

MAX_BLOCKS, MAX_NAME_LENGTH = 4096, 200  # of a model that a stranger lists; the largest have 126 blocks today


@dataclass(frozen=True)
class ModelEntry:
    """A model that somebody serves: its dht prefix, number of blocks and hub repository (None for a private one)."""

    dht_prefix: str
    num_blocks: int
    repository: str | None


class SwarmDirectory:
    """Reads and writes records; all methods are coroutines of the node's loop."""

    def __init__(self, dht: DHTNode):
        self._dht = dht

    async def announce(self, prefix: str, record: ServerRecord, blocks: Sequence[int], lifetime: float) -> bool:
        """Stores this peer's record under each block for `lifetime` seconds; True if every block was stored."""
        peer = self._dht.peer_id.to_base58()
        stored = await self._dht.store_many(
            keys=[block_uid(prefix, block) for block in blocks],
            subkeys=[peer] * len(blocks),
            values=[record.to_value()] * len(blocks),
            expiration_time=get_dht_time() + lifetime,
        )
        return all(stored.values())

    async def announce_model(self, entry: ModelEntry, lifetime: float) -> bool:
        """Adds a model to the public list. Prefixes that begin with `_` are private and are not listed."""
        if entry.dht_prefix.startswith("_"):
            return True
        return await self._dht.store(
            MODELS_KEY,
            subkey=entry.dht_prefix,
            value={"num_blocks": entry.num_blocks, "repository": entry.repository},
            expiration_time=get_dht_time() + lifetime,
        )

    async def servers(self, prefix: str, num_blocks: int) -> list[dict[str, ServerRecord]]:
        """For each block, the records of the peers that announce it; malformed records are left out."""
        uids = [block_uid(prefix, block) for block in range(num_blocks)]
        found = await self._dht.get_many(uids, sufficient_expiration_time=math.inf)
        table: list[dict[str, ServerRecord]] = []
        for uid in uids:
            records, entry = {}, found[uid]
            if entry is not None and isinstance(entry.value, dict):
                for peer, item in entry.value.items():
                    try:
                        PeerID.from_base58(peer)
                        records[peer] = ServerRecord.from_value(item.value)
                    except (ProtocolError, AttributeError, TypeError, ValueError) as e:  # anybody may store anything
                        logger.debug("skipping a record of %s: %s", uid, e)
            table.append(records)
        return table

    async def models(self) -> list[ModelEntry]:
        """The models that servers list publicly, with names that are safe to show; malformed entries are left out."""
        found = (await self._dht.get_many([MODELS_KEY], sufficient_expiration_time=math.inf))[MODELS_KEY]
        if found is None or not isinstance(found.value, dict):
            return []
        entries = []
        for prefix, item in found.value.items():
            value = getattr(item, "value", None)  # anybody may store anything
            if not isinstance(value, dict) or printable(str(prefix), MAX_NAME_LENGTH) != prefix:
                continue
            count, repository = value.get("num_blocks"), value.get("repository")
            if type(count) is int and 0 < count <= MAX_BLOCKS:
                shown = printable(repository, MAX_NAME_LENGTH) if isinstance(repository, str) else None
                entries.append(ModelEntry(prefix, count, shown))
        return sorted(entries, key=lambda entry: entry.dht_prefix)
