"""The kernels as captured steps call them: decode steps and answers of one layer, against definitions."""

import pytest
import torch
from flume_attention.cuda.ops import TritonAttention
from flume_common.layout import KvLayout
from flume_kernels.gpu import decode_tuning, reference
from flume_kernels.gpu.decode_attention import DecodeConfig
from flume_kernels.gpu.kv_pool import KvPool
from flume_kernels.gpu.linear_tuning import Fusion
from flume_kernels.gpu.skinny_linear import SkinnyConfig
from flume_weight.cuda.buckets import StepSize
from flume_weight.cuda.decode_step import DecodeStep
from flume_weight.cuda.device_weights import on_device
from flume_weight.cuda.ops import Angles, TritonOps
from flume_weight.cuda.step_buffers import StepBuffers
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
    results = [run(model, weights, ops, device) for ops in (TritonOps(choice), ReferenceOps())]
    assert asked == set(Fusion)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def run(config, weights, ops, device):
    """Logits, queries and keys of one step whose partials are there from the start."""
    if device == "cuda":
        from flume_kernels.gpu.cuda_device import CudaDevice

    where = CudaDevice() if device == "cuda" else SimulatedDevice()
    buffers = StepBuffers.allocate(where, config, StepSize(4, 2), 2, torch.float32)
    buffers.fill(torch.tensor([3, 60, 7]), torch.tensor([11, 0, 95]))
    for microbatch in buffers.microbatches:
        microbatch.part_o.copy_(randn(*microbatch.part_o.shape, device="cpu", seed=2))
        microbatch.part_lse[0].copy_(randn(*microbatch.part_lse.shape[1:], device="cpu", seed=3))
        microbatch.part_o[1] = torch.nan
    buffers.flags.host.open_wide()
    where.warm_up(DecodeStep(where, ops, config, weights, Angles.of(config, torch.device(device)), buffers))
    parts = buffers.microbatches
    return [
        buffers.logits.cpu(),
        *(part.queries.clone() for part in parts),
        *(part.keys.clone() for part in parts),
    ]
