"""How far one sequence has come over all its attempts: what the next weight node is to be told.

Values only; the time is given. An attempt that brings no token is fruitless: only so many follow each
other, lest a request that kills its weight node kill them all, and only for so long.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Literal

import msgspec
from flume_protos.v1 import weight_pb2 as pb

Reason = Literal["lost", "silent", "not_yet"]
_INT64_MAX = 2**63 - 1


class ResumeLimits(msgspec.Struct, frozen=True, kw_only=True):
    resume_s: float = 60.0
    """How long a sequence may go without a new token, and without a node that works on it, after its weight
    node failed."""

    unavailable_s: float = 5.0
    """How long a new sequence waits while no weight node can serve."""

    fruitless: int = 6
    """Weight nodes that may be lost one after the other without a new token."""

    engine_crashes: int = 2
    """After so many engines that ended, in a row, in a step of a sequence, it is taken to be the cause."""


class ResumeCounts(msgspec.Struct):
    """Since the router started."""

    resumed: int = 0
    """Attempts after the first that a weight node answered."""
    failed: int = 0
    """Sequences that nobody went on with."""
    retries: Counter[Reason] = msgspec.field(default_factory=Counter)
    """Attempts that failed and were followed by another, by what ended them."""


class Progress:
    def __init__(self, first: pb.GenerateRequest, limits: ResumeLimits) -> None:
        """`first` is the request of the first attempt."""
        self._first = first
        self._limits = limits
        self.token_ids: list[int] = []
        self.lost_node = ""
        self.lost_at_s: float | None = None
        self.lost_in_a_row = 0
        self.crashes_in_a_row = 0  # of these: engines that ended in a step of this sequence
        self.why = ""

    @property
    def is_new(self) -> bool:
        """No weight node has worked on it yet."""
        return self.lost_at_s is None and not self.token_ids

    def next_request(self) -> pb.GenerateRequest:
        """Under the same name, by which the KV of the earlier attempts is found."""
        request = pb.GenerateRequest()
        request.CopyFrom(self._first)
        request.output_token_ids.extend(self.token_ids)
        request.adopt_from = self.lost_node
        request.engine_crashes = self.crashes_in_a_row
        return request

    def took(self, reply: pb.GenerateReply) -> None:
        self.token_ids.extend(reply.token_ids)
        if reply.token_ids:
            self.lost_at_s = None
            self.lost_in_a_row = self.crashes_in_a_row = 0

    def lost(self, node: str, why: str, now_s: float, worked_s: float = 0.0) -> None:
        """The attempt at `node` ended early; `worked_s`: when it was last known to work on it.

        Time in which a node worked does not count against the sequence, though no token came of it.
        """
        self.lost_node = node
        self.lost_in_a_row += 1
        if self.lost_at_s is not None:
            self.lost_at_s = max(self.lost_at_s, worked_s)
        self.not_yet(why, now_s)

    def not_yet(self, why: str, now_s: float) -> None:
        self.why = why
        if self.lost_at_s is None:
            self.lost_at_s = now_s

    def crashed(self) -> bool:
        """Count an engine that ended in a step of the sequence. True when no other may be tried."""
        self.crashes_in_a_row += 1
        return self.crashes_in_a_row >= self._limits.engine_crashes

    def remaining_s(self, now_s: float) -> float:
        """How long another attempt may be waited for; at most 0: not at all."""
        if self.lost_in_a_row >= self._limits.fruitless:
            return 0.0
        since_s = now_s if self.lost_at_s is None else self.lost_at_s
        return since_s + self._limits.resume_s - now_s


def seeded(sampling: pb.Sampling) -> pb.Sampling:
    """With a seed where chance plays a part: whoever continues must draw as the first would have."""
    if sampling.HasField("seed") or sampling.temperature == 0:
        return sampling
    chosen = pb.Sampling()
    chosen.CopyFrom(sampling)
    chosen.seed = random.SystemRandom().randint(0, _INT64_MAX)
    return chosen
