"""Which weight node is next."""

import hypothesis.strategies as st
import pytest
from flume_router.pick import Candidate, pick
from hypothesis import given

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        node=st.uuids().map(str),
        outstanding=st.integers(0, 3),
        picked_at_s=st.sampled_from([0.0, 1.0, 2.0]),
        listed=st.booleans(),
        suspect=st.booleans(),
    ),
    max_size=5,
)


def test_nobody_is_nobody():
    assert pick([]) is None
    assert pick([Candidate("a", 0)], exclude=["a"]) is None


@pytest.mark.parametrize(
    "candidates, chosen",
    [
        ([Candidate("a", 2), Candidate("b", 1)], "b"),
        ([Candidate("a", 1, picked_at_s=5), Candidate("b", 1, picked_at_s=4)], "b"),
        ([Candidate("a", 9), Candidate("b", 0, suspect=True)], "a"),
        ([Candidate("a", 9), Candidate("b", 0, listed=False)], "a"),
        ([Candidate("a", 9, suspect=True), Candidate("b", 0, listed=False)], "a"),
        ([Candidate("a", 9, listed=False)], "a"),
    ],
)
def test_the_least_loaded_goes_first_and_the_doubtful_last(candidates, chosen):
    assert pick(candidates) == chosen
    assert pick(candidates[::-1]) == chosen


@given(candidates=CANDIDATES, data=st.data())
def test_somebody_is_found_unless_all_are_excluded(candidates, data):
    names = [candidate.node for candidate in candidates]
    exclude = data.draw(st.lists(st.sampled_from(names)) if names else st.just([]))
    chosen = pick(candidates, exclude)
    assert (chosen is None) == (set(names) <= set(exclude))
    assert chosen not in exclude


def test_equals_take_turns():
    last = {"a": 0.0, "b": 0.0, "c": 0.0}
    order = []
    for now in range(1, 7):
        chosen = pick([Candidate(node, 0, at) for node, at in last.items()])
        last[chosen] = float(now)
        order.append(chosen)
    assert order == ["a", "b", "c"] * 2
