"""Whom an engine's death is blamed on, and which sequences then run alone."""

import pytest
from flume_common.engine_death import cause_of
from flume_common.failures import Failure
from flume_weight.isolation import Isolation
from flume_weight.last_step import EngineDeath
from flume_weight.scheduler import Candidate


def death(*in_step, by_exception):
    return EngineDeath("w", "killed by SIGSEGV", frozenset(in_step), by_exception)


@pytest.mark.parametrize(
    "ended, code, failure",
    [
        (death("s", by_exception=True), "INTERNAL", Failure.ENGINE_CRASHED),
        (death("s", "t", by_exception=True), "UNAVAILABLE", Failure.ENGINE_CRASHED),
        (death("s", by_exception=False), "UNAVAILABLE", Failure.ENGINE_CRASHED),
        (death("t", by_exception=True), "UNAVAILABLE", None),
        (death(by_exception=True), "UNAVAILABLE", None),
    ],
    ids=["its own step raised", "a step of two raised", "no words", "another's step", "between steps"],
)
def test_what_the_client_of_a_sequence_is_told(ended, code, failure):
    failed = ended.failed("s")
    assert (failed.sequence, failed.code, failed.failure) == ("s", code, failure)
    assert "the engine of weight node w ended (killed by SIGSEGV)" in failed.message


@pytest.mark.parametrize(
    "returncode, fields, cause",
    [
        (-11, {}, "killed by SIGSEGV"),
        (
            -9,
            {"silent": "made no progress for 15 s and was killed"},
            "made no progress for 15 s and was killed",
        ),
        (1, {"words": "RuntimeError: x"}, "RuntimeError: x"),
        (3, {}, "exit code 3"),
        (None, {}, "closed its link"),
        (-250, {}, "killed by signal 250"),
    ],
)
def test_why_an_engine_ended(returncode, fields, cause):
    assert cause_of(returncode, **fields) == cause


def candidates(*names):
    return [Candidate(name, "a", 1, 16) for name in names]


def names(groups):
    return [[each.sequence for each in group] for group in groups]


def test_suspects_run_alone_and_take_turns_with_the_others():
    isolation = Isolation()
    every = candidates("a", "b", "c", "d")
    assert names(isolation.groups(every, set())) == [["a", "b", "c", "d"]]
    assert names(isolation.groups(every, {"b", "d"})) == [["b"], ["d"], ["a", "c"]]
    assert names(isolation.groups(every, {"b", "d"})) == [["a", "c"], ["b"], ["d"]]
    assert names(isolation.groups(every, {"b", "d"})) == [["b"], ["d"], ["a", "c"]]
    assert names(isolation.groups(candidates("b"), {"b"})) == [["b"]]
