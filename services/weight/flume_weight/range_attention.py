"""Attention of one step over ranges that other nodes hold: send queries, attend locally, merge partials.

The local part is the tokens of this very step: one per decoding sequence (its output is its value),
a causal chunk per prefilling one. Everything older lies on attention nodes, whose partials are merged
by their log-sum-exp (design §4):  M = max lse_i;  w_i = exp(lse_i - M);  o = Σ w_i o_i / Σ w_i.
Partials are folded in the order of the nodes' names, so a run repeats itself bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from flume_common.engine_progress import ProgressPage
from flume_common.lanes import Frame, LaneDown, Port, Receiver, Sender
from flume_common.layout import KvLayout
from flume_common.wire import Header, Kind
from flume_kernels.dtypes import DTYPES
from flume_kernels.merge import merge_into
from flume_kernels.partial_attention import causal_attention
from torch import Tensor

from flume_weight import faults
from flume_weight.errors import PeerLost, PeerSilent
from flume_weight.peer import Peer

Index = slice | Tensor
_LOOK_EVERY_S = 1.0


@dataclass(slots=True)
class Exchange:
    """One attention node's part in one step. Token positions count within the step's batch."""

    peer: Peer
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)  # of the PLAN
    queries: Index = field(default_factory=lambda: slice(0, 0))
    num_queries: int = 0
    append: slice = field(default_factory=lambda: slice(0, 0))
    layers_per_kv: int = 0
    second_rows: int = 0  # of `rows`, the last ones: those of the step's second microbatch

    @property
    def num_appended(self) -> int:
        return int(self.append.stop - self.append.start)


class _Views:
    """Torch views of a lane's frames, made once per frame."""

    def __init__(self, layout: KvLayout) -> None:
        self._dtype = DTYPES[layout.dtype]
        self._layout = layout
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, frame: Frame) -> tuple[Tensor, Tensor]:
        """The body as the layout's dtype, and as float32."""
        views = self._cache.get(id(frame))
        if views is None:
            body = torch.from_numpy(frame.body)
            views = self._cache[id(frame)] = (body.view(self._dtype), body.view(torch.float32))
        return views

    def partial(self, frame: Frame, tokens: int) -> tuple[Tensor, Tensor]:
        """o [tokens, query_heads, head_dim] and lse [tokens, query_heads] of a PARTIAL."""
        typed, floats = self.of(frame)
        heads, dim = self._layout.num_query_heads, self._layout.head_dim
        size = tokens * heads * dim
        at = size * self._layout.itemsize // 4
        return typed[:size].view(tokens, heads, dim), floats[at : at + tokens * heads].view(tokens, heads)


class RangeAttention:
    """The `Attention` of a step (see `flume_weight.model`), over the lanes of its exchanges."""

    def __init__(
        self,
        port: Port,
        layout: KvLayout,
        scale: float,
        timeout_s: float,
        may_leave: Callable[[str], bool] = lambda node: False,
    ) -> None:
        """`may_leave`: whether anybody could go on without this node, should it not answer."""
        self._port = port
        self._layout = layout
        self._scale = scale
        self.timeout_s = timeout_s  # a node that has not answered by then is lost
        self.may_leave = may_leave
        self.progress = ProgressPage()  # of the engine, where there is one
        self._layer_delay_s = faults.prefill_layer_delay_s()
        self._views: dict[Peer, _Views] = {}
        self._kv_frames: dict[Peer, Frame] = {}
        self._exchanges: Sequence[Exchange] = ()
        self._chunks: Sequence[slice] = ()
        self._step = 0
        self.epoch = 0  # our fencing number, on every message

    def begin(
        self, step: int, exchanges: Sequence[Exchange], chunks: Sequence[slice], direct: bool = False
    ) -> None:
        """Send the PLANs. `chunks` are the batch's prefill rows of more than one token; `direct`: whoever is
        asked is asked through its region.

        Raises PeerLost or PeerSilent.
        """
        self._step = step
        self._exchanges, self._chunks = exchanges, chunks
        self._kv_frames.clear()
        for exchange in exchanges:
            self.send_plan(exchange, direct and exchange.num_queries > 0)

    def send_plan(self, exchange: Exchange, direct: bool = False) -> None:
        """A PLAN of this step, in as many messages as its ops need. Raises PeerLost or PeerSilent."""
        peer, sent = exchange.peer, False
        while not sent:
            frame = self._await_frame(peer, peer.plan_frame)
            sent = peer.send_plan(
                frame, self._step, self.epoch, exchange.rows, exchange.layers_per_kv,
                second_rows=exchange.second_rows, direct=direct,
            )  # fmt: skip

    def forget(self, peer: Peer) -> None:
        """The lane is closed: its frames are not ours any more."""
        self._views.pop(peer, None)
        self._kv_frames.pop(peer, None)

    def query(self, layer: int, q: Tensor) -> None:
        """q [T, query_heads, head_dim] leaves before K and V exist: nobody remote needs them now."""
        self.progress.reached(layer)
        if self._layer_delay_s and any(faults.is_slowed(chunk) for chunk in self._chunks):
            time.sleep(self._layer_delay_s)
        for exchange in self._exchanges:
            if not exchange.num_queries:
                continue
            sender = exchange.peer.lane.sender(Kind.QUERY)
            frame = self._await_frame(exchange.peer, sender.frame)
            body, _ = self._views_of(exchange.peer).of(frame)
            target = body[: exchange.num_queries * q.shape[1] * q.shape[2]].view(-1, *q.shape[1:])
            if isinstance(exchange.queries, slice):
                target.copy_(q[exchange.queries])
            else:
                torch.index_select(q, 0, exchange.queries, out=target)
            frame.header[Header.LAYER] = layer
            self._send(exchange.peer, sender, frame, target.numel() * target.element_size())
        self._port.progress()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, query_heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, query_heads * head_dim]."""
        self.progress.beat()
        self._store(layer, k, v)
        o, lse = self._local(q, k, v)
        for exchange in self._exchanges:
            if exchange.num_queries:
                self._fold(exchange, layer, o, lse)
        return o.view(len(q), -1).to(q.dtype)

    def finish(self) -> list[PeerLost]:
        """Send the last KV messages, which commit the step. A lane that fails here does not undo it."""
        lost: list[PeerLost] = []
        for exchange in self._exchanges:
            if exchange.num_appended:
                try:
                    self._send_kv(exchange, self._layout.num_layers)
                except PeerLost as error:
                    lost.append(error.bare())
        return lost

    def _local(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (float32) and log-sum-exp over the tokens of this step alone."""
        tokens, heads, dim = q.shape
        kv_heads = k.shape[1]
        grouped = q.view(tokens, kv_heads, heads // kv_heads, dim)
        # One token attends to itself: its output is its value.
        o = v.unsqueeze(2).expand_as(grouped).to(torch.float32, copy=True).view(tokens, heads, dim)
        lse = torch.matmul(grouped.float(), k.float().unsqueeze(-1)).view(tokens, heads) * self._scale
        for chunk in self._chunks:
            o[chunk], lse[chunk] = causal_attention(q[chunk], k[chunk], v[chunk], self._scale)
        return o, lse

    def _fold(self, exchange: Exchange, layer: int, o: Tensor, lse: Tensor) -> None:
        receiver, frame = self._await_partial(exchange.peer, layer)
        part_o, part_lse = self._views_of(exchange.peer).partial(frame, exchange.num_queries)
        merge_rows(o, lse, part_o, part_lse, exchange.queries)
        receiver.give_back(frame)

    def _await_partial(self, peer: Peer, layer: int) -> tuple[Receiver, Frame]:
        receiver = peer.lane.receiver(Kind.PARTIAL)
        found: list[Frame] = []

        def arrived() -> bool:
            while (frame := receiver.poll()) is not None:
                ours = frame.header[Header.STEP] == self._step and frame.header[Header.LAYER] == layer
                if peer.accepts(frame) and ours:
                    found.append(frame)
                    return True
                receiver.give_back(frame)  # of a step that was abandoned
            return peer.hear()  # a refusal raises; anything else: look again

        while not found:
            self._wait(peer, arrived)
        return receiver, found[0]

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        for exchange in self._exchanges:
            if not exchange.num_appended:
                continue
            first = layer % exchange.layers_per_kv
            if first == 0 and layer > 0:
                self._send_kv(exchange, layer)
            target = self._kv_view(exchange)[first]
            target[0].copy_(k[exchange.append])
            target[1].copy_(v[exchange.append])

    def _kv_view(self, exchange: Exchange) -> Tensor:
        """[layers_per_kv, 2, appended, kv_heads, head_dim] of the KV frame being filled."""
        peer = exchange.peer
        frame = self._kv_frames.get(peer)
        if frame is None:
            frame = self._await_frame(peer, peer.lane.sender(Kind.KV).frame)
            self._kv_frames[peer] = frame
        layout = self._layout
        shape = (exchange.layers_per_kv, 2, exchange.num_appended, layout.num_kv_heads, layout.head_dim)
        body, _ = self._views_of(peer).of(frame)
        size = exchange.layers_per_kv * exchange.num_appended * layout.layer_token_bytes // layout.itemsize
        return body[:size].view(shape)

    def _send_kv(self, exchange: Exchange, layer_end: int) -> None:
        peer, count = exchange.peer, exchange.layers_per_kv
        first = (layer_end - 1) // count * count
        frame = self._kv_frames.pop(peer)
        frame.header[Header.LAYER] = first
        frame.header[Header.LAYER_END] = layer_end
        size = (layer_end - first) * exchange.num_appended * self._layout.layer_token_bytes
        self._send(peer, peer.lane.sender(Kind.KV), frame, size)
        if layer_end == self._layout.num_layers:
            peer.kv_sent_step = self._step

    def _send(self, peer: Peer, sender: Sender, frame: Frame, body_bytes: int) -> None:
        frame.header[Header.STEP] = self._step
        frame.header[Header.EPOCH] = self.epoch
        try:
            sender.send(frame, body_bytes)
        except LaneDown as error:
            raise PeerLost(peer.node, str(error)) from error

    def _await_frame(self, peer: Peer, take: Callable[[], Frame | None]) -> Frame:
        found: list[Frame] = []

        def free() -> bool:
            frame = take()
            if frame is not None:
                found.append(frame)
            return frame is not None

        while not found:
            self._wait(peer, free)
        return found[0]

    def _wait(self, peer: Peer, ready: Callable[[], bool]) -> None:
        patience_s = min(peer.patience_s, self.timeout_s)
        try:
            if ready():
                return
            self.progress.await_node(True)
            if self._ready_within(ready, patience_s):
                return
            if self.may_leave(peer.node):
                raise PeerSilent(peer.node, time.monotonic() - patience_s)
            if self._ready_within(ready, self.timeout_s - patience_s):
                return
        except LaneDown as error:
            raise PeerLost(peer.node, str(error)) from error
        finally:
            self.progress.await_node(False)
        raise no_answer(peer.node, self.timeout_s)

    def _ready_within(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Wait for a node, and go on saying that it is the node that is waited for."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > _LOOK_EVERY_S:
            if self._port.wait(ready, _LOOK_EVERY_S):
                return True
            self.progress.beat()
        return self._port.wait(ready, max(left_s, 0.0))

    def _views_of(self, peer: Peer) -> _Views:
        views = self._views.get(peer)
        if views is None:
            views = self._views[peer] = _Views(self._layout)
        return views


def no_answer(node: str, timeout_s: float) -> PeerLost:
    return PeerLost(node, f"no answer within {timeout_s:g} s")


def merge_rows(o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor, rows: Index) -> None:
    """Fold a partial of these rows into o [T, query_heads, head_dim] and lse [T, query_heads], in place."""
    if isinstance(rows, slice):
        merge_into(o[rows], lse[rows], part_o, part_lse)
        return
    some_o, some_lse = o.index_select(0, rows), lse.index_select(0, rows)
    merge_into(some_o, some_lse, part_o, part_lse)
    o.index_copy_(0, rows, some_o)
    lse.index_copy_(0, rows, some_lse)
