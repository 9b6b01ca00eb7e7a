import numpy as np
import pytest
from flume_common.layout import KvLayout
from flume_common.wire import (
    HEADER_WORDS,
    MAX_OPS,
    Credit,
    Header,
    Kind,
    LaneShape,
    Op,
    Plan,
    Refusal,
    sequence_key,
)
from hypothesis import given
from hypothesis import strategies as st

LAYOUT = KvLayout(num_layers=30, num_query_heads=9, num_kv_heads=3, head_dim=64, dtype="bfloat16")
SHAPE = LaneShape(LAYOUT, max_step_tokens=256, max_step_sequences=32, kv_frame_bytes=1 << 20)
WORD = st.integers(-(2**63), 2**63 - 1)
COUNT = st.integers(0, 2**62)
KEY_OF_CMPL_1 = -2121831279071930084


def words(rows: int, limit: int):
    return st.lists(st.lists(WORD, min_size=rows, max_size=rows), max_size=limit).map(
        lambda items: np.array(items, dtype=np.int64).reshape(-1, rows)
    )


@given(step=COUNT, epoch=COUNT, ops=words(4, 40), rows=words(5, 32), layers=st.integers(0, 30), credit=COUNT)
def test_a_plan_survives_its_frame(step, epoch, ops, rows, layers, credit):
    plan = Plan(
        step,
        epoch,
        ops,
        rows,
        layers,
        want_blocks=credit,
        returned_blocks=credit // 2,
        direct=credit % 2 == 1,
        second_rows=len(rows) // 3,
    )
    header, body = np.zeros(HEADER_WORDS, np.int64), np.full(2000, -1, np.int64)
    num_bytes = plan.encode(header, body)
    assert num_bytes == 8 * (8 + 4 * len(ops) + 5 * len(rows))
    got = Plan.decode(header, body[: num_bytes // 8])
    assert (got.step, got.epoch, got.layers_per_kv) == (step, epoch, layers)
    assert (got.want_blocks, got.returned_blocks, got.direct) == (credit, credit // 2, credit % 2 == 1)
    assert got.second_rows == len(rows) // 3
    np.testing.assert_array_equal(got.ops, ops)
    np.testing.assert_array_equal(got.rows, rows)


def test_a_decoded_plan_outlives_the_frame_it_came_in():
    plan = Plan(1, 2, np.array([[Op.OPEN, 0, 0, 9]]), np.array([[0, 1, 1, 5, 7]]), 4, 0, 0)
    header, body = np.zeros(HEADER_WORDS, np.int64), np.zeros(100, np.int64)
    plan.encode(header, body)
    got = Plan.decode(header, body)
    header[:] = body[:] = -7
    assert got.step == 1
    assert got.ops.tolist() == [[Op.OPEN, 0, 0, 9]]
    assert got.rows.tolist() == [[0, 1, 1, 5, 7]]


@given(st.builds(Credit, COUNT, COUNT, COUNT, st.booleans(), COUNT, COUNT, st.sampled_from(Refusal), COUNT))
def test_a_credit_survives_its_frame(credit):
    body = np.zeros(8, np.int64)
    assert credit.encode(body) == 64 == SHAPE.body_bytes(Kind.CREDIT)
    assert Credit.decode(body) == credit


def test_the_largest_message_of_each_kind_fits_its_frame():
    ops = np.zeros((MAX_OPS, 4), np.int64)
    rows = np.zeros((SHAPE.max_step_sequences, 5), np.int64)
    body = np.zeros(1 << 16, np.int64)
    largest = Plan(0, 0, ops, rows, 0, 0, 0).encode(np.zeros(HEADER_WORDS, np.int64), body)
    assert largest == SHAPE.body_bytes(Kind.PLAN)
    assert SHAPE.body_bytes(Kind.QUERY) == 256 * 9 * 64 * 2
    assert SHAPE.body_bytes(Kind.PARTIAL) == 256 * 9 * 64 * 2 + 256 * 9 * 4
    assert SHAPE.body_bytes(Kind.KV) == 1 << 20


@given(st.integers(0, 256))
def test_kv_messages_take_as_many_layers_as_fit_and_no_more(tokens):
    layers = SHAPE.layers_per_kv(tokens)
    layer_bytes = tokens * LAYOUT.layer_token_bytes
    assert 1 <= layers <= LAYOUT.num_layers
    assert layers * layer_bytes <= SHAPE.kv_frame_bytes
    assert layers == LAYOUT.num_layers or (layers + 1) * layer_bytes > SHAPE.kv_frame_bytes


def test_tokens_of_which_not_one_layer_fits_are_refused_with_the_numbers():
    small = LaneShape(LAYOUT, 256, 32, kv_frame_bytes=LAYOUT.layer_token_bytes * 10)
    assert small.layers_per_kv(10) == 1
    with pytest.raises(ValueError, match="11 tokens need 8448 bytes"):
        small.layers_per_kv(11)


def test_header_words_are_distinct_and_lie_in_the_header():
    assert len(set(Header)) == len(Header)
    assert max(Header) < HEADER_WORDS


def test_a_sequence_key_is_a_word_and_the_same_in_every_process():
    # The number is another process's: Python's own hash would differ from run to run.
    assert -(2**63) <= sequence_key("cmpl-1") < 2**63
    assert sequence_key("cmpl-1") == KEY_OF_CMPL_1
    assert sequence_key("cmpl-1") != sequence_key("cmpl-2")
