"""The kernels as captured steps call them: decode steps and answers of one layer, against definitions."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from flume_attention.cuda.direct_rows import Spread, Whole
from flume_attention.cuda.lane_region import LaneRegion
from flume_attention.cuda.ops import TritonAttention
from flume_attention.cuda.paging import Segment
from flume_common.direct_region import ANSWERED_AT, ASKED_AT, DirectRegion, mark
from flume_common.layout import KvLayout
from flume_kernels import reference as definition
from flume_kernels.gpu import decode_tuning, reference
from flume_kernels.gpu.cuda_device import CudaDevice
from flume_kernels.gpu.decode_attention import DecodeConfig
from flume_kernels.gpu.kv_pool import KvPool
from flume_kernels.gpu.linear_tuning import Fusion
from flume_kernels.gpu.skinny_linear import SkinnyConfig
from flume_weight.cuda.buckets import StepSize
from flume_weight.cuda.decode_step import DecodeStep
from flume_weight.cuda.device_weights import on_device
from flume_weight.cuda.ops import Angles, TritonOps
from flume_weight.cuda.step_buffers import StepBuffers
from flume_weight.range_attention import Exchange
from flume_weight.sampling import Ask
from region_session import flag, make_region
from simulated_device import SimulatedDevice
from step_fakes import ReferenceOps, random_weights, small_config

LAYOUT = KvLayout(1, 4, 2, 64, "float32", 16)


@pytest.fixture
def attention(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(decode_tuning, "decode_config", lambda *_: DecodeConfig())
        monkeypatch.setattr(decode_tuning, "decode_slots", lambda *_: 8)
    return TritonAttention(LAYOUT, torch.device(device))


@pytest.fixture
def pool(device):
    kv = torch.full((6, 2, 2, 16, 64), torch.nan, device=device)
    return KvPool(kv)


def randn(*shape, device, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def filled(attention, pool, device):
    """21 tokens in blocks 4 and 1, 16 in block 3."""
    slots = torch.tensor([*range(64, 80), *range(16, 21), *range(48, 64)], device=device)
    k, v = randn(2, 37, 2, 64, device=device)
    attention.append(pool, k, v, slots)
    tables = torch.tensor([[4, 1], [3, 0]], dtype=torch.int32, device=device)
    return tables, torch.tensor([21, 16], dtype=torch.int32, device=device)


@pytest.mark.parametrize("kind", ["whole", "spread"])
def test_rows_of_a_direct_step_are_answered_in_the_region(attention, pool, device, kind):
    filled(attention, pool, device)
    made = SimulatedDevice() if device == "cpu" else CudaDevice()
    region = make_lane_region(rows=2, device=device)
    common = made, attention, SimpleNamespace(layout=LAYOUT), region, 2
    whole, short = Segment([4, 1], 21), Segment([3], 16)
    if kind == "whole":
        rows, segments = Whole(*common, 32), [[whole], [short]]
    else:
        rows, segments = Spread(*common, 4, 4, 32), [[], [whole, short]]
    rows.fill(segments)
    rows.begin()
    rows.attend(pool)
    for row, past in enumerate(segments):
        k, v = held(pool, past)
        o, lse = definition.attention(region.queries[row : row + 1], k, v, 0.125)
        torch.testing.assert_close(region.o[row : row + 1].double(), o, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(region.lse[row : row + 1].double(), lse, atol=1e-5, rtol=1e-5)


def held(pool, segments):
    """K and V [kv_heads, tokens, head_dim] of all of them."""
    if not segments:
        return pool.kv[:1, :, :, :0].movedim(1, 0)[:, 0]
    parts = [torch.cat(list(pool.kv[part.blocks]), 2)[:, :, : part.tokens] for part in segments]
    return torch.cat(parts, 2)


def make_lane_region(rows, device):
    size = DirectRegion(LAYOUT, rows)
    region = LaneRegion.of(size, torch.zeros(size.size_bytes, dtype=torch.uint8, device=device))
    region.queries.copy_(randn(*region.queries.shape, device=device, seed=2))
    for out in (region.o, region.lse):
        out.fill_(torch.nan)
    return region


@pytest.mark.parametrize("starts", [None, [0, 3, 4]], ids=["one query a row", "a chunk"])
def test_an_answer_is_attention_over_what_was_appended(attention, pool, device, starts):
    tables, lengths = filled(attention, pool, device)
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int32, device=device)
    tokens = 2 if starts is None else 4
    q = randn(tokens, 4, 64, device=device, seed=1)
    o, lse = torch.full_like(q, torch.nan), torch.full((tokens, 4), torch.nan, device=device)
    plan = attention.plan(2, tokens, 32)
    attention.update(plan, lengths, starts)
    attention.attend(plan, q, pool, tables, o, lse)
    want_o, want_lse = reference.paged_attention(q, pool, tables, lengths, starts, 64**-0.5)
    torch.testing.assert_close(o.double(), want_o, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
FUSED = SkinnyConfig(block_n=16, block_k=16, split=2, num_stages=2)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, **BIASES}], ids=["", "with norms and biases"])
@pytest.mark.parametrize("config", [None, FUSED], ids=["torch's products", "ours"])
def test_a_decode_step_of_kernels_is_that_of_their_definitions(device, changes, config):
    asked = set()

    def choice(problem, where):
        asked.add(problem.fusion)
        return config

    model = small_config(num_layers=2, **changes)
    weights = on_device(random_weights(model), torch.device(device))
    kernels = TritonOps(choice)
    if device == "cpu":  # the interpreter is slow
        kernels._shortlist = partial(kernels._shortlist, chunk=64)
    results = [run(model, weights, ops, device) for ops in (kernels, ReferenceOps())]
    assert asked == set(Fusion)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=2e-5)


def step_device(device):
    if device == "cpu":
        return SimulatedDevice()
    from flume_kernels.gpu.cuda_device import CudaDevice

    return CudaDevice()


def run(config, weights, ops, device):
    """Logits, queries and keys of one step whose partials are there from the start."""
    where = step_device(device)
    buffers = StepBuffers.allocate(where, config, StepSize(4, 2), 2, torch.float32)
    buffers.fill(torch.tensor([3, 60, 7]), torch.tensor([11, 0, 95]))
    buffers.shortlists.ask([0, 1], [Ask(0.8, (1 << 63) + 5, True), Ask(0.0, 0, True)])
    for microbatch in buffers.microbatches:
        microbatch.part_o.copy_(randn(*microbatch.part_o.shape, device="cpu", seed=2))
        microbatch.part_lse[0].copy_(randn(*microbatch.part_lse.shape[1:], device="cpu", seed=3))
        microbatch.part_o[1] = torch.nan
    buffers.flags.host.open_wide()
    where.warm_up(DecodeStep(where, ops, config, weights, Angles.of(config, torch.device(device)), buffers))
    parts, shortlists = buffers.microbatches, buffers.shortlists
    # Row 0 drew a token, row 1 asked for candidates, the others for the largest alone.
    return [
        buffers.logits.cpu(),
        shortlists.tokens[0, : 1 + config.vocab_size].clone(),
        shortlists.values[0, : 1 + config.vocab_size].clone(),
        shortlists.sums[0].clone(),
        shortlists.tokens[1, 1 : 1 + config.vocab_size].clone(),
        shortlists.tokens[2:, 1].clone(),
        shortlists.sums[:, 0].clone(),
        *(part.queries.clone() for part in parts),
        *(part.keys.clone() for part in parts),
    ]


def test_a_direct_step_of_kernels_is_the_same_over_frames(device):
    """Two nodes: one is asked about rows 0 to 2, the other about rows 2 and 0. Row 3 is padding."""
    config = small_config(num_layers=2)
    weights = on_device(random_weights(config), torch.device(device))
    where, angles = step_device(device), Angles.of(config, torch.device(device))
    frames = StepBuffers.allocate(where, config, StepSize(4), 2, torch.float32)
    direct = frames.for_direct(where)
    (memory,) = frames.microbatches
    frames.fill(torch.tensor([3, 60, 7]), torch.tensor([11, 0, 95]))
    asked = (0, slice(0, 3), 3), (1, torch.tensor([2, 0]), 2)
    nodes = [make_region(config.layout("float32"), 3, device) for _ in asked]
    exchanges = []
    memory.part_o.fill_(torch.nan)
    for (part, rows, count), mapped in zip(asked, nodes, strict=True):
        o, lse = rows_of(mapped, "o", count, config), rows_of(mapped, "lse", count, config)
        o.copy_(randn(*o.shape, device=device, seed=part))
        lse.copy_(randn(*lse.shape, device=device, seed=part + 2))
        memory.part_o[part, rows], memory.part_lse[part, rows] = o.cpu(), lse.cpu()
        flag(mapped, ANSWERED_AT).fill_(mark(5, 1))
        exchanges.append(Exchange(SimpleNamespace(region=mapped), queries=rows, num_queries=count))
    direct.direct.fill(5, exchanges)
    found = []
    for buffers in (frames, direct):
        buffers.flags.host.open_wide()
        memory.keys.fill_(torch.nan)
        where.warm_up(DecodeStep(where, TritonOps(), config, weights, angles, buffers))
        found.append((buffers.logits.cpu().clone(), memory.keys.clone()))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    for (_, rows, count), mapped in zip(asked, nodes, strict=True):
        assert torch.equal(rows_of(mapped, "queries", count, config).cpu(), memory.queries[rows])
        assert int(flag(mapped, ASKED_AT)) == mark(5, 1)


def rows_of(mapped, what, count, config):
    """The first rows of one part of a float32 region."""
    at, shape = getattr(mapped.region, f"{what}_at"), (count, config.num_query_heads, config.head_dim)
    shape = shape[:2] if what == "lse" else shape
    floats = mapped.memory[at:].view(torch.float32)
    return floats[: torch.Size(shape).numel()].view(shape)
