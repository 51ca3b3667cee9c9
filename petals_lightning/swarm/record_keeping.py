"""Rules for DHT records: which ones this peer stores for others, and which ones it accepts from others.

hivemind's `DHTProtocol` stores any peer's record until its expiration, which that peer may choose. The later expiration
wins, a value without a subkey replaces all that have one, and one record that a validator refuses invalidates a peer's
whole answer, even if it holds a thousand others. The rules here are stricter.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import hivemind.dht.node
from hivemind.dht.protocol import DHTProtocol as HivemindProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2PContext
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS, TimedStorage, get_dht_time

from petals_lightning.errors import ProtocolError
from petals_lightning.protocol.signed_records import LISTED_KEY, SUBKEY_PREFIX, SignedRecord, signed_key

MAX_LIFETIME = 3600.0  # seconds; servers announce themselves every minute
MAX_RECORD_BYTES = 16 << 10  # of one record; servers' records take a few hundred
# Of the signed records under one key, and the same for the others; libp2p carries answers of 4 MiB.
MAX_KEY_BYTES = 1 << 19
MAX_PEER_BYTES = 8 << 20  # of one peer's records about itself, and the same for its records of others
MAX_BYTES = 64 << 20  # of all peers' records about themselves, and the same for the others
_CHECKED_KEPT = 4096  # valid signatures that need not be checked again


class RecordRules(RecordValidatorBase):
    """Decides which records are stored for others, and accepted from others.

    A record lasts for at most an hour, is small, and has a subkey (without one it would hide all others of its key). If
    it claims to be signed, the signature must be valid. A record that is not msgpack is read as None.
    """

    def __init__(self) -> None:
        self._checked: OrderedDict[bytes, None] = OrderedDict()  # digests: records may be large

    def validate(self, record: DHTRecord) -> bool:
        if record.expiration_time > get_dht_time() + MAX_LIFETIME + MAX_DHT_TIME_DISCREPANCY_SECONDS:
            return False
        if record.subkey == HivemindProtocol.IS_REGULAR_VALUE or len(record.value) > MAX_RECORD_BYTES:
            return False
        subkey = _loads(record.subkey)
        if not _claims_a_signature(subkey):
            return True
        digest = hashlib.sha256(MSGPackSerializer.dumps(dataclasses.astuple(record))).digest()
        if digest in self._checked:
            return True
        if not _is_signed(record, subkey.removeprefix(SUBKEY_PREFIX)):
            return False
        self._checked[digest] = None
        if len(self._checked) > _CHECKED_KEPT:
            self._checked.popitem(last=False)
        return True

    def strip_value(self, record: DHTRecord) -> bytes:
        return record.value if _loads(record.value) is not None else MSGPackSerializer.dumps(None)


def _loads(data: bytes) -> Any:
    try:
        return MSGPackSerializer.loads(data)
    except Exception:  # msgpack documents no common base class for errors of malformed input
        return None


def _is_signed(record: DHTRecord, peer: str) -> bool:
    try:
        signed = SignedRecord.open(_loads(record.value), peer)
    except ProtocolError:
        return False
    keys = [DHTID.generate(source=key).to_bytes() for key in (signed_key(signed.dht_prefix), LISTED_KEY)]
    return signed.expires == record.expiration_time and record.key in keys


class DHTProtocol(HivemindProtocol):
    """hivemind's protocol with bounded memory. The class keeps its name, which is part of its methods' wire names."""

    storage: _Storage

    @classmethod
    async def create(cls, *args: Any, **kwargs: Any) -> DHTProtocol:
        self = await super().create(*args, **kwargs)
        self.storage, self.cache = _Storage(), _Storage(self.cache.maxsize)
        return self

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        # Nothing is awaited until the last record is stored, so `sender` is right for all of them.
        self.storage.sender = self.cache.sender = context.remote_id.to_base58()
        try:
            return await super().rpc_store(request, context)
        finally:
            self.storage.sender = self.cache.sender = None

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Removes the records that may not be stored, and accepts the others."""
        with dictionary.freeze():
            refused = [
                subkey
                for subkey, (value, expiration_time) in dictionary.items()
                if not self._validate_record(key_bytes, self.serializer.dumps(subkey), value, expiration_time)
            ]
            for subkey in refused:
                del dictionary[subkey]
        return True


class _Account(NamedTuple):
    """A peer that has stored records here; `is_own`: its records about itself."""

    sender: str
    is_own: bool


class _Storage(DHTLocalStorage):
    """A storage that takes no new record beyond its budgets. A stored record can always be renewed.

    Attributes:
        sender: the peer that is storing records now; None: this peer itself, which has no budget.
    """

    def __init__(self, maxsize: float | None = None):
        super().__init__(maxsize)
        self.sender: str | None = None
        self._senders: dict[tuple[DHTID, Any], _Account] = {}
        self._bytes: Counter[_Account] = Counter()
        self._counted_at = 0.0

    def store_subkey(self, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        held = self.get(key)
        records = held.value if held is not None and isinstance(held.value, DictionaryDHTValue) else None
        known = records.get(subkey) if records is not None else None
        if known is not None and known.expiration_time >= expiration_time:
            # hivemind would drop the known record when the new one expires. It would also refuse a record that another
            # peer has already brought: its sender, which gets only the last answer, would take that for a failure.
            return known == (value, expiration_time)
        if records is not None:
            _shrink_heap(records)
        _shrink_heap(self)
        if self.sender is None or known is not None:
            return super().store_subkey(key, subkey, value, expiration_time)
        size = _size(subkey, value)
        if records is not None and size + _bytes_like(subkey, records) > MAX_KEY_BYTES:
            return False
        # Peers copy records to each other. That must not use up the budget for a peer's records about itself.
        account = _Account(self.sender, subkey in (self.sender, SUBKEY_PREFIX + self.sender))
        if not self._has_room(account, size) and not self._has_room(account, size, count=True):
            return False
        if not super().store_subkey(key, subkey, value, expiration_time):
            return False
        self._senders[key, subkey] = account
        self._bytes[account] += size
        return True

    def _has_room(self, account: _Account, size: int, *, count: bool = False) -> bool:
        """Whether more bytes are within the account's budget and that of all accounts of its kind.

        The sums only grow as records come. `count` recounts what is still stored, at most once a second.
        """
        if count:
            if get_dht_time() < self._counted_at + 1:
                return False
            self._count()
        total = sum(held for other, held in self._bytes.items() if other.is_own == account.is_own)
        return self._bytes[account] + size <= MAX_PEER_BYTES and total + size <= MAX_BYTES

    def _count(self) -> None:
        senders, self._senders, self._bytes = self._senders, {}, Counter()
        for key, item in self.items():
            for subkey, (value, _) in item.value.items() if isinstance(item.value, DictionaryDHTValue) else ():
                if (account := senders.get((key, subkey))) is not None:
                    self._senders[key, subkey] = account
                    self._bytes[account] += _size(subkey, value)
        self._counted_at = get_dht_time()


def _shrink_heap(storage: TimedStorage[Any, Any]) -> None:
    """Removes expired heap entries: each renewal leaves one until it expires, so one peer could leave millions."""
    if len(storage.expiration_heap) > 4 * len(storage.data) + 1024:
        storage.expiration_heap = sorted(storage.key_to_heap.values())  # a sorted list is a heap


def _claims_a_signature(subkey: Any) -> bool:
    return isinstance(subkey, str) and subkey.startswith(SUBKEY_PREFIX)


def _bytes_like(subkey: Any, records: DictionaryDHTValue) -> int:
    """Bytes of the records that are signed like this one, or not: unsigned ones must not crowd out signed ones."""
    is_signed = _claims_a_signature(subkey)
    return sum(len(item.value) for other, item in records.items() if _claims_a_signature(other) == is_signed)


def _size(subkey: Any, value: bytes) -> int:
    return len(value) + len(MSGPackSerializer.dumps(subkey)) + DHTID.HASH_NBYTES


def use_record_rules() -> None:
    """Makes every `DHTNode` of this process use these rules and budgets."""
    hivemind.dht.node.DHTProtocol = DHTProtocol
