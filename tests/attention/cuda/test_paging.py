import pytest
from flume_attention.cuda.paging import Segment, cut, segments, slots
from flume_attention.ranges import Run
from hypothesis import given
from hypothesis import strategies as st

BLOCK = 4


def test_runs_that_fill_their_blocks_make_one_table():
    assert segments([Run(8, 8), Run(20, 4), Run(0, 3)], BLOCK) == [Segment([2, 3, 5, 0], 15)]


def test_a_run_that_ends_within_a_block_ends_its_segment():
    assert segments([Run(8, 6), Run(20, 4), Run(0, 3)], BLOCK) == [Segment([2, 3], 6), Segment([5, 0], 7)]


def test_no_runs_are_no_segments():
    assert segments([], BLOCK) == []


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 13)), max_size=8))
def test_segments_name_the_tokens_of_the_runs_in_order(runs):
    runs = [Run(block * BLOCK, tokens) for block, tokens in runs]
    found = [
        segment.blocks[at // BLOCK] * BLOCK + at % BLOCK
        for segment in segments(runs, BLOCK)
        for at in range(segment.tokens)
    ]
    assert found == slots(runs)


@pytest.mark.parametrize(
    "segment, pieces",
    [
        (Segment([7], 3), [Segment([7], 3)]),
        (Segment([7, 8], 8), [Segment([7, 8], 8)]),
        (Segment([7, 8, 2], 9), [Segment([7, 8], 8), Segment([2], 1)]),
        (Segment([7, 8, 2, 5], 16), [Segment([7, 8], 8), Segment([2, 5], 8)]),
        (Segment([], 0), []),
    ],
)
def test_a_segment_is_cut_at_blocks(segment, pieces):
    assert cut(segment, 2, 4) == pieces
