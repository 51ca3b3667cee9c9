"""What this peer keeps of the DHT's records for others, and what it believes of those that others keep.

hivemind's `DHTProtocol` takes any record of anybody until its expiration, which anybody may set. The later expiration
wins, a value without a subkey takes the place of all that have one, and one record that a validator refuses makes the
answer of a peer worthless that holds a thousand others. Here the rules are narrower.
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

MAX_LIFETIME = 3600.0  # seconds that a record may have before it: servers announce themselves every minute
MAX_RECORD_BYTES = 16 << 10  # of one record; servers' have some hundred
MAX_KEY_BYTES = 1 << 19  # of the signed records under one key, and of the others; libp2p carries answers of 4 MiB
MAX_PEER_BYTES = 8 << 20  # of the records of one peer about itself, and of those that it has brought of others
MAX_BYTES = 64 << 20  # of the records of all peers about themselves, and of the others
_CHECKED_KEPT = 4096  # right signatures that need not be checked again


class RecordRules(RecordValidatorBase):
    """Which records are kept for others, and believed.

    None lasts for more than an hour, none is large, none is without a subkey (such a one hides all others of its key);
    one that says that it is signed must be. One that is no msgpack is read as None.
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
    except Exception:  # msgpack documents no common base for what malformed input can raise
        return None


def _is_signed(record: DHTRecord, peer: str) -> bool:
    try:
        signed = SignedRecord.open(_loads(record.value), peer)
    except ProtocolError:
        return False
    keys = [DHTID.generate(source=key).to_bytes() for key in (signed_key(signed.dht_prefix), LISTED_KEY)]
    return signed.expires == record.expiration_time and record.key in keys


class DHTProtocol(HivemindProtocol):
    """hivemind's, with bounded memory. Its methods' names on the wire begin with the class's name, so it keeps that."""

    storage: _Storage

    @classmethod
    async def create(cls, *args: Any, **kwargs: Any) -> DHTProtocol:
        self = await super().create(*args, **kwargs)
        self.storage, self.cache = _Storage(), _Storage(self.cache.maxsize)
        return self

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        # Nothing is awaited between here and the last record's place in the storage.
        self.storage.sender = self.cache.sender = context.remote_id.to_base58()
        try:
            return await super().rpc_store(request, context)
        finally:
            self.storage.sender = self.cache.sender = None

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Takes out the records that may not be kept, and takes the others."""
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
    """Who has stored records here; `is_own`: those about itself."""

    sender: str
    is_own: bool


class _Storage(DHTLocalStorage):
    """A storage that takes no new record beyond its budgets; one that is there can always be renewed.

    Attributes:
        sender: who stores now; None: this peer itself, which has no budget.
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
            # hivemind would forget the known one at the time of the other, and refuse one that has come before from
            # another peer: its sender, which hears the last answer only, would take that for a failure.
            return known == (value, expiration_time)
        if records is not None:
            _forget_ghosts(records)
        _forget_ghosts(self)
        if self.sender is None or known is not None:
            return super().store_subkey(key, subkey, value, expiration_time)
        size = _size(subkey, value)
        if records is not None and size + _bytes_like(subkey, records) > MAX_KEY_BYTES:
            return False
        # Peers bring each other what they keep. That must not use up what a peer may store about itself.
        account = _Account(self.sender, subkey in (self.sender, SUBKEY_PREFIX + self.sender))
        if not self._has_room(account, size) and not self._has_room(account, size, count=True):
            return False
        if not super().store_subkey(key, subkey, value, expiration_time):
            return False
        self._senders[key, subkey] = account
        self._bytes[account] += size
        return True

    def _has_room(self, account: _Account, size: int, *, count: bool = False) -> bool:
        """Whether this many bytes more are within the account's budget and that of all accounts of its kind.

        The sums only grow as records come; `count` makes them what is still there, once a second at most.
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


def _forget_ghosts(storage: TimedStorage[Any, Any]) -> None:
    """Each renewal leaves an entry in the heap until its time has come; one peer could leave millions."""
    if len(storage.expiration_heap) > 4 * len(storage.data) + 1024:
        storage.expiration_heap = sorted(storage.key_to_heap.values())  # a sorted list is a heap


def _claims_a_signature(subkey: Any) -> bool:
    return isinstance(subkey, str) and subkey.startswith(SUBKEY_PREFIX)


def _bytes_like(subkey: Any, records: DictionaryDHTValue) -> int:
    """Of the records that are signed, or of those that are not: the latter must not keep the former out."""
    is_signed = _claims_a_signature(subkey)
    return sum(len(item.value) for other, item in records.items() if _claims_a_signature(other) == is_signed)


def _size(subkey: Any, value: bytes) -> int:
    return len(value) + len(MSGPackSerializer.dumps(subkey)) + DHTID.HASH_NBYTES


def keep_records_carefully() -> None:
    """Makes every `DHTNode` of this process use these rules and budgets."""
    hivemind.dht.node.DHTProtocol = DHTProtocol  # type: ignore[misc]
