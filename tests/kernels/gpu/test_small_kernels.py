"""merge_partials, decode_merge, rms_norm, rope, silu_mul and kv_append against their definitions.

Tolerances, absolute and relative: fp32 1e-5, fp16 2e-3, bf16 1e-2 (one rounding of the result). kv_append
moves memory: exact. Memory around strided inputs and outputs holds NaN or a marker and must stay as it was.
"""

import pytest
import torch
from flume_kernels.gpu import reference
from flume_kernels.gpu.decode_merge import decode_merge
from flume_kernels.gpu.kv_append import kv_append
from flume_kernels.gpu.kv_pool import FP8, KvPool
from flume_kernels.gpu.merge_partials import merge_partials
from flume_kernels.gpu.rms_norm import rms_norm
from flume_kernels.gpu.rope import rope, rope_keys
from flume_kernels.gpu.silu_mul import silu_mul

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def randn(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def framed(tensor, margin=3):
    """The same values inside rows that go on with NaN: a strided view, and the NaN beside it."""
    rows = tensor.flatten(1)
    frame = torch.full(
        (rows.shape[0], rows.shape[1] + margin), torch.nan, dtype=tensor.dtype, device=tensor.device
    )
    frame[:, : rows.shape[1]] = rows
    view = frame[:, : rows.shape[1]].unflatten(1, tensor.shape[1:])
    return view, frame[:, rows.shape[1] :]


def assert_close(got, want, dtype):
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def partials(parts, tokens, heads, dim, dtype, device):
    o = randn(parts, tokens, heads, dim, dtype=dtype, device=device)
    return o, randn(parts, tokens, heads, device=device, seed=1) * 20


def merge(o, lse):
    out = torch.full_like(o[0], torch.nan)
    out_lse = torch.full_like(lse[0], torch.nan)
    merge_partials(o, lse, out, out_lse)
    return out, out_lse


@DTYPES
@pytest.mark.parametrize(
    "parts, tokens, heads, dim",
    [(1, 1, 1, 64), (2, 3, 4, 128), (7, 5, 2, 80), (3, 0, 2, 64)],
    ids=["one part", "plain", "head_dim not a power of two", "no tokens"],
)
def test_merging_matches_the_definition(parts, tokens, heads, dim, dtype, device):
    o, lse = partials(parts, tokens, heads, dim, dtype, device)
    out, out_lse = merge(o, lse)
    want, want_lse = reference.merge_partials(o, lse)
    assert_close(out, want, dtype)
    torch.testing.assert_close(out_lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("empty", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_part_without_keys_weighs_nothing_even_when_it_holds_nan(empty, device):
    o, lse = partials(3, 2, 2, 64, torch.float32, device)
    full = [part for part in range(3) if part != empty]
    want, want_lse = reference.merge_partials(o[full], lse[full])
    lse[empty], o[empty] = -torch.inf, torch.nan
    out, out_lse = merge(o, lse)
    assert_close(out, want, torch.float32)
    torch.testing.assert_close(out_lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def test_a_part_of_nan_makes_its_own_head_nan_and_no_other(device):
    o, lse = partials(3, 4, 2, 64, torch.float32, device)
    want, want_lse = merge(o.clone(), lse.clone())
    lse[1, 2, 0], o[1, 2, 0] = torch.nan, torch.nan
    out, out_lse = merge(o, lse)
    assert out[2, 0].isnan().all() and out_lse[2, 0].isnan(), "not taken for a part without keys"
    out[2, 0], out_lse[2, 0] = want[2, 0], want_lse[2, 0]
    assert torch.equal(out, want) and torch.equal(out_lse, want_lse)


def test_no_keys_anywhere_gives_zero_and_minus_infinity(device):
    o, lse = partials(2, 1, 1, 64, torch.float32, device)
    out, out_lse = merge(torch.full_like(o, torch.nan), torch.full_like(lse, -torch.inf))
    assert not out.any() and (out_lse == -torch.inf).all()


def test_partials_that_lie_apart_are_read_where_they_are(device):
    o, lse = partials(3, 4, 2, 64, torch.float16, device)
    o_view, _ = framed(o)
    lse_view, _ = framed(lse)
    out, _ = merge(o_view, lse_view)
    assert_close(out, reference.merge_partials(o, lse)[0], torch.float16)


@DTYPES
@pytest.mark.parametrize("parts, kv_heads, dim", [(1, 2, 64), (3, 1, 80), (2, 6, 96)])
def test_tokens_attend_to_themselves_beside_the_partials(parts, kv_heads, dim, dtype, device):
    o, lse = partials(parts, 3, 6, dim, dtype, device)
    lse[0, 1], o[0, 1] = -torch.inf, torch.nan  # a part without keys
    q, _ = framed(randn(3, 6, dim, dtype=dtype, device=device, seed=2))
    kv, beside = framed(randn(3, 2 * kv_heads, dim, dtype=dtype, device=device, seed=3))
    k, v = kv.chunk(2, 1)
    out = torch.full((3, 6, dim), torch.nan, dtype=dtype, device=device)
    decode_merge(q, k, v, o, lse, out, dim**-0.5)
    assert_close(out, reference.decode_merge(q, k, v, o, lse, dim**-0.5), dtype)
    assert beside.isnan().all()


def test_a_token_without_a_past_is_its_own_value(device):
    o, lse = torch.full((2, 1, 2, 64), torch.nan), torch.full((2, 1, 2), -torch.inf)
    q, k, v = (randn(1, heads, 64, seed=heads) for heads in (2, 1, 1))
    out = torch.empty(1, 2, 64, device=device)
    decode_merge(*(x.to(device) for x in (q, k, v, o, lse)), out, 0.125)
    torch.testing.assert_close(out.cpu(), v.expand(1, 2, 64))


def test_shapes_that_do_not_fit_the_merge_are_refused():
    x = torch.zeros(2, 4, 64)
    o, lse = torch.zeros(1, 2, 4, 64), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="do not fit q"):
        decode_merge(x, x[:, :3], x[:, :3], o, lse, x, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        decode_merge(x, x, x, o, lse[:, :1], x, 1.0)
    with pytest.raises(ValueError, match="float32"):
        decode_merge(x, x, x, o, lse.half(), x, 1.0)


@DTYPES
@pytest.mark.parametrize("hidden", [64, 576, 4096], ids=["small", "not a power of two", "large"])
def test_rms_norm_matches_the_definition(hidden, dtype, device):
    x, _ = framed(randn(3, hidden, dtype=dtype, device=device) * 3)
    weight = randn(hidden, dtype=dtype, device=device, seed=1)
    out, margin = framed(torch.full((3, hidden), torch.nan, dtype=dtype, device=device))
    rms_norm(x, weight, out, 1e-5)
    assert_close(out, reference.rms_norm(x, weight, 1e-5), dtype)
    assert margin.isnan().all()


@DTYPES
def test_rms_norm_adds_to_the_residual_first(dtype, device):
    x, residual = randn(4, 96, dtype=dtype, device=device), randn(4, 96, dtype=dtype, device=device, seed=2)
    weight, out = randn(96, dtype=dtype, device=device, seed=1), torch.full_like(x, torch.nan)
    total = x + residual
    rms_norm(x, weight, out, 1e-6, residual)
    # The interpreter cuts float32 off to bf16 instead of rounding it.
    last_place = 2**-7 if device == "cpu" and dtype is torch.bfloat16 else 0
    torch.testing.assert_close(residual, total, atol=0, rtol=last_place)
    assert_close(out, reference.rms_norm(residual, weight, 1e-6), dtype)


def test_rms_norm_of_a_rounded_sum_is_that_of_what_was_stored(device):
    x, residual = (randn(2, 96, dtype=torch.bfloat16, device=device, seed=seed) for seed in (0, 1))
    weight, out = torch.ones(96, device=device), torch.full((2, 96), torch.nan, device=device)
    rms_norm(x, weight, out, 1e-6, residual)
    assert_close(out, reference.rms_norm(residual, weight, 1e-6), torch.float32)


def test_rms_norm_of_small_numbers_feels_eps(device):
    x, weight = randn(2, 64, device=device) * 1e-3, torch.ones(64, device=device)
    out = torch.full_like(x, torch.nan)
    rms_norm(x, weight, out, 1e-5)
    assert_close(out, reference.rms_norm(x, weight, 1e-5), torch.float32)


def test_rms_norm_of_zeros_is_zero(device):
    out = torch.full((2, 64), torch.nan, device=device)
    rms_norm(torch.zeros(2, 64, device=device), torch.ones(64, device=device), out, 1e-5)
    assert not out.any()


@DTYPES
@pytest.mark.parametrize(
    "heads, dim", [(1, 64), (5, 80), (9, 128)], ids=["one head", "odd", "more than a block"]
)
def test_rope_matches_the_definition_and_writes_into_the_send_buffer(heads, dim, dtype, device):
    tokens, half = 3, dim // 2
    fused, _ = framed(randn(tokens, heads, dim, dtype=dtype, device=device), margin=7)
    angles = randn(40, half, device=device, seed=1) * 10
    positions = torch.tensor([0, 39, 7], device=device)
    out, margin = framed(torch.full((tokens, heads, dim), torch.nan, dtype=dtype, device=device))
    rope(fused, positions, angles.cos(), angles.sin(), out)
    assert_close(out, reference.rope(fused, positions, angles.cos(), angles.sin()), dtype)
    assert margin.isnan().all()


@DTYPES
@pytest.mark.parametrize("heads, dim", [(4, 64), (9, 80)], ids=["small", "odd, beyond a block"])
def test_rope_writes_to_a_second_place_and_to_every_address_and_nowhere_else(heads, dim, dtype, device):
    q = randn(3, heads, dim, dtype=dtype, device=device)
    angles = randn(40, dim // 2, device=device, seed=1) * 10
    positions = torch.tensor([0, 39, 7], device=device)
    out, (also, margin) = torch.empty_like(q), framed(torch.full_like(q, torch.nan))
    there = torch.full((5, heads, dim), torch.nan, dtype=dtype, device=device)
    at = [row.data_ptr() for row in there]
    addresses = torch.tensor([[at[1], 0, at[4]], [at[2], 0, 0]], device=device)
    rope(q, positions, angles.cos(), angles.sin(), out, also, addresses)
    assert_close(out, reference.rope(q, positions, angles.cos(), angles.sin()), dtype)
    assert torch.equal(also, out) and margin.isnan().all()
    assert torch.equal(there[[1, 4, 2]], out[[0, 2, 0]])
    assert there[[0, 3]].isnan().all()


@DTYPES
@pytest.mark.parametrize(
    "heads, dim", [(1, 64), (3, 80), (9, 128)], ids=["one head", "odd", "beyond a block"]
)
def test_keys_are_turned_here_and_in_the_send_buffer_and_values_copied_beside_them(heads, dim, dtype, device):
    fused, _ = framed(randn(3, 2 * heads, dim, dtype=dtype, device=device), margin=7)
    k, v = fused.chunk(2, dim=1)
    angles = randn(40, dim // 2, device=device, seed=1) * 10
    positions = torch.tensor([0, 39, 7], device=device)
    out = torch.full((3, heads, dim), torch.nan, dtype=dtype, device=device)
    sent = torch.full((4, 3, heads, dim), torch.nan, dtype=dtype, device=device)
    rope_keys(k, v, positions, angles.cos(), angles.sin(), out, sent[1:3])
    assert_close(out, reference.rope(k, positions, angles.cos(), angles.sin()), dtype)
    assert torch.equal(sent[1], out) and torch.equal(sent[2], v)
    assert sent[[0, 3]].isnan().all()


def test_rope_at_angle_zero_moves_memory_only(device):
    x = randn(2, 3, 64, device=device)
    out = torch.full_like(x, torch.nan)
    one = torch.ones(1, 32, device=device)
    rope(x, torch.zeros(2, dtype=torch.int32, device=device), one, torch.zeros_like(one), out)
    assert torch.equal(out, x)


@DTYPES
@pytest.mark.parametrize("width", [64, 1025, 1536])
def test_silu_mul_matches_the_definition(width, dtype, device):
    gate_up, _ = framed(randn(3, 2 * width, dtype=dtype, device=device) * 5)
    gate_up[0, 0] = -30000.0  # exp overflows
    out, margin = framed(torch.full((3, width), torch.nan, dtype=dtype, device=device))
    silu_mul(gate_up, out)
    want = reference.silu_mul(gate_up[:, :width], gate_up[:, width:])
    assert_close(out, want, dtype)
    assert margin.isnan().all()


def append_and_compare(pool, k, v, device):
    slots = torch.tensor([17, 0, -1, 63, 16], device=device)
    want = reference.kv_append(pool, k, v, slots)
    kv_append(pool, k, v, slots)
    torch.testing.assert_close(pool.kv.float(), want.float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dim", [64, 80])
@DTYPES
def test_kv_append_puts_each_token_in_its_slot_and_touches_nothing_else(dim, dtype, device):
    pool = KvPool(torch.full((4, 2, 3, 16, dim), torch.nan, dtype=dtype, device=device))
    k, _ = framed(randn(5, 3, dim, dtype=dtype, device=device))
    v, _ = framed(randn(5, 3, dim, dtype=dtype, device=device, seed=1))
    append_and_compare(pool, k, v, device)


def fp8_pool(scales, device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    return KvPool(torch.full((4, 2, 3, 16, 64), torch.nan, device=device).to(FP8), scales)


def test_kv_append_divides_by_the_scale_of_its_block_and_clamps(device):
    # Values that e4m3 holds once divided by their power of two, and some beyond what it can hold.
    scales = 2.0 ** torch.arange(24, device=device).reshape(4, 2, 3).remainder(5)
    k = randn(5, 3, 64, device=device).mul(5).round().clamp(1, 15) * 16
    v = randn(5, 3, 64, device=device, seed=1).mul(5).round().clamp(-15, -1) * 16
    k[0, :, 0], v[1, :, 1] = 30000.0, -30000.0
    append_and_compare(fp8_pool(scales, device), k, v, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter does not round to fp8 correctly")
def test_kv_append_rounds_to_fp8(device):
    scales = torch.rand(4, 2, 3, generator=torch.Generator(device).manual_seed(3), device=device) + 0.5
    k = randn(5, 3, 64, dtype=torch.bfloat16, device=device) * 100
    v = randn(5, 3, 64, dtype=torch.bfloat16, device=device, seed=1) * 1000
    append_and_compare(fp8_pool(scales, device), k, v, device)


def test_arguments_that_do_not_fit_are_refused(device):
    x = randn(2, 64, device=device)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, x[0, :32], x.clone(), 1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        silu_mul(x, x)
    with pytest.raises(ValueError, match="float32"):
        rope(x[:, None], torch.zeros(2, dtype=torch.int32), x[:, :32].half(), x[:, :32].half(), x[:, None])
    q, zero, turns = x[:, None], torch.zeros(2, dtype=torch.int32, device=device), randn(2, 32, device=device)
    with pytest.raises(ValueError, match="also"):
        rope(q, zero, turns, turns, q.clone(), q.double())
    with pytest.raises(ValueError, match="addresses"):
        rope(q, zero, turns, turns, q.clone(), addresses=zero[None])
    with pytest.raises(ValueError, match="kv must be"):
        rope_keys(q, q, zero, turns, turns, q.clone(), q)
    with pytest.raises(ValueError, match="do not fit"):
        merge_partials(x[None, :, None], x[None, :, :2].contiguous(), x[:, None], x[:, :1])
