"""How fast this card reads its memory: what every other figure is compared with."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flume_kernels.gpu.timing import graph_seconds


@triton.jit
def _read_kernel(in_ptr, out_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for at in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        total += tl.load(in_ptr + at + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def read_bandwidth() -> float:
    """Bytes per second of the best of some grids reading 4 GiB once."""
    words = torch.randint(0, 100, (1 << 30,), dtype=torch.int32, device="cuda")
    sums = torch.empty(1 << 16, dtype=torch.int32, device="cuda")
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    seconds = []
    for per_sm in (2, 4, 8, 16):
        for block, warps in ((4096, 8), (2048, 4)):
            run = lambda p=per_sm, b=block, w=warps: _read_kernel[(programs * p,)](  # noqa: E731
                words, sums, words.numel(), BLOCK=b, num_warps=w
            )
            seconds.append(graph_seconds(run, calls=2))
    return float(words.numel() * 4 / min(seconds))
