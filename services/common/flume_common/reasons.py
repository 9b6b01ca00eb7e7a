"""Why a member is not READY: one word for programs, and a sentence for people. Pure."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """The value of `Member.reason`."""

    LOADING = "Loading"
    NO_LANE = "NoLane"
    ONLY_DRAINING = "OnlyDraining"
    NO_ANSWER = "NoAnswer"


_TEXT = {
    Reason.LOADING: "is loading its model",
    Reason.NO_LANE: "has no lane to an attention node",
    Reason.ONLY_DRAINING: "has lanes only to attention nodes that are draining",
    Reason.NO_ANSWER: "does not answer",
}


def text_of(reason: str) -> str:
    """What is said of a node for this reason; a word that is not known here is quoted."""
    try:
        return _TEXT[Reason(reason)]
    except ValueError:
        return f"is not ready ({reason})" if reason else "is not ready"


def sentence(node: str, reason: str) -> str:
    """`weight-1 has no lane to an attention node`."""
    return f"{node} {text_of(reason)}"
