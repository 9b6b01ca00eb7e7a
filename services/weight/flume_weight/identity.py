"""What this weight node says of itself in messages that carry an epoch, and proves by its secret."""

from __future__ import annotations

from dataclasses import dataclass

from flume_common.epochs import epoch_of
from flume_common.membership import Life
from flume_protos.v1 import common_pb2


@dataclass(frozen=True, slots=True)
class Identity:
    """One process in one of its registrations. Another one of this process has the same secret."""

    node: str
    life: Life
    secret: bytes = b""
    registered: bool = True  # in etcd, as far as we know

    @property
    def epoch(self) -> int:
        """The revision of etcd, as messages to others name it; it counts within `life.incarnation`."""
        return self.life.epoch

    @property
    def lane_epoch(self) -> int:
        """For messages on lanes: it never goes down while this process lives."""
        return epoch_of(self.life.ordinal, self.life.epoch)

    def credentials(self) -> common_pb2.Credentials:
        return common_pb2.Credentials(incarnation=self.life.incarnation, secret=self.secret)
