"""Is a recorded history of the spec and the status one that could lawfully come about? Pure.

Record every revision of both keys with a watcher of its own, and ask `violations`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from flume_controller.spec import Actor, AttentionSpec, AttentionStatus


@dataclass(frozen=True, slots=True)
class Entry:
    """One revision of one of the keys."""

    kind: Literal["spec", "status"]
    value: AttentionSpec | AttentionStatus
    revision: int


def violations(history: Sequence[Entry]) -> list[str]:
    """What is wrong with it, in words; empty for a lawful one."""
    return list(_violations(history))


def _violations(history: Sequence[Entry]) -> Iterator[str]:
    for before, after in itertools.pairwise(history):
        if after.revision < before.revision:
            yield f"revision {after.revision} was recorded after {before.revision}"
    for kind, check in (("spec", _spec), ("status", _status)):
        entries = [entry for entry in history if entry.kind == kind]
        for before, after in itertools.pairwise(entries):
            yield from (f"{kind}@{after.revision}: {wrong}" for wrong in check(before.value, after.value))
    yield from _claims(history)


def _spec(before: AttentionSpec, after: AttentionSpec) -> Iterator[str]:
    if after.generation != before.generation + 1:
        yield f"generation {after.generation} follows {before.generation}"
    if not after.min <= after.desired <= after.max:
        yield f"{after.desired} is outside of {after.min} to {after.max}"
    if after.desired == before.desired:
        return
    if after.set_by is Actor.CONTROLLER and after.desired > before.desired:
        yield f"a return from {before.desired} up to {after.desired}"
    if after.set_by is Actor.AUTOSCALER and not before.autoscale.active:
        yield "the autoscaler acted while it was off"
    if after.set_by not in (Actor.AUTOSCALER, Actor.CONTROLLER) and after.autoscale.active:
        yield "a count set by hand did not pause the autoscaler"


def _status(before: AttentionStatus, after: AttentionStatus) -> Iterator[str]:
    if after.epoch < before.epoch:
        yield f"epoch {after.epoch} of {after.leader} writes after {before.epoch} of {before.leader}"
    if after.epoch == before.epoch and after.leader != before.leader:
        yield f"epoch {after.epoch} is of {before.leader} and of {after.leader}"
    if after.observed_generation < before.observed_generation:
        yield f"observed generation {after.observed_generation} follows {before.observed_generation}"
    if [item.type for item in after.conditions] != ["Available", "Progressing", "Degraded"]:
        yield f"conditions are {[item.type for item in after.conditions]}"
    for old, new in zip(before.conditions, after.conditions, strict=False):
        moved = new.last_transition_time_s != old.last_transition_time_s
        if moved and new.status is old.status:
            yield f"{new.type} stayed {new.status} and has a new transition time"
        if new.last_transition_time_s < old.last_transition_time_s:
            yield f"the transition time of {new.type} went back"


def _claims(history: Sequence[Entry]) -> Iterator[str]:
    """A status never speaks of a generation that was not written before it."""
    newest = None
    for entry in history:
        if entry.kind == "spec":
            newest = entry.value.generation
        elif newest is not None and entry.value.observed_generation > newest:
            yield f"status@{entry.revision} claims generation {entry.value.observed_generation} of {newest}"
