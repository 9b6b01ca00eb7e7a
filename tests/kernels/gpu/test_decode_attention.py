"""`decode_attention` against `reference.paged_attention`.

Everything the kernel must not read is poisoned: KV past a row's length and blocks of nobody hold NaN, table
entries past the end 2147480000. Tolerances: bf16 8e-3, fp16 2e-3, fp32 2e-5 absolute on o (values of order
1); lse 2e-3, 1e-3, 2e-5; fp8 as its Q's dtype, as the definition reads the same fp8 numbers.
"""

from dataclasses import dataclass

import pytest
import torch
from flume_kernels.gpu import reference
from flume_kernels.gpu.attention_plan import AttentionPlan, PlanShape
from flume_kernels.gpu.decode_attention import DecodeConfig, decode_attention, default_config
from flume_kernels.gpu.kv_pool import FP8, KvPool

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
O_TOLERANCE = {BF16: 8e-3, FP16: 2e-3, FP32: 2e-5}
LSE_TOLERANCE = {BF16: 2e-3, FP16: 1e-3, FP32: 2e-5}
NO_BLOCK = 2147480000


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    queries: tuple[int, ...] | None = None  # one each when None
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    block_tokens: int = 16
    q_dtype: torch.dtype = BF16
    kv_dtype: torch.dtype | None = None  # q_dtype when None
    scale_per_block: bool = False
    tile_rows: int = 16
    tile_keys: int = 32
    slots: int = 12
    spread: float = 1.0  # of the queries: large ones make scores far apart


@dataclass
class Step:
    q: torch.Tensor
    pool: KvPool
    tables: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None
    plan: AttentionPlan
    o: torch.Tensor
    lse: torch.Tensor
    scale: float
    config: DecodeConfig

    def run(self):
        self.plan.update(self.lengths, self.starts)
        self.attend()

    def attend(self):
        decode_attention(self.q, self.pool, self.tables, self.plan, self.o, self.lse, self.scale, self.config)


def make_pool(case, num_blocks, device, generator):
    shape = (num_blocks, 2, case.kv_heads, case.block_tokens, case.head_dim)
    values = torch.randn(shape, generator=generator, device=device)
    dtype = case.kv_dtype or case.q_dtype
    if dtype != FP8:
        return KvPool(values.to(dtype))
    blocks = num_blocks if case.scale_per_block else 1
    scales = torch.rand(blocks, 2, case.kv_heads, generator=generator, device=device) * 0.02 + 0.01
    scales = scales.expand(num_blocks, 2, case.kv_heads)
    return KvPool((values / scales[..., None, None]).clamp(-448, 448).to(FP8), scales)


def poison(pool, tables, lengths):
    """NaN in everything but the keys that are held; returns the pool. FP8 has a NaN too."""
    held = torch.zeros(pool.kv.shape[0], pool.block_tokens, dtype=torch.bool, device=pool.kv.device)
    for row, length in enumerate(lengths):
        for token in range(length):
            held[tables[row, token // pool.block_tokens], token % pool.block_tokens] = True
    kv = pool.kv.float().masked_fill(~held[:, None, None, :, None], torch.nan)
    return KvPool(kv.to(pool.kv.dtype), pool.scales)


def make_step(case, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    rows = len(case.lengths)
    blocks_of = [-(-length // case.block_tokens) for length in case.lengths]
    num_blocks = sum(blocks_of) + 3
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.full((rows, max(blocks_of) + 2), NO_BLOCK, dtype=torch.int32)
    for row, count in enumerate(blocks_of):
        tables[row, :count] = torch.tensor([shuffled.pop() for _ in range(count)], dtype=torch.int32)
    pool = poison(make_pool(case, num_blocks, device, generator), tables, case.lengths)

    queries = case.queries or (1,) * rows
    tokens = sum(queries)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32, device=device)
    heads = case.kv_heads * case.group
    q = torch.randn(tokens, heads, case.head_dim, generator=generator, device=device) * case.spread
    shape = PlanShape(
        rows, tokens, max(*case.lengths, 1), heads, case.kv_heads, case.tile_rows, case.tile_keys, case.slots
    )
    o = torch.full_like(q, torch.nan).to(case.q_dtype)
    return Step(
        q=q.to(case.q_dtype),
        pool=pool,
        tables=tables.to(device),
        lengths=torch.tensor(case.lengths, dtype=torch.int32, device=device),
        starts=starts if case.queries else None,
        plan=AttentionPlan.allocate(shape, case.head_dim, device),
        o=o,
        lse=torch.full((tokens, heads), torch.nan, device=device),
        scale=case.head_dim**-0.5,
        config=DecodeConfig(case.tile_rows, case.tile_keys, num_stages=2),
    )


def assert_agrees(step):
    dtype = step.q.dtype
    want, want_lse = reference.paged_attention(
        step.q, step.pool, step.tables, step.lengths, step.starts, step.scale
    )
    torch.testing.assert_close(step.o.double(), want, atol=O_TOLERANCE[dtype], rtol=O_TOLERANCE[dtype])
    torch.testing.assert_close(step.lse.double(), want_lse, atol=LSE_TOLERANCE[dtype], rtol=1e-5)


CASES = {
    "one key": Case((1,)),
    "plain": Case((70, 33)),
    "no keys, first and last": Case((0, 40, 0)),
    "ragged": Case((1, 0, 200, 17, 64)),
    "multi-query": Case((90,), kv_heads=1, group=8),
    "multi-head": Case((90, 20), kv_heads=3, group=1),
    "group not a power of two": Case((50, 10), group=3),
    "group larger than a tile": Case((40,), kv_heads=1, group=20),
    "head_dim 80": Case((45, 7), head_dim=80),
    "head_dim 96": Case((45, 7), head_dim=96),
    "head_dim 128": Case((45, 7), head_dim=128),
    "head_dim 256": Case((45, 7), head_dim=256),
    "blocks of 32, a tile each": Case((100, 31), block_tokens=32),
    "blocks of 48": Case((100, 47), block_tokens=48),
    "blocks of 128": Case((300, 129), block_tokens=128),
    "fp16": Case((70, 33), q_dtype=FP16),
    "fp32": Case((70, 33), q_dtype=FP32),
    "fp8, a scale per head": Case((70, 33), kv_dtype=FP8),
    "fp8, a scale per block": Case((70, 33), kv_dtype=FP8, scale_per_block=True),
    "fp8, a scale per block of a tile or more": Case(
        (130, 33), kv_dtype=FP8, scale_per_block=True, block_tokens=64, q_dtype=FP16
    ),
    "scores far apart": Case((200,), spread=30.0, q_dtype=FP16),
    "not split": Case((150, 20), slots=1),
    "split as finely as it goes": Case((700, 3), tile_keys=16, slots=264),
    "a chunk": Case((70,), queries=(5,)),
    "chunks, one without queries": Case((70, 30, 0, 50), queries=(3, 0, 2, 9)),
    "a chunk in larger tiles": Case((60, 90), queries=(40, 13), tile_rows=32, q_dtype=FP16),
    "a chunk over a split range": Case((600,), queries=(9,), kv_heads=1, tile_keys=16, slots=40),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_agrees_with_the_definition(case, device):
    if case.kv_dtype == FP8 and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    step = make_step(case, device)
    step.run()
    assert_agrees(step)


def test_a_long_row_is_really_split(device):
    step = make_step(CASES["split as finely as it goes"], device)
    step.run()
    assert step.plan.tiles[0, 1] > 2


def test_a_second_layer_and_a_second_step_need_no_new_plan_memory(device):
    step = make_step(Case((120, 40), slots=3), device)  # more items than programs
    step.run()
    step.o.fill_(torch.nan)
    step.attend()
    assert_agrees(step)
    step.lengths.copy_(torch.tensor([33, 5]))
    step.o.fill_(torch.nan)
    step.run()
    assert_agrees(step)


def test_memory_the_plan_was_not_asked_to_write_is_left_alone(device):
    step = make_step(Case((50, 20, 10)), device)
    step.plan.update(step.lengths[:2])
    step.attend()
    assert step.o[2].isnan().all() and step.lse[2].isnan().all()
    assert not step.o[:2].isnan().any()


@pytest.mark.parametrize("slots", [0, 3], ids=["whole", "split"])
@pytest.mark.parametrize("what", [0, 1], ids=["key", "value"])
def test_a_row_that_holds_nan_is_nan_and_the_others_do_not_change(what, slots, device):
    case = Case((50, 90, 10), slots=slots) if slots else Case((50, 90, 10))
    step, damaged = make_step(case, device), make_step(case, device)
    step.run()
    damaged.pool.kv[damaged.tables[1, 2].item(), what, :, 1] = torch.nan
    damaged.run()
    assert damaged.o[1].isnan().all(), "not taken for a row without keys"
    assert damaged.lse[1].isnan().all() == (what == 0)
    for row in (0, 2):
        assert torch.equal(damaged.o[row], step.o[row]) and torch.equal(damaged.lse[row], step.lse[row])


def test_partials_over_two_halves_merge_to_the_whole(device):
    case = Case((96,), q_dtype=FP32)
    whole, left, right = (make_step(case, device) for _ in range(3))
    for half, blocks in ((left, slice(0, 3)), (right, slice(3, 6))):
        half.tables = half.tables[:, blocks].contiguous()
        half.lengths.fill_(48)
    for step in (whole, left, right):
        step.run()
    o, lse = reference.merge_partials(torch.stack([left.o, right.o]), torch.stack([left.lse, right.lse]))
    torch.testing.assert_close(whole.o.double(), o, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(whole.lse.double(), lse, atol=2e-5, rtol=2e-5)


def test_strided_queries_and_results_are_read_and_written_in_place(device):
    step = make_step(Case((70, 33)), device)
    tokens, heads, dim = step.q.shape
    q, step.q = (
        step.q,
        torch.full((tokens, heads + 3, dim), torch.nan, dtype=step.q.dtype, device=device)[:, :heads],
    )
    step.q.copy_(q)
    frame = torch.full((tokens, heads + 1, dim), 7.0, dtype=q.dtype, device=device)
    step.o = frame[:, :heads]
    step.run()
    assert_agrees(step)
    assert (frame[:, heads] == 7.0).all()


def test_arguments_that_do_not_fit_are_refused_by_name(device):
    step = make_step(Case((70, 33)), device)
    with pytest.raises(ValueError, match="KV is"):
        step.q, step.o = step.q.half(), step.o.half()
        step.run()
    step = make_step(Case((70, 33)), device)
    with pytest.raises(ValueError, match="tile_keys"):
        step.config = DecodeConfig(16, 64)
        step.run()
    with pytest.raises(ValueError, match="scales"):
        KvPool(step.pool.kv.to(FP8))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("shared_bytes", [100 << 10, 164 << 10, 227 << 10], ids=["sm86", "sm80", "sm90"])
def test_default_configs_fit_shared_memory(head_dim, shared_bytes):
    config = default_config(head_dim, 2, 4, 1, shared_bytes)
    held = (config.num_stages - 1) * 2 * config.tile_keys * head_dim * 2
    assert config.programs_per_sm * held <= shared_bytes
