"""`merge_partials` and `merge_into` against their definition, with poison where nothing may be read."""

import pytest
import torch
from flume_kernels import reference
from flume_kernels.merge import merge_into, merge_partials
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def partials(num_parts, tokens, heads, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(num_parts, tokens, heads, dim, generator=generator).to(dtype)
    return o, torch.randn(num_parts, tokens, heads, generator=generator) * 20


def fold(o, lse):
    """All partials merged by `merge_into`, one after the other."""
    total, total_lse = o[0].float().clone(), lse[0].clone()
    for part in range(1, len(o)):
        merge_into(total, total_lse, o[part], lse[part])
    return total, total_lse


def assert_merged(got, want, tolerance=1e-5):
    torch.testing.assert_close(got[0].double(), want[0].double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1].double(), want[1].double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 64), (2, 1, 9, 64), (3, 5, 4, 80), (7, 3, 1, 128)],
    ids=["one part", "decode", "odd dim", "many parts"],
)
def test_merging_matches_the_definition(shape, dtype):
    o, lse = partials(*shape, dtype)
    want = reference.merge_partials(o, lse)
    got = merge_partials(o, lse)
    assert got[0].dtype is dtype
    assert_merged(got, want, TOLERANCE[dtype])
    assert_merged(fold(o, lse), want, TOLERANCE[dtype])


@pytest.mark.parametrize("merge", [merge_partials, fold])
@pytest.mark.parametrize("empty", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_partial_without_keys_weighs_nothing_even_when_it_holds_nan(merge, empty, tokens):
    o, lse = partials(3, tokens, 2, 64)
    full = [part for part in range(3) if part != empty]
    want = reference.merge_partials(o[full], lse[full])
    o[empty], lse[empty] = torch.nan, -torch.inf
    assert_merged(merge(o, lse), want)


@pytest.mark.parametrize("merge", [merge_partials, fold])
def test_one_query_without_keys_in_one_partial_leaves_the_others_alone(merge):
    o, lse = partials(2, 4, 3, 16)
    lse[1, 2, 1] = -torch.inf
    want = reference.merge_partials(o, lse)
    o[1, 2, 1] = torch.nan
    assert_merged(merge(o, lse), want)


@pytest.mark.parametrize("merge", [merge_partials, fold])
def test_no_keys_anywhere_gives_zero_and_minus_infinity(merge):
    o, lse = partials(2, 1, 1, 64)
    got, got_lse = merge(torch.full_like(o, torch.nan), torch.full_like(lse, -torch.inf))
    assert not got.any() and bool((got_lse == -torch.inf).all())


def spread(lse):
    """A partial per log-sum-exp, of one token and head, whose outputs are all different."""
    return torch.arange(len(lse) * 2.0).reshape(len(lse), 1, 1, 2), torch.tensor(lse).reshape(len(lse), 1, 1)


def log_sum_exps(largest):
    number = st.floats(-largest, largest, width=32) | st.just(-torch.inf)
    return st.lists(number, min_size=2, max_size=5)


@settings(deadline=None, max_examples=60)
@given(log_sum_exps(64.0))
def test_partials_of_any_weight_merge_in_any_order(lse):
    o, weights = spread(lse)
    want = reference.merge_partials(o, weights)
    for got in (merge_partials(o, weights), fold(o, weights), fold(o.flip(0), weights.flip(0))):
        assert_merged(got, want, 1e-4)


@settings(deadline=None, max_examples=60)
@given(log_sum_exps(2.0**60))
def test_log_sum_exps_of_any_size_give_weights_between_0_and_1(lse):
    o, weights = spread(lse)
    assert_merged(merge_partials(o, weights), reference.merge_partials(o, weights))
    merged = fold(o, weights)[0]
    assert bool((merged >= 0).all()) and bool((merged <= o.max()).all())


def test_merging_in_any_grouping_gives_the_same_answer():
    o, lse = partials(4, 3, 2, 64)
    left, right = merge_partials(o[:2], lse[:2]), merge_partials(o[2:], lse[2:])
    regrouped = merge_partials(torch.stack([left[0], right[0]]), torch.stack([left[1], right[1]]))
    assert_merged(merge_partials(o, lse), regrouped)


def test_the_partial_merged_in_is_left_as_it_is():
    o, lse = partials(2, 1, 2, 8)
    before = o[1].clone(), lse[1].clone()
    merge_into(o[0], lse[0], o[1], lse[1])
    assert torch.equal(o[1], before[0]) and torch.equal(lse[1], before[1])


@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
def test_what_one_token_holds_changes_no_bit_of_the_others(poison):
    o, lse = partials(2, 5, 3, 16)
    want, want_lse = fold(o, lse)
    o[1, 2], lse[1, 2] = torch.nan, poison
    lse[0, 4, 1] = poison
    got, got_lse = fold(o, lse)
    touched = torch.zeros(5, 3, dtype=torch.bool)
    touched[2], touched[4, 1] = True, True
    assert torch.equal(got[~touched], want[~touched]) and torch.equal(got_lse[~touched], want_lse[~touched])
    assert got[2].isnan().all() == (poison != -torch.inf), "NaN is passed on, a part without keys is not felt"
