"""Why a sequence failed on a weight node, in words for programs; they travel beside the gRPC status."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

FAILURE = "flume-failure"
"""Key of trailing metadata. Absent: the status says all."""


class Failure(StrEnum):
    """What made a sequence end; the words are also the codes of HTTP errors and labels of metrics."""

    MODEL_OUTPUT_INVALID = "model_output_invalid"  # NaN or infinite logits, or nothing to choose from
    SEQUENCE_FAILED = "sequence_failed"  # an exception in what is computed for this sequence alone
    ENGINE_CRASHED = "engine_crashed"
    """The engine ended in a step of this sequence. With INTERNAL it is known to be the cause: to run it again
    would end another engine. With UNAVAILABLE it may be."""
    NO_LANE = "no_lane"
    """The weight node has no lane to an attention node that takes new tokens. With UNAVAILABLE."""


def failure_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> Failure | None:
    """Find it in the metadata of a failed call; None where there is none, or one that is not known here."""
    for key, value in metadata or ():
        if key == FAILURE and value in set(Failure):
            return Failure(value)
    return None
