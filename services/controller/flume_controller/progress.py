"""Whether a scale gets on, and what to return to when it does not. Pure.

As a Kubernetes Deployment's: the deadline counts from the last progress, which is a new generation of the
spec or one more ready node. Draining is no part of it: it lasts as long as the sequences it waits for,
or until the deadline that came with it (`leaving.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from flume_controller.spec import Actor, AttentionSpec, AttentionStatus, GaveUp


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the fleet is; goes into the status."""

    last_good: int | None
    at_s: float  # Unix time of the last progress
    gave_up: GaveUp | None
    overdue: bool = False


def progress(
    spec: AttentionSpec, ready: int, previous: AttentionStatus | None, now_s: float, deadline_s: float
) -> Progress:
    """Where the scale stands with `ready` nodes, given the last status."""
    complete = ready >= spec.desired
    last_good = spec.desired if complete else (previous.last_good if previous else None)
    news = previous is None or _is_news(spec, ready, previous)
    at_s = now_s if previous is None or news else previous.progressed_at_s
    overdue = not complete and now_s - at_s >= deadline_s
    return Progress(last_good, at_s, _still(spec, previous), overdue)


def _is_news(spec: AttentionSpec, ready: int, previous: AttentionStatus) -> bool:
    return (
        spec.generation != previous.observed_generation
        or ready > previous.ready
        # It was complete, and what is missing now has only just begun to be.
        or ready < spec.desired <= previous.ready
    )


def _still(spec: AttentionSpec, previous: AttentionStatus | None) -> GaveUp | None:
    """That we gave up is remembered until somebody else changes the wish."""
    return previous.gave_up if previous and spec.set_by is Actor.CONTROLLER else None


def returned(spec: AttentionSpec, state: Progress, now_s: float) -> tuple[AttentionSpec, GaveUp] | None:
    """The spec that returns to the last good count, where a scale-up is overdue; None where there is none."""
    if not state.overdue or state.last_good is None:
        return None
    target = max(state.last_good, spec.min)
    if target >= spec.desired:
        return None
    back = msgspec.structs.replace(
        spec,
        desired=target,
        scale_deadline=None,
        set_by=Actor.CONTROLLER,
        generation=spec.generation + 1,
        updated_at_s=now_s,
    )
    return back, GaveUp(generation=spec.generation, wanted=spec.desired, returned_to=target, at_s=now_s)
