from __future__ import annotations

from flume_common.direct_region import DirectRegion, RegionHandle, mark
from flume_common.layout import KvLayout
from hypothesis import given
from hypothesis import strategies as st

LAYOUT = KvLayout(num_layers=32, num_query_heads=9, num_kv_heads=3, head_dim=64, dtype="bfloat16")
STEPS, LAYERS = st.integers(1, 1 << 48), st.integers(0, 4094)


@given(STEPS, LAYERS, STEPS, LAYERS)
def test_marks_rise_with_the_step_and_within_it_with_the_layer(step, layer, other, other_layer):
    assert (mark(step, layer) < mark(other, other_layer)) == ((step, layer) < (other, other_layer))


def test_a_region_that_nobody_has_used_shows_less_than_the_first_mark():
    assert mark(1, 0) > 0
    assert mark(0, 0) > 0, "whatever the first step's number"


@given(st.integers(1, 300))
def test_parts_of_a_region_do_not_overlap_and_start_aligned(rows):
    region = DirectRegion(LAYOUT, rows)
    ends = [4096, region.queries_at + rows * 9 * 64 * 2, region.o_at + rows * 9 * 64 * 2]
    starts = [region.queries_at, region.o_at, region.lse_at]
    assert all(start >= end and start % 256 == 0 for start, end in zip(starts, ends, strict=True))
    assert region.size_bytes >= region.lse_at + rows * 9 * 4


def test_a_handle_comes_back_as_it_was():
    handle = RegionHandle("boot", "GPU-1", 64, b"\x00\x01")
    assert RegionHandle.decode(handle.encode()) == handle
