"""One decode step, queries first: what a captured step records.

Per layer and microbatch

    norm, Q, RoPE, signal                             the queries leave: see `hops`
    K, V, RoPE; K and V into their buffer             while the queries are under way
    wait, merge, O, norm, gate and up, SiLU, down     once the partials are here

The products take in what stands beside them, norm, SiLU and the sum into the residual stream, where that is
the faster way: `products`.

K and V of a layer are in place when the next signal is given, so they travel with the next layer's queries;
one more signal follows the last layer's. With several microbatches each asks about its next layer as soon as
its answer is worked in, so that the others' turn comes while it waits. At the end the logits are looked
through for what the samplers asked, so that the host need not.

Each row is one token of one sequence. Its part of attention that lies in no range is the token itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flume_kernels.gpu.device import Device
from torch import Tensor
from torch.nn import functional as F

from flume_weight.cuda.hops import hop_of
from flume_weight.cuda.ops import Angles, Ops
from flume_weight.cuda.products import Normed
from flume_weight.cuda.step_buffers import MicrobatchBuffers, StepBuffers
from flume_weight.model.config import ModelConfig
from flume_weight.model.linear import Linear
from flume_weight.model.weights import Layer, Weights


@dataclass(slots=True)
class _Stream:
    """A microbatch on its way through the layers. `hidden` is its residual stream, updated in place."""

    number: int
    buffers: MicrobatchBuffers
    positions: Tensor
    hidden: Tensor
    asked: tuple[Tensor, Tensor, Tensor] | None = None  # q, k, v of the layer under way


class DecodeStep:
    """The dense path over one set of buffers. Calling it queues a step on the device's stream."""

    def __init__(
        self,
        device: Device,
        ops: Ops,
        config: ModelConfig,
        weights: Weights,
        angles: Angles,
        buffers: StepBuffers,
    ) -> None:
        self._device = device
        self._ops = ops
        self._config = config
        self._weights = weights
        self._angles = angles
        self._buffers = buffers
        self._flags = buffers.flags
        self._hop = hop_of(device, ops, angles, buffers)
        self._ended = 2 * buffers.size.microbatches  # the number of the last flag
        self._asks = buffers.shortlists.asks  # of the step under way, on the device

    @torch.inference_mode()
    def __call__(self) -> None:
        hidden, streams = self._begin()
        for stream in streams:
            self._ask(stream, 0)
        for layer in range(self._config.num_layers):
            for stream in streams:
                self._answer(stream, layer)
                if layer + 1 < self._config.num_layers:
                    self._ask(stream, layer + 1)
        self._finish(hidden)

    def _begin(self) -> tuple[Tensor, list[_Stream]]:
        """The residual stream of all rows, and the microbatches, which share it."""
        where = self._weights.embedding.device
        inputs = self._buffers.inputs.to(where, non_blocking=True)
        positions, self._asks = inputs[1], inputs[2:]
        self._hop.begin(where)
        hidden = F.embedding(inputs[0], self._weights.embedding)
        return hidden, [
            _Stream(number, microbatch, positions[microbatch.rows], hidden[microbatch.rows])
            for number, microbatch in enumerate(self._buffers.microbatches)
        ]

    def _ask(self, stream: _Stream, number: int) -> None:
        layer, buffers = self._weights.layers[number], stream.buffers
        x = self._normed(stream.hidden, layer.input_norm)
        q = self._heads(layer.query, x, layer.query_norm)
        turned = self._hop.ask(stream.number, number, q, stream.positions)
        k, v = self._keys(stream, layer, x, buffers.keys[number])
        if number + 1 == self._config.num_layers:
            self._signal(stream)
        stream.asked = turned, k, v

    def _keys(self, stream: _Stream, layer: Layer, x: Normed, out: Tensor) -> tuple[Tensor, Tensor]:
        kv_heads, dim = self._config.num_kv_heads, self._config.head_dim
        k, v = self._ops.linear(layer.kv, x).view(-1, 2 * kv_heads, dim).chunk(2, dim=1)
        if layer.key_norm is not None:
            k = self._norm_heads(k, layer.key_norm)
        turned = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        self._ops.rope_keys(k, v, stream.positions, self._angles, turned, out)
        return turned, v

    def _answer(self, stream: _Stream, number: int) -> None:
        layer = self._weights.layers[number]
        assert stream.asked is not None
        mixed = self._hop.answer(stream.number, number, *stream.asked)
        self._ops.linear_add(layer.output, mixed.flatten(1), stream.hidden)
        inner = self._ops.gate(layer.gate_up, self._normed(stream.hidden, layer.post_norm))
        self._ops.linear_add(layer.down, inner, stream.hidden)

    def _finish(self, hidden: Tensor) -> None:
        x = self._normed(hidden, self._weights.final_norm)
        self._buffers.logits.copy_(self._ops.linear(self._weights.head, x))
        self._ops.shortlist(self._buffers.logits, self._asks, self._buffers.shortlists)
        self._device.signal(self._flags, self._ended)

    def _signal(self, stream: _Stream) -> None:
        self._device.signal(self._flags, self._buffers.signal_of(stream.number))

    def _normed(self, hidden: Tensor, weight: Tensor) -> Normed:
        return Normed(hidden, weight, self._config.rms_norm_eps)

    def _heads(self, project: Linear, x: Normed, norm: Tensor | None) -> Tensor:
        q = self._ops.linear(project, x).view(-1, self._config.num_query_heads, self._config.head_dim)
        return q if norm is None else self._norm_heads(q, norm)

    def _norm_heads(self, x: Tensor, weight: Tensor) -> Tensor:
        flat = x.reshape(-1, self._config.head_dim)
        return self._ops.rms_norm(flat, weight, self._config.rms_norm_eps).view(x.shape)
