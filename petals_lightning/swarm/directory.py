"""The swarm's directory in the DHT: which server holds which blocks, and which models are served."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import get_dht_time

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.checks import printable
from petals_lightning.protocol.records import MAX_BLOCKS, MAX_NAME_LENGTH, ServerRecord
from petals_lightning.protocol.signed_records import LISTED_KEY, SUBKEY_PREFIX, SignedRecord, signed_key
from petals_lightning.protocol.uids import MODELS_KEY, block_uid
from petals_lightning.swarm.node import SwarmNode
from petals_lightning.swarm.record_keeping import MAX_LIFETIME

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class ModelEntry:
    """A model that is served.

    Attributes:
        dht_prefix: its name in the DHT.
        num_blocks: of the model.
        repository: on the hub; None for a private model.
        is_signed: a server has signed the entry. Any peer can write one that is not signed.
    """

    dht_prefix: str
    num_blocks: int
    repository: str | None
    is_signed: bool = False


def is_private(dht_prefix: str) -> bool:
    """Whether lists leave a model out: its prefix begins with `_`."""
    return dht_prefix.startswith("_")


class SwarmDirectory:
    """Reads and writes records. All methods are coroutines of the node's loop.

    Args:
        node: this process's peer, started.
        token: the swarm's secret. Records are made with it. Signed ones that were not count only if none was.
    """

    def __init__(self, node: SwarmNode, token: str | None = None):
        self._node, self._dht, self._token = node, node.dht, token

    async def announce(self, prefix: str, record: ServerRecord, lifetime: float) -> bool:
        """Stores this peer's record for `lifetime` seconds: under each block for Petals' clients, and signed for ours.

        Returns:
            Whether clients can find this server.
        """
        is_listed = await self._store_listed(prefix, record, lifetime)
        if not is_listed:  # another peer has stored a record under this peer's id that expires later
            is_listed = await self._store_listed(prefix, record, MAX_LIFETIME)
        if record.stream_version is None:  # Petals' servers store no signed record
            return is_listed
        keys = [signed_key(prefix)] if is_private(prefix) else [signed_key(prefix), LISTED_KEY]
        expires = get_dht_time() + lifetime
        stored = await self._dht.store_many(
            keys=keys,
            subkeys=[SUBKEY_PREFIX + self._dht.peer_id.to_base58()] * len(keys),
            values=[SignedRecord.sign(record, prefix, expires, self._node.identity, self._token)] * len(keys),
            expiration_time=expires,
        )
        return all(stored.values())

    async def _store_listed(self, prefix: str, record: ServerRecord, lifetime: float) -> bool:
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
        """Adds a model to the public list, which any peer can write."""
        if is_private(entry.dht_prefix):
            return True
        return await self._dht.store(
            MODELS_KEY,
            subkey=entry.dht_prefix,
            value={"num_blocks": entry.num_blocks, "repository": entry.repository},
            expiration_time=get_dht_time() + lifetime,
        )

    async def servers(self, prefix: str, num_blocks: int) -> list[dict[str, ServerRecord]]:
        """For each block, the records of the peers that hold it. Leaves out malformed records.

        Any peer can write under a block's key. Such a record counts only for peers without a signed one, and only as a
        Petals server's.
        """
        # Two calls: strangers who fill a block's key must not block the answer about signed records.
        signed, table = await _both(self.signed_servers(prefix), self._listed(prefix, num_blocks))
        for block, records in enumerate(table):
            for peer in records.keys() & signed.keys():
                del records[peer]
            for peer, record in signed.items():
                if record.start is not None and record.end is not None and record.start <= block < record.end:
                    records[peer] = record
        return table

    async def signed_servers(self, prefix: str) -> dict[str, ServerRecord]:
        """The signed records of a model's servers, by peer id."""
        return {
            peer: signed.record
            for peer, signed in await self._signed(signed_key(prefix))
            if signed.dht_prefix == prefix
        }

    async def _signed(self, key: str) -> list[tuple[str, SignedRecord]]:
        """The peers and their signed records under a key."""
        found = (await self._dht.get_many([key], sufficient_expiration_time=math.inf))[key]
        records = []
        for subkey, item in _entries(found):
            peer = str(subkey).removeprefix(SUBKEY_PREFIX)
            try:
                signed = SignedRecord.open(item.value, peer)
            except ProtocolError as e:
                logger.debug("skipping a record of %s: %s", key, e)
                continue
            if signed.expires >= get_dht_time():
                records.append((peer, signed))
        if self._token is None:
            return records
        # If no record has the token, keep all: the servers, when asked, explain what is wrong.
        return [(peer, signed) for peer, signed in records if signed.is_of_swarm(self._token, peer)] or records

    async def _listed(self, prefix: str, num_blocks: int) -> list[dict[str, ServerRecord]]:
        """For each block, the records under its key, without what only a signed record can say."""
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
        """The listed models, with names that are safe to show. Leaves out malformed entries.

        Models with signed records come first, each as most of its servers describe it. Any peer can write the others.
        """
        records, entries = await _both(self._signed(LISTED_KEY), self._named())
        signed_models: dict[str, Counter[ModelEntry]] = {}
        for _, signed in records:
            prefix, count = signed.dht_prefix, signed.record.num_blocks
            if printable(prefix, MAX_NAME_LENGTH) == prefix and count is not None:
                signed_models.setdefault(prefix, Counter())[
                    ModelEntry(prefix, count, signed.record.repository, True)
                ] += 1
        described = [counts.most_common(1)[0][0] for _, counts in sorted(signed_models.items())]
        return described + [entry for entry in entries if entry.dht_prefix not in signed_models]

    async def _named(self) -> list[ModelEntry]:
        """The entries of the public list, which any peer can write."""
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


async def _both(one: Coroutine[Any, Any, T], other: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """The results of two coroutines that run at once. If one fails, cancels the other and raises its error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = group.create_task(one), group.create_task(other)
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from None
    return tasks[0].result(), tasks[1].result()


def _entries(found: Any) -> list[tuple[Any, Any]]:
    """The records under a key, by subkey; none if a peer has stored something else there."""
    if found is None or not isinstance(found.value, dict):
        return []
    return [(subkey, item) for subkey, item in found.value.items() if hasattr(item, "value")]
