import torch
from flume_attention.cuda.captured_steps import StepTables
from flume_attention.cuda.paging import Segment
from simulated_device import SimulatedDevice


def test_rows_of_an_earlier_step_hold_nothing_in_a_shorter_one():
    """Their answers are nobody's, but reading their keys would cost a step of the largest batch."""
    tables = StepTables(SimulatedDevice(), rows=3, max_blocks=4)
    tables.fill([Segment([7, 1], 20), Segment([2], 3), Segment([5, 4, 3], 40)])
    tables.fill([Segment([6], 9)])
    tables.copy()
    assert tables.lengths.tolist() == [9, 0, 0]
    assert tables.tables[0, 0] == 6


def test_what_is_filled_reaches_the_device_when_it_is_copied():
    tables = StepTables(SimulatedDevice(), rows=2, max_blocks=3)
    tables.fill([Segment([2, 0, 1], 33), Segment([], 0)])
    assert not tables.lengths.any()
    tables.copy()
    assert tables.tables[0].tolist() == [2, 0, 1]
    assert tables.lengths.dtype is torch.int32
