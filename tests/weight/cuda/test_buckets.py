import pytest
from flume_weight.cuda.buckets import Buckets, StepSize
from flume_weight.cuda.errors import BatchTooLarge


def test_a_batch_runs_in_the_smallest_bucket_that_holds_it():
    buckets = Buckets((1, 4, 8))
    assert [buckets.of(rows) for rows in (1, 2, 4, 5, 8)] == [1, 4, 4, 8, 8]


def test_a_batch_beyond_the_largest_bucket_is_refused_with_the_numbers():
    with pytest.raises(BatchTooLarge, match="9 rows, the largest bucket has 8"):
        Buckets((1, 8)).of(9)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 7, 8, 9, 16, 61, 256])
def test_buckets_reach_exactly_the_largest_batch_and_pad_little(most):
    buckets = Buckets.up_to(most)
    assert buckets.rows[-1] == most
    for rows in range(1, most + 1):
        assert rows <= buckets.of(rows) < max(2 * rows, rows + 8)


@pytest.mark.parametrize("rows", [(), (0, 1), (2, 2), (4, 1)])
def test_buckets_that_do_not_rise_are_refused(rows):
    with pytest.raises(ValueError, match="must rise"):
        Buckets(rows)


def test_microbatches_share_the_rows_evenly():
    assert StepSize(8, 2).microbatch_rows == 4
    with pytest.raises(ValueError, match="8 rows in 3 microbatches"):
        StepSize(8, 3)
