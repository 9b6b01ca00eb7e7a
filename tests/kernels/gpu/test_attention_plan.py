"""The split of a step: whatever the lengths, every key of every query tile belongs to exactly one item."""

from itertools import pairwise

import pytest
import torch
from flume_kernels.gpu.attention_plan import AttentionPlan, PlanShape

LENGTHS = {
    "one short": [5],
    "empty rows": [0, 0, 0],
    "uniform": [512] * 8,
    "one long among short": [8192, 40, 40, 0, 33, 17, 40],
    "rising": [16 * i for i in range(20)],
    "a tile and a key": [17, 16, 15, 1],
}


def make_plan(lengths, device, queries=None, slots=24, kv_heads=2, group=4, tile_keys=16):
    tokens = sum(queries) if queries else len(lengths)
    shape = PlanShape(
        len(lengths), tokens, max(*lengths, 1), kv_heads * group, kv_heads, 16, tile_keys, slots
    )
    plan = AttentionPlan.allocate(shape, 64, device)
    plan.items.fill_(-1)
    starts = None
    if queries:
        starts = torch.tensor(
            [0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32, device=device
        )
    plan.update(torch.tensor(lengths, dtype=torch.int32, device=device), starts)
    return plan


def items_of(plan):
    """(row, first query row of the tile) -> [(first key, end key, splits)], in the order of the items."""
    count = int(plan.counts[0])
    found = {}
    for row, _, _, tile_at, begin, end, splits, _ in plan.items[:count].tolist():
        found.setdefault((row, tile_at), []).append((begin, end, splits))
    return found


def assert_covers(plan, lengths, queries):
    expected = {
        (row, tile * 16)
        for row, count in enumerate(queries)
        for tile in range(-(-count * plan.shape.group // 16))
    }
    items = items_of(plan)
    assert set(items) == expected
    for (row, _), runs in items.items():
        assert [splits for _, _, splits in runs] == [len(runs)] * len(runs)
        assert runs[0][0] == 0 and runs[-1][1] == lengths[row]
        assert all(left[1] == right[0] for left, right in pairwise(runs))
        assert len(runs) == 1 or all(begin < end for begin, end, _ in runs)


@pytest.mark.parametrize("slots", [1, 24, 264])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_items_cover_every_key_once(lengths, slots, device):
    plan = make_plan(lengths, device, slots=slots)
    assert_covers(plan, lengths, [1] * len(lengths))
    assert int(plan.counts[0]) <= plan.shape.max_items
    assert plan.items[int(plan.counts[0]) :].eq(-1).all()


def test_items_cover_every_query_tile_of_chunks(device):
    queries, lengths = [7, 0, 33, 1], [300, 64, 0, 17]
    assert_covers(make_plan(lengths, device, queries), lengths, queries)


def test_tiles_point_at_their_items(device):
    queries, lengths = [7, 0, 33, 1], [3000, 64, 0, 170]
    plan = make_plan(lengths, device, queries)
    items = plan.items.tolist()
    seen = []
    for first_item, splits, first_query, query_rows, tile_at, *_ in plan.tiles[
        : int(plan.counts[1])
    ].tolist():
        for item in items[first_item : first_item + splits]:
            assert item[1:4] == [first_query, query_rows, tile_at] and item[6] == splits
        seen += range(first_item, first_item + splits)
    assert seen == list(range(int(plan.counts[0])))


def test_a_batch_that_fills_the_chip_is_not_split(device):
    plan = make_plan([1024] * 12, device, slots=24)
    assert int(plan.counts[0]) == 12


def test_one_long_row_gives_every_slot_an_item(device):
    plan = make_plan([16 * 12 * 40], device, slots=24)
    assert int(plan.counts[0]) * plan.shape.num_kv_heads == 24


def test_a_long_row_among_short_ones_does_not_hold_up_the_step(device):
    lengths = [16 * 640] + [16] * 10
    plan = make_plan(lengths, device, slots=24)
    longest = max(end - begin for runs in items_of(plan).values() for begin, end, _ in runs)
    ideal = sum(lengths) * plan.shape.num_kv_heads / 24
    assert longest <= 1.25 * ideal


def test_short_rows_are_not_cut_to_crumbs(device):
    plan = make_plan([256], device, slots=264)
    assert int(plan.counts[0]) == 1


def test_sizes_that_cannot_be_are_refused_by_name():
    with pytest.raises(ValueError, match="tile_keys"):
        PlanShape(1, 1, 1, 8, 2, 16, 48)
    with pytest.raises(ValueError, match="query heads"):
        PlanShape(1, 1, 1, 7, 2)
    with pytest.raises(ValueError, match="slots"):
        PlanShape(1, 1, 1, 8, 2, slots=0)


def test_more_rows_than_planned_for_are_refused(device):
    plan = make_plan([5, 5], device)
    with pytest.raises(ValueError, match="lengths"):
        plan.update(torch.zeros(3, dtype=torch.int32, device=device))


def test_a_plan_uses_the_partials_of_another_of_its_stream_where_they_are_enough(device):
    def allocate(rows, lender=None, head_dim=64):
        return AttentionPlan.allocate(PlanShape(rows, rows, 64, 8, 2, 16, 16, 24), head_dim, device, lender)

    lender = allocate(8)
    small, large, other = allocate(3, lender), allocate(9, lender), allocate(3, lender, head_dim=128)
    for name in ("partial", "partial_lse"):
        ours, theirs = getattr(small, name), getattr(lender, name)
        assert ours.data_ptr() == theirs.data_ptr() and len(ours) == small.shape.max_items
        for own in (large, other):
            assert getattr(own, name).data_ptr() != theirs.data_ptr()
            assert len(getattr(own, name)) == own.shape.max_items
