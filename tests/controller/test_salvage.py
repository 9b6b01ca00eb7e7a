"""A spec that was written badly by hand: what becomes of it."""

import msgspec
import pytest
from flume_controller.salvage import salvaged
from flume_controller.spec import MAX_ATTENTION_NODES, AttentionSpec, AttentionStatus, decode_spec, encode
from hypothesis import given
from hypothesis import strategies as st

STATUS = AttentionStatus(observed_generation=7, desired=3, ready=3, preparing=0, draining=0)
GOOD = msgspec.json.decode(encode(AttentionSpec(desired=3, generation=7, drained=("attention-9",))))


def made(**changes):
    return salvaged(msgspec.json.encode({**GOOD, **changes}), STATUS)


@pytest.mark.parametrize(
    "value",
    [b"", b"{", b"null", b"[]", b"1e999", b'"x"', b"\xff\xfe\x00", b"{}", b"[" * 5000, b"x" * 1_000_000],
)
def test_of_what_cannot_be_read_nothing_is_used(value):
    assert salvaged(value, STATUS) == AttentionSpec(desired=3, generation=7)
    assert salvaged(value, None, num_running=2) == AttentionSpec(desired=2, generation=1)


@pytest.mark.parametrize(
    "changes",
    [{"desired": -1}, {"desired": 2**70}, {"desired": 1.5}, {"desired": None}, {"desired": "x"}],
)
def test_the_count_is_the_one_that_was_last_acted_on(changes):
    spec = made(**changes)
    assert (spec.desired, spec.drained) == (3, ("attention-9",))


def test_bounds_that_cannot_be_are_dropped():
    spec = made(min=9, max=1)
    assert (spec.desired, spec.min, spec.max) == (3, 0, MAX_ATTENTION_NODES)
    assert made(min=1, max=8, desired=-1).max == 8


def test_fields_that_are_wrong_are_left_out_and_the_others_kept():
    spec = made(drained="x", autoscale=5, scale_deadline="soon", desired=-1)
    assert (spec.drained, spec.autoscale.enabled, spec.scale_deadline) == ((), False, None)


@pytest.mark.parametrize("written, expected", [(-5, 7), (2, 7), (12, 12), (2**70, 7)])
def test_generations_never_go_back(written, expected):
    assert made(desired=-1, generation=written).generation == expected


def test_a_count_of_more_nodes_than_may_be_is_no_reason_to_stop_all():
    status = msgspec.structs.replace(STATUS, desired=1000)
    assert salvaged(b"{", status).desired == MAX_ATTENTION_NODES


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), JSON), st.sampled_from([STATUS, None]))
def test_whatever_was_written_the_result_is_valid(changes, status):
    spec = salvaged(msgspec.json.encode({**GOOD, **changes}), status, num_running=1)
    assert decode_spec(encode(spec)) == spec
    assert spec.desired == (3 if status else 1)
