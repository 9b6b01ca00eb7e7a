"""Every kernel compiles for Ampere and Hopper, on any machine: the wrappers run, and launches stop after
the compiler.

What the interpreter cannot see: types that only the compiler checks, registers that spill, shared memory
that does not fit.
"""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from flume_kernels.gpu.attention_plan import AttentionPlan, PlanShape
from flume_kernels.gpu.decode_attention import DecodeConfig, decode_attention, default_config
from flume_kernels.gpu.decode_merge import decode_merge
from flume_kernels.gpu.direct import await_flags, direct_merge, raise_flags
from flume_kernels.gpu.kv_append import kv_append
from flume_kernels.gpu.kv_pool import FP8, KvPool
from flume_kernels.gpu.merge_partials import merge_partials
from flume_kernels.gpu.rms_norm import rms_norm
from flume_kernels.gpu.rope import rope
from flume_kernels.gpu.sampling import greedy, greedy_workspace_size, sample
from flume_kernels.gpu.shortlist import SUMS, shortlist
from flume_kernels.gpu.signals import await_, land, signal, stamp
from flume_kernels.gpu.silu_mul import silu_mul
from flume_kernels.gpu.skinny_linear import SkinnyConfig, SplitMemory, skinny_linear
from triton.backends.compiler import GPUTarget

TARGETS = {"sm80": 80, "sm90": 90}
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
BF16 = torch.bfloat16


class CompileOnly:
    """Stands for the driver of a device that is not there; its number is its compute capability."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def compiled(request, monkeypatch):
    """The kernels compiled so far for one target, in order of launch."""
    kernels = []

    def launch(self, grid):
        return lambda *args, **kwargs: kernels.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(triton.runtime.driver, "_active", CompileOnly(request.param))
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "__getitem__", launch)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    kernels_of_target = kernels
    yield request.param, kernels_of_target


def usage(kernel, tmp_path):
    """(registers, stack bytes) of one thread, from the machine code."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    out = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", out).groups()
    return int(registers), int(stack)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_default_configs_fit_and_do_not_spill(compiled, head_dim, tmp_path):
    capability, kernels = compiled
    config = default_config(head_dim, 2, 4, 1, SHARED_BYTES[capability])
    attend(head_dim=head_dim, config=config)
    registers, stack = usage(kernels[1], tmp_path)
    assert stack == 0
    assert registers * 32 * config.num_warps * config.programs_per_sm <= 64 << 10
    assert kernels[1].metadata.shared * config.programs_per_sm <= SHARED_BYTES[capability]


def attend(head_dim=128, block_tokens=16, kv_dtype=BF16, queries=1, config=None):
    config = config or DecodeConfig()
    tokens = 2 * queries
    shape = PlanShape(2, tokens, 4096, 32, 8, config.tile_rows, config.tile_keys)
    plan = AttentionPlan.allocate(shape, head_dim, "cpu")
    lengths = torch.full((2,), 4096, dtype=torch.int32)
    starts = torch.tensor([0, queries, tokens], dtype=torch.int32)
    plan.update(lengths, starts if queries > 1 else None)
    scales = torch.ones(4, 2, 8) if kv_dtype == FP8 else None
    pool = KvPool(torch.zeros(4, 2, 8, block_tokens, head_dim).to(kv_dtype), scales)
    q = torch.zeros(tokens, 32, head_dim, dtype=BF16)
    tables = torch.zeros(2, 256, dtype=torch.int32)
    decode_attention(q, pool, tables, plan, q.clone(), torch.zeros(tokens, 32), 0.1, config)


@pytest.mark.parametrize("block_tokens", [16, 64, 128])
def test_decode_attention_streams_16_bytes_a_thread_without_spilling(compiled, block_tokens, tmp_path):
    capability, kernels = compiled
    attend(block_tokens=block_tokens)
    kernel = kernels[1]
    copies = re.findall(
        r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x[0-9a-f]+|\d+)", kernel.asm["ptx"]
    )
    assert copies and {int(size, 0) for size in copies} == {16}
    registers, stack = usage(kernel, tmp_path)
    assert stack == 0
    assert registers * 128 * DecodeConfig().programs_per_sm <= 64 << 10
    assert kernel.metadata.shared * DecodeConfig().programs_per_sm <= SHARED_BYTES[capability]


@pytest.mark.parametrize(
    "options",
    [
        {"queries": 64, "config": DecodeConfig(tile_rows=64)},
        {"queries": 64, "config": DecodeConfig(tile_rows=128, num_warps=8), "block_tokens": 64},
    ],
    ids=["tiles of 64", "tiles of 128"],
)
def test_chunks_compile_without_spilling(compiled, options, tmp_path):
    _, kernels = compiled
    attend(**options)
    assert len(kernels) == 3
    assert usage(kernels[1], tmp_path)[1] == 0


def test_fp8_compiles_where_the_hardware_has_it(compiled):
    capability, kernels = compiled
    if capability < 89:
        pytest.skip("e4m3 needs compute capability 8.9")
    attend(kv_dtype=FP8, block_tokens=16)
    attend(kv_dtype=FP8, block_tokens=64)
    kv_append(
        KvPool(torch.zeros(4, 2, 8, 16, 128).to(FP8), torch.ones(4, 2, 8)),
        *torch.zeros(2, 3, 8, 128, dtype=BF16),
        torch.zeros(3, dtype=torch.int64),
    )
    assert len(kernels) == 7


def test_the_small_kernels_compile(compiled):
    _, kernels = compiled
    x = torch.zeros(3, 4096, dtype=BF16)
    heads = x.view(3, 32, 128)
    angles = torch.zeros(9, 64)
    longs = torch.zeros(3, dtype=torch.int64)
    rms_norm(x, x[0], x.clone(), 1e-5)
    rms_norm(x, x[0], x.clone(), 1e-5, x.clone())
    rope(heads, longs, angles, angles, heads)
    silu_mul(x, x[:, :2048])
    kv_append(KvPool(torch.zeros(4, 2, 32, 16, 128, dtype=BF16)), heads, heads, longs)
    merge_partials(heads[None], torch.zeros(1, 3, 32), heads.clone(), torch.zeros(3, 32))
    decode_merge(heads, heads, heads, heads[None], torch.zeros(1, 3, 32), heads.clone(), 0.1, on_host=True)
    sample(x, torch.ones(3), longs.int(), torch.ones(3), longs, longs, longs)
    greedy(x, longs, torch.zeros(greedy_workspace_size(3, 4096), dtype=torch.int64))
    assert len(kernels) == 10


def test_shortlists_compile_and_spill_nothing_that_counts(compiled, tmp_path):
    _, kernels = compiled
    longs = torch.zeros(1, dtype=torch.int64)
    tokens, values = torch.zeros(1, 65, dtype=torch.int32), torch.zeros(1, 65)
    shortlist(torch.zeros(1, 128256), longs, longs.double(), longs, tokens, values, torch.zeros(1, SUMS))
    chunks, row = (usage(kernel, tmp_path)[1] for kernel in kernels)
    assert chunks == 0
    assert row <= 16  # of one program a row


def test_a_wait_reads_its_flag_anew_each_time_and_a_signal_releases_to_the_system(compiled):
    _, kernels = compiled
    word = torch.zeros(1, dtype=torch.int64)
    signal(word, word, word)
    await_(word, word, word)
    land(word, word)
    stamp(word)
    given, awaited, landed, stamped = (kernel.asm["ptx"] for kernel in kernels)
    assert "sys.release.exch.b64" in given
    loop = awaited[awaited.index("$L__BB0_1:") :]
    assert loop.index("ld.volatile.global") < loop.index("bra")
    assert "ld.volatile.global" in landed and "ld.global" not in landed
    assert "%globaltimer" in stamped


def test_what_meets_by_address_is_moved_in_16_bytes_a_thread_and_ordered_by_its_flags(compiled):
    _, kernels = compiled
    heads = torch.zeros(3, 32, 128, dtype=BF16)
    word, table = torch.zeros(1, dtype=torch.int64), torch.zeros(4, 3, dtype=torch.int64)
    angles = torch.zeros(9, 64)
    rope(heads, word.expand(3), angles, angles, heads.clone(), addresses=table)
    raise_flags(table.flatten(), word, 5, word, (word, word))
    await_flags(table.flatten(), word, 5, word, word)
    direct_merge(heads, heads, heads, table, table, heads.clone(), 0.1)
    pushed, raised, awaited, merged = (kernel.asm["ptx"] for kernel in kernels)
    assert "st.global.v4.b32" in pushed
    assert "sys.release.exch.b64" in raised
    look = awaited.index("ld.volatile.global.b64")
    loop = re.findall(r"^\$(L__BB\d+_\d+):", awaited[:look], re.MULTILINE)[-1]
    assert re.search(rf"bra\s+\${loop};", awaited), "flags are read anew in every round"
    assert look < awaited.index("sys.acquire.add.u64")
    assert re.search(r"ld.volatile.global.v\d", merged)


def project(rows=8, outputs=4096, inner=4096, config=None, gated=False, norm=False, **options):
    x = torch.zeros(rows, inner, dtype=BF16)
    weight = torch.zeros(2 * outputs if gated else outputs, inner, dtype=BF16)
    out = torch.zeros(rows, outputs, dtype=BF16)
    options |= {"norm": x[0]} if norm else {}
    skinny_linear(x, weight, out, config or SkinnyConfig(), SplitMemory(), gated=gated, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": True},
        {"norm": True, "gated": True, "config": SkinnyConfig(num_stages=4)},
        {"add": True, "config": SkinnyConfig(split=4)},
        {"norm": True, "config": SkinnyConfig(128, 64, 4)},
        {"norm": True, "config": SkinnyConfig(32, 256, 2, 4, 2)},
        {"norm": True, "config": SkinnyConfig(32, 256, 1, 4, 4, 4)},
        {"norm": True, "gated": True, "config": SkinnyConfig(16, 512, 2, 3, 4, 4)},
        {"norm": True, "rows": 32},
        {"add": True, "rows": 64, "config": SkinnyConfig(128, 64, 4, 4, 8)},
    ],
    ids=["norm", "gate", "add, split", "wide", "long", "slices", "gate, slices", "32 rows", "64 rows"],
)
def test_weights_stream_16_bytes_a_thread_into_tensor_cores_without_spilling(compiled, options, tmp_path):
    capability, kernels = compiled
    project(**options)
    (kernel,) = kernels
    ptx = kernel.asm["ptx"]
    config = options.get("config", SkinnyConfig())
    copies = re.findall(r"cp\.async\.cg\.shared\.global \[.*?\], \[.*?\], 0x10", ptx)
    vectors = config.block_n * config.block_k // 8 // (32 * config.num_warps) * (1 + ("gated" in options))
    assert len(copies) >= vectors * config.num_stages
    assert ("wgmma" if capability == 90 and options.get("rows", 8) > 8 else "mma.sync") in ptx
    assert usage(kernel, tmp_path)[1] == 0
    assert kernel.metadata.shared <= SHARED_BYTES[capability]


def test_an_early_launch_touches_nothing_but_weights_before_it_waits(compiled):
    capability, kernels = compiled
    if capability < 90:
        pytest.skip("launches depend on the end of the one before")
    project(gated=True, norm=True, config=SkinnyConfig(split=2, num_stages=4, early=1))
    project(gated=True, norm=True, config=SkinnyConfig(split=2, num_stages=4))
    early, late = (kernel.asm["ptx"] for kernel in kernels)
    before, after = early.split("griddepcontrol.wait")
    assert before.count("prefetch.global.L2") == 2 * 3 * 2  # tiles, stages ahead, lines of a tile's row
    assert not re.search(r"ld\.global|cp\.async|st\.global|atom", before) and "cp.async" in after
    assert "griddepcontrol" not in late and "prefetch" not in late
    assert [kernel.metadata.launch_pdl for kernel in kernels] == [True, False]


def test_the_parts_of_a_tile_are_counted_once_all_threads_have_left_theirs(compiled):
    _, kernels = compiled
    project(config=SkinnyConfig(split=4))
    ptx = kernels[0].asm["ptx"]
    counted = ptx.index("atom.global.gpu.acq_rel.add.u32")
    assert ptx.rindex("st.global", 0, counted) < ptx.rindex("bar.sync", 0, counted)
    assert ptx.count("ld.global.cg") >= 4
    assert not re.search(r"atom\S*\.f32|red\S*\.f32", ptx)
