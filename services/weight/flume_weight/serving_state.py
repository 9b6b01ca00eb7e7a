"""Decide whether a weight node can serve: it has an engine, and a lane to an attention node that takes tails.

No I/O; the caller brings the clock. A lane that is lost is mostly back within a moment, and a node that is
drained is mostly being replaced: neither turns the state at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from flume_common.membership import State
from flume_common.reasons import Reason

NO_LANE_GRACE_S = 1.0
"""How long a node that served stays READY without any lane: several attempts at another one."""
DRAINING_GRACE_S = 15.0
"""The same where all lanes lead to nodes that are draining: what starts in their place needs a while."""


class Serving(NamedTuple):
    """What the member record says; `reason` is empty while the node serves."""

    state: State
    reason: str = ""


@dataclass(slots=True)
class ServingState:
    """Remembers when the node last could serve."""

    served_at_s: float | None = None  # monotonic; None: not since the engine started

    def look(
        self,
        now_s: float,
        *,
        engine_ready: bool,
        lanes: Collection[str],
        draining: Collection[str],
        capacity_tokens: int,
    ) -> Serving:
        """`draining`: those of `lanes` that take no new tails; `capacity_tokens`: of all lanes together."""
        if not engine_ready:
            self.served_at_s = None
            return Serving(State.PREPARING, Reason.LOADING)
        has_lane = bool(lanes) and capacity_tokens > 0
        if has_lane and set(lanes) - set(draining):
            self.served_at_s = now_s
            return Serving(State.READY)
        grace_s = DRAINING_GRACE_S if has_lane else NO_LANE_GRACE_S
        if self.served_at_s is not None and now_s - self.served_at_s < grace_s:
            return Serving(State.READY)
        return Serving(State.PREPARING, Reason.ONLY_DRAINING if has_lane else Reason.NO_LANE)
