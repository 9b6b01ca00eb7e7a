"""Nodes that do not answer: who waits for them, and for how long. The engine's side, between two steps.

One that leaves a step waiting is set aside as soon as others could go on without it. One that has answered
neither a step nor a PLAN for the whole of the step timeout is lost, as if its lane had gone down.
"""

from __future__ import annotations

import math
import time

from flume_weight import messages as m
from flume_weight.errors import PeerLost, PeerSilent
from flume_weight.fleet import Fleet, needs
from flume_weight.range_attention import no_answer
from flume_weight.roster import Roster


class Silence:
    """Watches over a fleet."""

    def __init__(self, fleet: Fleet, roster: Roster) -> None:
        self._fleet = fleet
        self._roster = roster

    def may_leave(self, node: str) -> bool:
        """Whether somebody could go on if this node were not waited for."""
        silent = {node, *self._fleet.silent}
        return bool(self._roster.waiting) or not all(needs(item, silent) for item in self._roster.running)

    def set_aside(self, error: PeerSilent) -> m.NodeSilent:
        """Sequences that need this node wait for it; the abandoned step is made again without them."""
        self._fleet.peers[error.node].fall_silent(error.since_s)
        waiting = sum(needs(sequence, (error.node,)) for sequence in self._roster.running)
        return m.NodeSilent(error.node, waiting)

    def overdue(self, timeout_s: float) -> list[PeerLost]:
        """The nodes that have owed us an answer for so long."""
        until_s = time.monotonic() - timeout_s
        return [no_answer(node, timeout_s) for node, at_s in self._owing().items() if at_s <= until_s]

    def next_look_s(self, timeout_s: float) -> float:
        """How soon the first of them may be overdue."""
        return max(min(self._owing().values(), default=math.inf) + timeout_s - time.monotonic(), 0.0)

    def _owing(self) -> dict[str, float]:
        """Who owes us an answer, and since when (monotonic)."""
        since_s = {name: peer.owes_since_s for name, peer in self._fleet.peers.items()}
        return {name: at_s for name, at_s in since_s.items() if at_s is not None}
