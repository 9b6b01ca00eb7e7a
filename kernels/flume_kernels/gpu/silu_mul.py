"""The gate of a feed-forward block: silu(gate) · up, gate and up being the halves of one projection.

Computed in float32. `reference.silu_mul` is the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, in_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate_at = gate_up_ptr + row * in_stride + cols
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    # The sigmoid of a very negative gate is 1 / (1 + inf) = 0, not nan.
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """gate_up [rows, 2 · width], gate first -> out [rows, width]; rows contiguous, any row strides.

    Queues one kernel on the current stream. Raises ValueError when shapes or strides do not fit.
    """
    rows, double = gate_up.shape
    width = double // 2
    if double % 2 or out.shape != (rows, width):
        raise ValueError(f"gate_up {tuple(gate_up.shape)} and out {tuple(out.shape)} do not fit")
    if gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("rows must be contiguous")
    if rows:
        _silu_mul_kernel[(rows, triton.cdiv(width, BLOCK))](
            gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=BLOCK, num_warps=4
        )
