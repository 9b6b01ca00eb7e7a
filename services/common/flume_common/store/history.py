"""What one process has seen of etcd's history, and whether what it sees now can follow from that.

An etcd whose data was lost, restored from an older snapshot or replaced by another cluster's looks the same
to a client: `cluster_id`, `member_id` and `raft_term` are often equal, as they derive from the command line.
But a linearizable answer is never older than one that was received before its question was sent. No I/O.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from flume_protos.etcd import etcd_pb2 as pb


@dataclass(frozen=True, slots=True)
class Mark:
    """How far history had come when a question was sent."""

    revision: int
    life: int


@dataclass(slots=True)
class History:
    """The highest revision of linearizable answers, and every contradiction to it."""

    cluster_id: int = 0  # of the etcd that answered last; 0: unknown
    revision: int = 0
    life: int = 0  # counts how often it began anew; what was known in another life proves nothing in this one
    contradictions: Counter[str] = field(default_factory=Counter)  # by kind
    _contradicted: asyncio.Event = field(default_factory=asyncio.Event)

    def mark(self) -> Mark:
        """Take it before a question is sent, for `note`."""
        return Mark(self.revision, self.life)

    def note(self, header: pb.ResponseHeader, mark: Mark) -> None:
        """Take in the header of a linearizable answer to a question that was sent at `mark`."""
        if mark.life != self.life:
            return  # the answer may be of the history that is over
        if self.cluster_id and header.cluster_id and header.cluster_id != self.cluster_id:
            self.contradict("cluster_changed", mark.life, header.revision)
        elif 0 < header.revision < mark.revision:
            self.contradict("revision_went_back", mark.life, header.revision)
        self.revision = max(self.revision, header.revision)
        self.cluster_id = header.cluster_id or self.cluster_id

    def contradict(self, kind: str, life: int, revision: int) -> None:
        """Note that etcd's history is not the one known in that life; it begins anew, at `revision`."""
        if life == self.life:
            self.contradictions[kind] += 1
            self.begin_anew(revision)
            self._contradicted.set()

    def begin_anew(self, revision: int = 0) -> None:
        """From now on nothing that was known counts."""
        self.life += 1
        self.revision = revision

    async def contradicted(self) -> None:
        """Wait until there is a contradiction that nobody has taken."""
        await self._contradicted.wait()

    @property
    def pending(self) -> bool:
        """Whether there is a contradiction that nobody has taken."""
        return self._contradicted.is_set()

    def take(self) -> bool:
        """Whether there is a contradiction that nobody has taken. Whoever takes it sees to it."""
        pending = self._contradicted.is_set()
        self._contradicted.clear()
        return pending

    def put_back(self) -> None:
        """What was taken could not be seen to."""
        self._contradicted.set()
