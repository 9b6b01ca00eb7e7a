"""How a sequence ends that cannot go on: the message for its client, and the word for programs. Pure."""

from __future__ import annotations

from flume_common.failures import Failure

from flume_weight import messages as m
from flume_weight.errors import PeerLost
from flume_weight.sampling import InvalidLogits
from flume_weight.sequence import Sequence


def no_token(sequence: Sequence, error: Exception) -> m.Failed:
    """No token could be chosen for the sequence."""
    where = f"token {sequence.completion_tokens + 1} of the answer (position {len(sequence.tokens)})"
    if isinstance(error, InvalidLogits):
        message = f"the model produced {error.found} at {where}"
        return m.Failed(sequence.name, "INTERNAL", message, Failure.MODEL_OUTPUT_INVALID)
    message = f"choosing {where} failed: {described(error)}"
    return m.Failed(sequence.name, "INTERNAL", message, Failure.SEQUENCE_FAILED)


def step_failed(sequence: Sequence, error: Exception) -> m.Failed:
    """A step of this sequence alone raised an exception."""
    message = f"computing position {sequence.position} of {len(sequence.tokens)} failed: {described(error)}"
    return m.Failed(sequence.name, "INTERNAL", message, Failure.SEQUENCE_FAILED)


def no_lane(sequence: Sequence, num_lanes: int) -> m.Failed:
    """It waited for a lane to an attention node that takes its tokens. `num_lanes`: to others."""
    message = "no lane to an attention node"
    if num_lanes:
        message = f"{num_lanes} lanes lead only to attention nodes that are draining"
    return m.Failed(sequence.name, "UNAVAILABLE", message, Failure.NO_LANE)


def canary_has_no_room(sequence: Sequence) -> m.Failed:
    """It would have had to wait for memory."""
    return m.Failed(sequence.name, "RESOURCE_EXHAUSTED", "other sequences have, or wait for, the KV memory")


def nodes_lost(sequence: Sequence, error: PeerLost) -> m.Failed:
    """One attention node after another was lost in a step of this sequence, at last of it alone."""
    message = (
        f"{sequence.nodes_lost} attention nodes in a row were lost in a step of this request; it is not tried"
        f" again ({error})"
    )
    return m.Failed(sequence.name, "INTERNAL", message, Failure.ENGINE_CRASHED)


def message_failed(name: str, what: str, error: Exception) -> m.Failed:
    """An exception while the engine took in what it was told of this sequence."""
    return m.Failed(name, "INTERNAL", f"{what} failed: {described(error)}", Failure.SEQUENCE_FAILED)


def described(error: BaseException) -> str:
    """Describe an exception in one line that is not too long for a status."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:300]}" if text else name
