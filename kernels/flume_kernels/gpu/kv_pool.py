"""The keys and values of one attention node in device memory.

    pool [layers, blocks, 2, kv_heads, block_tokens, head_dim]

One block of one layer is contiguous with K before V, so a KV head's share of it is block_tokens · head_dim
elements in one piece (4 KiB at 16 tokens of 128 in bf16), which random blocks still read at the memory's
pace, and the heads of a block, read by programs that run side by side, share its pages in the translation
cache. A layer of a range is pulled by blocks, each one piece.

In fp8 (e4m3) a stored element times its scale is the value. Scales are float32 [layers, blocks, 2,
kv_heads]; for one scale per head expand them over the blocks (stride 0). They must be set before the first
token of a block is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
KV_DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8)


@dataclass(frozen=True, slots=True)
class KvPool:
    """One layer's view of the pool. kv [blocks, 2, kv_heads, block_tokens, head_dim]; scales [blocks, 2,
    kv_heads].

    Raises ValueError for another rank or dtype, rows that are not contiguous, or fp8 without scales.
    """

    kv: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kv.dim() != 5 or self.kv.shape[1] != 2:
            raise ValueError(f"kv must be [blocks, 2, kv_heads, block_tokens, head_dim], got {self.kv.shape}")
        if self.kv.dtype not in KV_DTYPES:
            raise ValueError(f"kv dtype {self.kv.dtype} is not one of {KV_DTYPES}")
        if self.kv.stride()[-2:] != (self.head_dim, 1):
            raise ValueError(f"a head's tokens must be contiguous, strides are {self.kv.stride()}")
        if (self.kv.dtype == FP8) != (self.scales is not None):
            raise ValueError(f"scales go with fp8 only and always, kv is {self.kv.dtype}")
        if self.scales is not None and (
            self.scales.shape != self.kv.shape[:3] or self.scales.dtype is not torch.float32
        ):
            expected = tuple(self.kv.shape[:3])
            raise ValueError(
                f"scales must be float32 {expected}, got {self.scales.dtype} {self.scales.shape}"
            )

    @property
    def num_kv_heads(self) -> int:
        return self.kv.shape[2]

    @property
    def block_tokens(self) -> int:
        return self.kv.shape[3]

    @property
    def head_dim(self) -> int:
        return self.kv.shape[4]
