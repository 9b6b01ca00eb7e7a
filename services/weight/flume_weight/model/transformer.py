"""The dense path of a decoder of the Llama family: norms, projections, FFN, logits.

It holds no KV and knows no sequences: rows are tokens of any number of sequences, and attention is
whatever is passed in. Numerics follow transformers' reference models.
"""

from __future__ import annotations

import torch
from flume_common.layout import KvLayout
from torch import Tensor
from torch.nn import functional as F

from flume_weight.model.attention import Attention
from flume_weight.model.config import ModelConfig
from flume_weight.model.rope import RopeTable
from flume_weight.model.weights import Layer, Weights


class Transformer:
    """Parameters and the forward pass over them; stateless between passes."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.dtype = weights.embedding.dtype
        self._weights = weights
        self._rope = RopeTable(config, self.dtype, weights.embedding.device)
        self._query_shape = (-1, config.num_query_heads, config.head_dim)
        self._kv_shape = (-1, 2 * config.num_kv_heads, config.head_dim)

    @property
    def weights(self) -> Weights:
        """The parameters themselves: a step that is captured computes with them in an order of its own."""
        return self._weights

    def layout(self, block_tokens: int = 16) -> KvLayout:
        """How the KV of this model lies in memory."""
        return self.config.layout(str(self.dtype).removeprefix("torch."), block_tokens)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention, logit_rows: Tensor
    ) -> Tensor:
        """token_ids, positions int64 [T]; logit_rows int64 [R] -> float32 logits [R, vocab].

        Raises IndexError for a token id outside the vocabulary or a position outside the context.
        """
        hidden = F.embedding(token_ids, self._weights.embedding)
        rope = self._rope.at(positions)
        for number, layer in enumerate(self._weights.layers):
            hidden = self._attend(number, layer, hidden, rope, attention)
            hidden = self._feed_forward(layer, hidden)
        return self._logits(hidden.index_select(0, logit_rows))

    def _attend(
        self, number: int, layer: Layer, hidden: Tensor, rope: tuple[Tensor, Tensor], attention: Attention
    ) -> Tensor:
        x = self._norm(hidden, layer.input_norm)
        q = layer.query(x).view(self._query_shape)
        if layer.query_norm is not None:
            q = self._norm(q, layer.query_norm)
        q = self._rope.rotate(q, rope)
        attention.query(number, q)
        kv = layer.kv(x).view(self._kv_shape)
        k, v = kv.chunk(2, dim=1)
        if layer.key_norm is not None:
            k = self._norm(k, layer.key_norm)
        k = self._rope.rotate(k, rope)
        mixed = attention.attend(number, q, k, v)
        return layer.output(mixed).add_(hidden)

    def _feed_forward(self, layer: Layer, hidden: Tensor) -> Tensor:
        x = self._norm(hidden, layer.post_norm)
        gate, up = layer.gate_up(x).chunk(2, dim=-1)
        return layer.down(F.silu(gate).mul_(up)).add_(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._weights.head(self._norm(hidden, self._weights.final_norm)).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)
