"""The checker finds what it is for: each of these histories has one thing wrong with it."""

import sys
from dataclasses import replace as entry_with
from pathlib import Path

import msgspec
import pytest
from flume_controller.spec import (
    Actor,
    AttentionSpec,
    AttentionStatus,
    Autoscale,
    Condition,
    ConditionStatus,
)

sys.path.insert(0, str(Path(__file__).parent))
from history import Entry, violations


def condition(kind, status=ConditionStatus.TRUE, at_s=1.0):
    return Condition(type=kind, status=status, reason="R", message="", last_transition_time_s=at_s)


SPEC = AttentionSpec(desired=1, generation=1)
STATUS = AttentionStatus(
    observed_generation=1, desired=1, ready=1, preparing=0, draining=0, leader="a", epoch=5,
    conditions=tuple(condition(kind) for kind in ("Available", "Progressing", "Degraded")),
)  # fmt: skip
LAWFUL = [
    Entry("spec", SPEC, 10),
    Entry("status", STATUS, 11),
    Entry("spec", msgspec.structs.replace(SPEC, desired=3, generation=2, set_by=Actor.USER), 12),
    Entry("status", msgspec.structs.replace(STATUS, observed_generation=2, leader="b", epoch=9), 13),
]


def test_a_lawful_history_is_left_alone():
    assert violations(LAWFUL) == []


def altered(index, **fields):
    entry = LAWFUL[index]
    changed = entry_with(entry, value=msgspec.structs.replace(entry.value, **fields))
    return [*LAWFUL[:index], changed, *LAWFUL[index + 1 :]]


@pytest.mark.parametrize(
    "history, complaint",
    [
        (altered(2, generation=1), "generation 1 follows 1"),
        (altered(2, generation=3), "generation 3 follows 1"),
        (altered(2, set_by=Actor.CONTROLLER), "a return from 1 up to 3"),
        (altered(2, set_by=Actor.AUTOSCALER), "the autoscaler acted while it was off"),
        (altered(2, autoscale=Autoscale(enabled=True)), "did not pause the autoscaler"),
        (altered(3, epoch=4), "epoch 4 of b writes after 5 of a"),
        (altered(3, epoch=5), "epoch 5 is of a and of b"),
        (altered(3, observed_generation=0), "observed generation 0 follows 1"),
        (altered(3, observed_generation=3), "claims generation 3 of 2"),
        (altered(3, conditions=(condition("Available"),)), "conditions are"),
        (
            altered(3, conditions=(condition("Available", at_s=2.0), *STATUS.conditions[1:])),
            "stayed True and has a new transition time",
        ),
        ([LAWFUL[1], LAWFUL[0]], "revision 10 was recorded after 11"),
    ],
)
def test_what_is_not_lawful_is_named(history, complaint):
    assert any(complaint in wrong for wrong in violations(history)), violations(history)
