"""A lane's frames as tensors, without copies.

A decode step meets the same frames with the same sizes in every layer, so the tensors over them are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from flume_common.lanes import Frame
from flume_common.layout import KvLayout
from flume_kernels.dtypes import DTYPES
from torch import Tensor

T = TypeVar("T")
# Frames times sizes. Making the tensors of a frame costs 5 us.
_MAX_CACHED = 128


class FrameTensors:
    """Frames of one lane, which must outlive this."""

    def __init__(self, layout: KvLayout) -> None:
        self._layout = layout
        self._dtype = DTYPES[layout.dtype]
        self._cached: dict[tuple[int, int], object] = {}

    def query_bytes(self, tokens: int) -> int:
        """Bytes of a QUERY body, and of o in a PARTIAL body."""
        layout = self._layout
        return tokens * layout.num_query_heads * layout.head_dim * layout.itemsize

    def partial_bytes(self, tokens: int) -> int:
        """Bytes of a PARTIAL body: o, then lse in float32."""
        return self.query_bytes(tokens) + 4 * tokens * self._layout.num_query_heads

    def queries(self, frame: Frame, tokens: int) -> Tensor:
        """A QUERY frame as [tokens, query_heads, head_dim]."""
        return self._kept(frame, tokens, self._queries)

    def partial(self, frame: Frame, tokens: int) -> tuple[Tensor, Tensor]:
        """A PARTIAL frame as o [tokens, query_heads, head_dim] and lse [tokens, query_heads] float32."""
        return self._kept(frame, tokens, self._partial)

    def appended(self, frame: Frame, layers: int, tokens: int) -> Tensor:
        """A KV or PULLED frame as [layers, 2, tokens, kv_heads, head_dim]."""
        layout = self._layout
        size = layers * tokens * layout.layer_token_bytes
        flat = torch.from_numpy(frame.body[:size]).view(self._dtype)
        return flat.view(layers, 2, tokens, layout.num_kv_heads, layout.head_dim)

    def _queries(self, frame: Frame, tokens: int) -> Tensor:
        flat = torch.from_numpy(frame.body[: self.query_bytes(tokens)]).view(self._dtype)
        return flat.view(tokens, self._layout.num_query_heads, self._layout.head_dim)

    def _partial(self, frame: Frame, tokens: int) -> tuple[Tensor, Tensor]:
        body = frame.body[self.query_bytes(tokens) : self.partial_bytes(tokens)]
        lse = torch.from_numpy(body).view(torch.float32).view(tokens, self._layout.num_query_heads)
        return self._queries(frame, tokens), lse

    def _kept(self, frame: Frame, tokens: int, make: Callable[[Frame, int], T]) -> T:
        key = id(frame), tokens
        tensors = self._cached.get(key)
        if tensors is None:
            if len(self._cached) >= _MAX_CACHED:
                self._cached.clear()
            tensors = self._cached[key] = make(frame, tokens)
        return tensors  # type: ignore[return-value]  # a frame belongs to one kind
