"""Attention with its log-sum-exp against the double-precision definition.

Tolerances: float32 1e-5; bfloat16 o 1e-2 and lse 2e-3 (inputs are the same bfloat16 numbers on both
sides, so only the products inside differ).
"""

import math

import pytest
import torch
from flume_kernels import reference
from flume_kernels.merge import merge_partials
from flume_kernels.partial_attention import KvRun, attend_runs, causal_attention, partial_attention

O_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
LSE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
HEADS = [(4, 4, 16), (9, 3, 64), (8, 2, 80), (6, 1, 32), (1, 1, 8)]
HEAD_IDS = ["MHA", "GQA 9/3", "GQA odd dim", "MQA", "one head"]
dtypes = pytest.mark.parametrize("dtype", O_TOLERANCE, ids=str)
heads = pytest.mark.parametrize("query_heads, kv_heads, dim", HEADS, ids=HEAD_IDS)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned_pool(kv_heads, tokens, dim, runs, dtype):
    """Keys and values [2, kv_heads, tokens, dim] that are NaN outside `runs` of (start, length)."""
    pool = torch.full((2, kv_heads, tokens, dim), torch.nan, dtype=dtype)
    for start, length in runs:
        pool[:, :, start : start + length] = random(2, kv_heads, length, dim, dtype=dtype, seed=start + 1)
    return pool


def assert_same(got, want, dtype):
    tolerance = O_TOLERANCE[dtype]
    torch.testing.assert_close(got[0].double(), want[0], atol=tolerance, rtol=tolerance)
    tolerance = LSE_TOLERANCE[dtype]
    torch.testing.assert_close(got[1].double(), want[1], atol=tolerance, rtol=tolerance)


@dtypes
@heads
@pytest.mark.parametrize("queries", [1, 2, 7, 33])
@pytest.mark.parametrize("tokens", [1, 17, 600])
def test_a_run_in_the_middle_of_poisoned_memory(query_heads, kv_heads, dim, queries, tokens, dtype):
    q = random(queries, query_heads, dim, dtype=dtype)
    pool = poisoned_pool(kv_heads, tokens + 40, dim, [(13, tokens)], dtype)
    k, v = pool[:, :, 13 : 13 + tokens]
    scale = 1 / math.sqrt(dim)
    got = partial_attention(q, k, v, scale)
    assert got[0].shape == q.shape and got[0].dtype is dtype and got[1].dtype is torch.float32
    assert_same(got, reference.attention(q, k, v, scale), dtype)


def test_the_scale_is_the_callers():
    q, k, v = random(2, 4, 16), random(2, 5, 16, seed=1), random(2, 5, 16, seed=2)
    assert_same(partial_attention(q, k, v, 0.9), reference.attention(q, k, v, 0.9), torch.float32)


def test_without_keys_the_output_is_zero_and_the_log_sum_exp_minus_infinity():
    o, lse = partial_attention(random(3, 4, 8), torch.empty(2, 0, 8), torch.empty(2, 0, 8), 1.0)
    assert not o.any() and bool((lse == -torch.inf).all())


@dtypes
@pytest.mark.parametrize("queries", [1, 5])
def test_runs_apart_in_memory_give_attention_over_their_union(queries, dtype):
    spans = [(0, 16), (40, 3), (64, 0), (100, 28)]
    pool = poisoned_pool(3, 160, 64, spans, dtype)
    q = random(queries, 9, 64, dtype=dtype, seed=99)
    runs = [KvRun(*pool[:, :, start : start + length]) for start, length in spans]
    o = torch.full((queries, 9, 64), torch.nan, dtype=dtype)
    lse = torch.full((queries, 9), torch.nan)
    attend_runs(q, runs, 0.125, o, lse)
    union = [torch.cat([run[i] for run in runs], dim=1) for i in range(2)]
    assert_same((o, lse), reference.attention(q, *union, 0.125), dtype)


@dtypes
@heads
@pytest.mark.parametrize("tokens", [1, 2, 31, 130])
def test_a_pass_attends_to_itself_causally(query_heads, kv_heads, dim, tokens, dtype):
    q = random(tokens, query_heads, dim, dtype=dtype)
    k, v = (random(tokens, kv_heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    got = causal_attention(q, k, v, 0.2)
    assert got[1].dtype is torch.float32
    assert_same(got, reference.causal_attention(q, k, v, 0.2), dtype)


def test_past_and_present_merged_equal_causal_attention_over_everything():
    past, new, scale = 50, 12, 0.125
    q = random(past + new, 9, 64)
    k, v = random(past + new, 3, 64, seed=1), random(past + new, 3, 64, seed=2)
    want_o, want_lse = reference.causal_attention(q, k, v, scale)
    remote = partial_attention(
        q[past:].contiguous(), k[:past].transpose(0, 1), v[:past].transpose(0, 1), scale
    )
    local = causal_attention(q[past:], k[past:], v[past:], scale)
    got = merge_partials(torch.stack([remote[0], local[0]]), torch.stack([remote[1], local[1]]))
    assert_same(got, (want_o[past:], want_lse[past:]), torch.float32)
