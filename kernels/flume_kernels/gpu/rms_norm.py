"""Root-mean-square norm, with the residual stream added first when there is one.

    out = x · weight / √(mean(x²) + eps)

With a residual, x is first added to it in place, rounded to its dtype, and the norm is that of the rounded
sum, as a model that adds and norms in two steps computes it. Everything else is float32 until the store.
`reference.rms_norm` is the definition.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [rows, HIDDEN]
    weight_ptr,  # [HIDDEN]
    residual_ptr,  # [rows, HIDDEN], written, when HAS_RESIDUAL
    out_ptr,  # [rows, HIDDEN]
    x_stride,
    residual_stride,
    out_stride,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,  # next power of two >= HIDDEN
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < HIDDEN
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_at = residual_ptr + row * residual_stride + cols
        x += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / HIDDEN + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * out_stride + cols, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside
    )


def rms_norm(x: Tensor, weight: Tensor, out: Tensor, eps: float, residual: Tensor | None = None) -> None:
    """out = norm(x), or residual += x and out = norm(residual). Queues one kernel on the current stream.

    x, out, residual [rows, hidden] of any float dtypes and row strides; weight [hidden]. `out` may be `x`.
    Raises ValueError for shapes that do not fit or rows that are not contiguous.
    """
    rows, hidden = x.shape
    tensors = [x, out] if residual is None else [x, out, residual]
    if any(tensor.shape != (rows, hidden) or tensor.stride(1) != 1 for tensor in tensors):
        raise ValueError(f"each must be [{rows}, {hidden}] with contiguous rows")
    if weight.shape != (hidden,) or weight.stride(0) != 1:
        raise ValueError(f"weight must be contiguous [{hidden}], got {tuple(weight.shape)}")
    if rows:
        block = triton.next_power_of_2(hidden)
        _rms_norm_kernel[(rows,)](
            x, weight, residual if residual is not None else x, out,
            x.stride(0), residual.stride(0) if residual is not None else 0, out.stride(0), eps,
            HIDDEN=hidden, BLOCK=block, HAS_RESIDUAL=residual is not None,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
