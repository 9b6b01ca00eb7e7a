"""What goes into etcd and comes out of it, as values. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flume_protos.etcd import etcd_pb2 as pb

MAX_TXN_OPS = 128


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as etcd holds it."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int  # 1 at creation, +1 at each put
    lease: int = 0  # 0: none

    @classmethod
    def from_proto(cls, kv: pb.KeyValue) -> KeyValue:
        return cls(kv.key.decode(), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys under a prefix at one revision."""

    revision: int
    items: Mapping[str, KeyValue]


def prefix_end(prefix: str) -> bytes:
    """The first key after all that begin with `prefix`.

    Raises ValueError when the prefix does not end in `/` and so would match its neighbours.
    """
    if not prefix.endswith("/"):
        raise ValueError(f"prefix {prefix!r} must end in '/'")
    return prefix[:-1].encode() + b"0"  # '0' follows '/'


@dataclass(frozen=True, slots=True)
class Get:
    """Read one key: gives KeyValue or None."""

    key: str

    def to_proto(self) -> pb.RequestOp:
        return pb.RequestOp(request_range=pb.RangeRequest(key=self.key.encode()))


@dataclass(frozen=True, slots=True)
class GetPrefix:
    """Read all keys under a prefix: gives a tuple of KeyValue."""

    prefix: str

    def to_proto(self) -> pb.RequestOp:
        end = prefix_end(self.prefix)
        return pb.RequestOp(request_range=pb.RangeRequest(key=self.prefix.encode(), range_end=end))


@dataclass(frozen=True, slots=True)
class Put:
    """Write one key: gives None."""

    key: str
    value: bytes
    lease: int = 0

    def to_proto(self) -> pb.RequestOp:
        return pb.RequestOp(
            request_put=pb.PutRequest(key=self.key.encode(), value=self.value, lease=self.lease)
        )


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove one key: gives how many there were."""

    key: str

    def to_proto(self) -> pb.RequestOp:
        return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=self.key.encode()))


@dataclass(frozen=True, slots=True)
class DeletePrefix:
    """Remove all keys under a prefix: gives how many there were."""

    prefix: str

    def to_proto(self) -> pb.RequestOp:
        end = prefix_end(self.prefix)
        return pb.RequestOp(
            request_delete_range=pb.DeleteRangeRequest(key=self.prefix.encode(), range_end=end)
        )


Op = Get | GetPrefix | Put | Delete | DeletePrefix
Relation = Literal["==", "!=", "<", ">"]
_RESULT = {
    "==": pb.Compare.EQUAL,
    "!=": pb.Compare.NOT_EQUAL,
    "<": pb.Compare.LESS,
    ">": pb.Compare.GREATER,
}
_TARGET = {
    "create_revision": pb.Compare.CREATE,
    "mod_revision": pb.Compare.MOD,
    "version": pb.Compare.VERSION,
    "value": pb.Compare.VALUE,
    "lease": pb.Compare.LEASE,
}


@dataclass(frozen=True, slots=True)
class Compare:
    """One condition of a transaction. Make it with one of the functions below."""

    key: str
    target: Literal["create_revision", "mod_revision", "version", "value", "lease"]
    operand: int | bytes
    relation: Relation = "=="

    def to_proto(self) -> pb.Compare:
        message = pb.Compare(
            key=self.key.encode(),
            target=_TARGET[self.target],
            result=_RESULT[self.relation],
        )
        setattr(message, self.target, self.operand)
        return message


def create_revision(key: str, revision: int, relation: Relation = "==") -> Compare:
    """The key was created at `revision`: it is still the same one. 0: it does not exist."""
    return Compare(key, "create_revision", revision, relation)


def mod_revision(key: str, revision: int, relation: Relation = "==") -> Compare:
    """The key was last written at `revision`: nobody wrote since. 0: it does not exist."""
    return Compare(key, "mod_revision", revision, relation)


def version(key: str, number: int, relation: Relation = "==") -> Compare:
    """The key was written `number` times since its creation. 0: it does not exist."""
    return Compare(key, "version", number, relation)


def value(key: str, content: bytes, relation: Relation = "==") -> Compare:
    """The key holds `content`; never true of a key that does not exist."""
    return Compare(key, "value", content, relation)


def absent(key: str) -> Compare:
    """The key does not exist."""
    return create_revision(key, 0)


OpResult = KeyValue | tuple[KeyValue, ...] | int | None


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Whether the conditions held, and what each operation of the branch taken gave, in order."""

    succeeded: bool
    revision: int  # of the store after the transaction; the mod_revision of every key it put
    results: tuple[OpResult, ...]

    def kv(self, index: int) -> KeyValue | None:
        """The result of the Get at `index`. Raises TypeError when that was another operation."""
        found = self.results[index]
        if found is not None and not isinstance(found, KeyValue):
            raise TypeError(f"operation {index} gave {type(found).__name__}, not a key")
        return found


def result_of(op: Op, reply: pb.ResponseOp) -> OpResult:
    """Decode one operation's part of a transaction's reply."""
    match op:
        case Get():
            kvs = reply.response_range.kvs
            return KeyValue.from_proto(kvs[0]) if kvs else None
        case GetPrefix():
            return tuple(KeyValue.from_proto(kv) for kv in reply.response_range.kvs)
        case Put():
            return None
        case Delete() | DeletePrefix():
            return int(reply.response_delete_range.deleted)
