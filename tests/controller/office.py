"""A term of office without an election: a key in etcd that stands for it, and a clock that never stops."""

from __future__ import annotations

from flume_common.election import Candidate, Fenced, Term
from flume_common.store import Put


class Renewed:
    """A lease that is always renewed, until it is not."""

    left_s = 1000.0


class Office:
    """`fenced` writes for as long as `key` is the one of the term."""

    def __init__(self, store, keys, epoch, renewal):
        self.store, self.keys, self.renewal = store, keys, renewal
        self.candidate = Candidate(store, keys.election, "controller-1")
        self.fenced = Fenced(store, self.candidate, Term(f"{keys.election}1", epoch, renewal))

    @classmethod
    async def take(cls, store, keys):
        """Whoever was in office before is not any more."""
        await store.delete(f"{keys.election}1")
        result = await store.txn([], [Put(f"{keys.election}1", b"{}")])
        return cls(store, keys, result.revision, Renewed())
