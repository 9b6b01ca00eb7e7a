"""What can go wrong in a weight node.

* WeightError
  + PeerLost        an attention node is gone or not answering: its sequences are recovered elsewhere
  + PeerSilent      one has left a step waiting: the step is abandoned, so that others can go on
  + StepRefused     an attention node refused a step: its lane is closed and set up again
  + RequestRefused  a request that cannot be served, with the gRPC status name a client should see
  + ConfigRefused   a flag or combination of flags that cannot work
"""

from __future__ import annotations

from flume_common.failures import Failure
from flume_common.wire import Refusal


class WeightError(Exception):
    """Base of every error a weight node raises on purpose."""


class PeerLost(WeightError):
    """A lane is down or its peer missed the step's deadline."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"attention node {node}: {reason}")
        self.node = node
        self.reason = reason

    def bare(self) -> PeerLost:
        """The same, without the frames that raised it, to be kept in a list.

        A list in one of those frames would hold itself, and the buffers of the lane with it (35 MiB), until
        the cyclic garbage collector comes by: it sees a few objects, and takes its time.
        """
        return PeerLost(self.node, self.reason)


class PeerSilent(WeightError):
    """A peer may be stopped or cut off, or just slow: nothing is lost yet."""

    def __init__(self, node: str, since_s: float) -> None:
        super().__init__(f"attention node {node} does not answer")
        self.node = node
        self.since_s = since_s  # monotonic


class StepRefused(PeerLost):
    """The two ends disagree about a slot: nothing that lane says can be relied on any more."""

    def __init__(self, node: str, refusal: Refusal) -> None:
        super().__init__(node, f"refused a step: {refusal.name}")
        self.refusal = refusal


class RequestRefused(WeightError):
    """`code` is the name of a gRPC status, for example INVALID_ARGUMENT; `failure` is told beside it."""

    def __init__(self, code: str, message: str, failure: Failure | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.failure = failure


class ConfigRefused(WeightError):
    """The message names the flag and the remedy."""
