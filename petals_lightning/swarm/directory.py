"""The swarm's directory in the DHT: which server holds which block, and which models there are."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.checks import printable
from petals_lightning.protocol.records import MAX_BLOCKS, MAX_NAME_LENGTH, ServerRecord
from petals_lightning.protocol.signed_records import SUBKEY_PREFIX, SignedRecord, signed_key
from petals_lightning.protocol.uids import MODELS_KEY, block_uid
from petals_lightning.swarm.record_keeping import MAX_LIFETIME

if TYPE_CHECKING:
    from petals_lightning.swarm.node import SwarmNode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelEntry:
    """A model that somebody serves: its dht prefix, number of blocks and hub repository (None for a private one)."""

    dht_prefix: str
    num_blocks: int
    repository: str | None


class SwarmDirectory:
    """Reads and writes records; all methods are coroutines of the node's loop.

    Args:
        node: this process's peer, started.
        token: the swarm's secret: records are made with it, and of signed ones only those made with it are believed.
    """

    def __init__(self, node: SwarmNode, token: str | None = None):
        self._node, self._dht, self._token = node, node.dht, token

    async def announce(self, prefix: str, record: ServerRecord, lifetime: float) -> bool:
        """Stores this peer's record for `lifetime` seconds: under each block for Petals' clients, and signed for ours.

        Returns:
            Whether those who look for this server find it.
        """
        is_listed = await self._list(prefix, record, lifetime)
        if not is_listed:  # somebody has stored another record under this peer's id, which expires later
            is_listed = await self._list(prefix, record, MAX_LIFETIME)
        if record.stream_version is None:  # as Petals' servers do
            return is_listed
        expires = get_dht_time() + lifetime
        return await self._dht.store(
            signed_key(prefix),
            subkey=SUBKEY_PREFIX + self._dht.peer_id.to_base58(),
            value=SignedRecord.sign(record, prefix, expires, self._node.identity, self._token),
            expiration_time=expires,
        )

    async def _list(self, prefix: str, record: ServerRecord, lifetime: float) -> bool:
        assert record.start is not None
        assert record.end is not None
        blocks = range(record.start, record.end)
        stored = await self._dht.store_many(
            keys=[block_uid(prefix, block) for block in blocks],
            subkeys=[self._dht.peer_id.to_base58()] * len(blocks),
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
        """For each block, the records of the peers that hold it; malformed records are left out.

        What stands under a block's key may be anybody's words: it counts only for peers without a signed record, and as
        what Petals' servers say.
        """
        # Two calls: strangers who fill a block's key must not keep the answer about signed records from coming.
        found, table = await asyncio.gather(self.signed_servers(prefix), self._listed(prefix, num_blocks))
        signed = found[prefix]
        for block, records in enumerate(table):
            for peer in records.keys() & signed.keys():
                del records[peer]
            for peer, record in signed.items():
                if record.start is not None and record.end is not None and record.start <= block < record.end:
                    records[peer] = record
        return table

    async def signed_servers(self, *prefixes: str) -> dict[str, dict[str, ServerRecord]]:
        """What our servers say of themselves, for each of these models."""
        keys = {signed_key(prefix): prefix for prefix in prefixes}
        found = await self._dht.get_many(list(keys), sufficient_expiration_time=math.inf)
        table: dict[str, dict[str, ServerRecord]] = {}
        for key, prefix in keys.items():
            records = table[prefix] = {}
            for subkey, item in _entries(found[key]):
                peer = str(subkey).removeprefix(SUBKEY_PREFIX)
                try:
                    signed = SignedRecord.open(item.value, peer)
                except ProtocolError as e:
                    logger.debug("skipping a record of %s: %s", key, e)
                    continue
                if signed.dht_prefix != prefix or signed.expires < get_dht_time():
                    continue
                if self._token is None or signed.is_of_swarm(self._token, peer):
                    records[peer] = signed.record
        return table

    async def _listed(self, prefix: str, num_blocks: int) -> list[dict[str, ServerRecord]]:
        """What stands under the blocks' keys."""
        uids = [block_uid(prefix, block) for block in range(num_blocks)]
        found = await self._dht.get_many(uids, sufficient_expiration_time=math.inf)
        table: list[dict[str, ServerRecord]] = []
        for uid in uids:
            records = {}
            for peer, item in _entries(found[uid]):
                try:
                    PeerID.from_base58(peer)
                    records[peer] = ServerRecord.from_value(item.value).without_claims()
                except (ProtocolError, AttributeError, TypeError, ValueError) as e:
                    logger.debug("skipping a record of %s: %s", uid, e)
            table.append(records)
        return table

    async def models(self) -> list[ModelEntry]:
        """The models that servers list publicly, with names that are safe to show; malformed entries are left out."""
        found = (await self._dht.get_many([MODELS_KEY], sufficient_expiration_time=math.inf))[MODELS_KEY]
        entries = []
        for prefix, item in _entries(found):
            value = item.value
            if not isinstance(value, dict) or printable(str(prefix), MAX_NAME_LENGTH) != prefix:
                continue
            count, repository = value.get("num_blocks"), value.get("repository")
            if type(count) is int and 0 < count <= MAX_BLOCKS:
                shown = printable(repository, MAX_NAME_LENGTH) if isinstance(repository, str) else None
                entries.append(ModelEntry(prefix, count, shown))
        return sorted(entries, key=lambda entry: entry.dht_prefix)


def _entries(found: Any) -> list[tuple[Any, Any]]:
    """The records under a key, by subkey; none where somebody has stored something else (anybody may)."""
    if found is None or not isinstance(found.value, dict):
        return []
    return [(subkey, item) for subkey, item in found.value.items() if hasattr(item, "value")]
