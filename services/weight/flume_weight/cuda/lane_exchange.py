"""A captured step's messages over lanes, without ever waiting: the step's `driver.StepExchange`.

Rows of the step and rows of its buffers are the same; a microbatch asks those nodes that know of its rows.
Each attention node asked about a row fills one of the row's parts, in order of the nodes' names. Queries are
copied from the buffer into a frame per lane, as each node gets only its rows. Keys of a layer leave once they
are there from every microbatch, as frames become free, those of the last layers only in `finish`: they commit
the step on the nodes, and until it is over it may fail here.

On a 2.6 GHz core, UCX left out, 8 rows of 32 heads of 128 in bf16 take 3 us from a flag to the send and 3 us
from a partial to its gate; 32 rows over four nodes 12 and 13.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from flume_common.lanes import Frame, LaneDown, Port
from flume_common.layout import KvLayout
from flume_common.wire import Header, Kind
from flume_kernels.dtypes import DTYPES
from torch import Tensor

from flume_weight.cuda.errors import RouteTooWide
from flume_weight.cuda.step_buffers import MicrobatchBuffers, StepBuffers
from flume_weight.errors import PeerLost, PeerSilent
from flume_weight.peer import Peer
from flume_weight.range_attention import Exchange, Index

T = TypeVar("T")

ROUNDS_PER_LOOK = 1024  # some milliseconds; a look costs system calls, a round none
_ANSWERS = (Header.STEP, Header.LAYER, Header.MICROBATCH)
MOST_VIEWS = 128  # of a lane's frames, by how many queries they hold


@dataclass(slots=True)
class _Asked:
    """One attention node's queries of a microbatch: which of its rows, and which of each row's parts it
    fills."""

    peer: Peer
    microbatch: int
    buffers: MicrobatchBuffers
    count: int
    rows: Index
    parts: Tensor  # int64 [count]
    block: _Block | None  # where all rows and parts lie side by side
    awaits: int | None = None  # the layer that it has been asked about and has not answered
    asked_s: float = 0.0  # when

    def take(self, out: Tensor) -> None:
        """This node's queries into out [count, heads, dim]."""
        if self.block is not None:
            out.copy_(self.block.queries)
        else:
            torch.index_select(self.buffers.queries, 0, _indices(self.rows), out=out)

    def put(self, o: Tensor, lse: Tensor) -> None:
        """Its partial o [count, heads, dim], lse [count, heads] to where the step merges it."""
        if self.block is not None:
            self.block.o.copy_(o)
            self.block.lse.copy_(lse)
        else:
            self.buffers.part_o[self.parts, _indices(self.rows)] = o
            self.buffers.part_lse[self.parts, _indices(self.rows)] = lse


@dataclass(frozen=True, slots=True)
class _Block:
    """One node's rows of a microbatch's buffers where one view each is all of them."""

    queries: Tensor
    o: Tensor
    lse: Tensor


@dataclass(slots=True)
class _Keys:
    """K and V of layers [first, end) for one attention node, not sent yet."""

    exchange: Exchange
    first: int
    end: int


class LaneExchange:
    """One step at a time, between `begin` and `finish`."""

    def __init__(self, port: Port, layout: KvLayout) -> None:
        self._port = port
        self._layout = layout
        self._dtype = DTYPES[layout.dtype]
        self._query_shape = (layout.num_query_heads, layout.head_dim)
        self._query_elements = layout.num_query_heads * layout.head_dim
        self._views: dict[Peer, dict[tuple[int, int], object]] = {}
        self._step = 0
        self._microbatches: Sequence[MicrobatchBuffers] = ()
        self._asked: list[_Asked] = []
        self._asked_by: list[list[_Asked]] = []  # by microbatch
        self._appending: list[Exchange] = []
        self._unsent: deque[_Keys] = deque()
        self._rounds = 0
        self.epoch = 0  # our fencing number, on every message
        self.may_leave: Callable[[str], bool] = _never_leave  # as in RangeAttention

    def begin(self, step: int, exchanges: Sequence[Exchange], buffers: StepBuffers) -> None:
        """The messages of this step; its PLANs are the caller's to send, with `second_rows` as it is then.

        Raises RouteTooWide.
        """
        self._asked = _asked(exchanges, buffers)
        self._step = step
        self._microbatches = buffers.microbatches
        self._asked_by = [
            [asked for asked in self._asked if asked.microbatch == number]
            for number in range(len(self._microbatches))
        ]
        self._appending = [exchange for exchange in exchanges if exchange.num_appended]
        self._unsent.clear()
        for exchange in exchanges:
            exchange.second_rows = _second_rows(exchange, buffers)

    def forget(self, peer: Peer) -> None:
        """The lane is closed: its frames are not ours any more."""
        self._views.pop(peer, None)

    @property
    def silent(self) -> list[Peer]:
        """Who has not answered what it was asked."""
        return [asked.peer for asked in self._asked if asked.awaits is not None]

    def progress(self) -> None:
        self._rounds += 1
        if self._rounds % ROUNDS_PER_LOOK:
            self._port.progress()
        else:
            self._port.wait(_never, 0.0)  # also looks whether a peer's process has ended
            self._leave_silent()
        if self._unsent:
            self._send_keys()

    def _leave_silent(self) -> None:
        """Raises PeerSilent for a node that others should not wait for any longer."""
        now = time.monotonic()
        for asked in self._asked:
            peer, waited_s = asked.peer, now - asked.asked_s
            if asked.awaits is not None and waited_s > peer.patience_s and self.may_leave(peer.node):
                raise PeerSilent(peer.node, asked.asked_s)

    def query(self, microbatch: int, layer: int) -> None:
        now = time.monotonic()
        for asked in self._asked_by[microbatch]:
            frame = self._free(asked.peer, Kind.QUERY)
            if frame is None:  # what it has answered has left the frames: these are of abandoned steps
                raise PeerLost(asked.peer.node, "took none of the last queries")
            asked.take(self._queries(asked, frame))
            frame.header[Header.LAYER], frame.header[Header.MICROBATCH] = layer, microbatch
            self._send(asked.peer, Kind.QUERY, frame, asked.count * self._query_elements)
            asked.awaits, asked.asked_s = layer, now
        self._port.progress()

    def keys(self, microbatch: int, layer: int) -> None:
        if microbatch + 1 < len(self._microbatches):
            return  # they come in turn: the others' of this layer follow
        end = layer + 1
        for exchange in self._appending:
            if end % exchange.layers_per_kv == 0 and end < self._layout.num_layers:
                self._unsent.append(_Keys(exchange, end - exchange.layers_per_kv, end))
        self._send_keys()

    def arrived(self, microbatch: int, layer: int) -> bool:
        for asked in self._asked_by[microbatch]:
            if asked.awaits is not None:
                self._take(asked.peer)
        return all(asked.awaits is None for asked in self._asked_by[microbatch])

    def finish(self, timeout_s: float) -> list[PeerLost]:
        """Send what is left of the keys, which commits the step. Who fails here does not undo it."""
        last = self._layout.num_layers
        for exchange in self._appending:
            first = (last - 1) // exchange.layers_per_kv * exchange.layers_per_kv
            self._unsent.append(_Keys(exchange, first, last))
        lost: list[PeerLost] = []
        while self._unsent:
            try:
                if not self._port.wait(self._all_sent, timeout_s):
                    slow = self._unsent[0].exchange.peer
                    raise PeerLost(slow.node, f"took no keys within {timeout_s:g} s")
            except PeerLost as error:
                lost.append(error.bare())
                self._unsent = deque(keys for keys in self._unsent if keys.exchange.peer.node != error.node)
        return lost

    def _all_sent(self) -> bool:
        self._send_keys()
        return not self._unsent

    def _send_keys(self) -> None:
        """In order, so that a node sees its layers in order; one that is behind holds up the others' only
        until `finish`."""
        while self._unsent:
            keys = self._unsent[0]
            peer = keys.exchange.peer
            frame = self._free(peer, Kind.KV)
            if frame is None:
                return
            self._unsent.popleft()
            elements = self._gather(keys, frame)
            frame.header[Header.LAYER], frame.header[Header.LAYER_END] = keys.first, keys.end
            self._send(peer, Kind.KV, frame, elements)
            if keys.end == self._layout.num_layers:
                peer.kv_sent_step = self._step

    def _gather(self, keys: _Keys, frame: Frame) -> int:
        """What the node appends, from every microbatch's keys; returns how many elements."""
        append, layers = keys.exchange.append, keys.end - keys.first
        shape = (layers, 2, append.stop - append.start, self._layout.num_kv_heads, self._layout.head_dim)
        elements = math.prod(shape)
        body = torch.from_numpy(frame.body[: elements * self._layout.itemsize])
        body = body.view(self._dtype).view(shape)
        for microbatch in self._microbatches:
            ours = _overlap(append, microbatch.rows)
            source = microbatch.keys[keys.first : keys.end, :, _shifted(ours, microbatch.rows.start)]
            body[:, :, _shifted(ours, append.start)].copy_(source)
        return elements

    def _take(self, peer: Peer) -> None:
        """Put the partials that have come from this node where the step merges them. Raises PeerLost,
        StepRefused."""
        receiver = peer.lane.receiver(Kind.PARTIAL)
        try:
            while (frame := receiver.poll()) is not None:
                asked = self._answered_by(peer, frame)
                if asked is not None:
                    asked.put(*self._partial(asked, frame))
                    asked.awaits = None
                receiver.give_back(frame)  # taken over, or of a step that was abandoned
        except LaneDown as error:
            raise PeerLost(peer.node, str(error)) from error
        peer.hear()

    def _answered_by(self, peer: Peer, frame: Frame) -> _Asked | None:
        """What this PARTIAL answers, if it is awaited."""
        step, layer, microbatch = (frame.header[word] for word in _ANSWERS)
        if not peer.accepts(frame) or step != self._step:
            return None
        for asked in self._asked:
            if asked.peer is peer and asked.microbatch == microbatch and asked.awaits == layer:
                return asked
        return None

    def _free(self, peer: Peer, kind: Kind) -> Frame | None:
        try:
            return peer.lane.sender(kind).frame()
        except LaneDown as error:
            raise PeerLost(peer.node, str(error)) from error

    def _send(self, peer: Peer, kind: Kind, frame: Frame, elements: int) -> None:
        frame.header[Header.STEP] = self._step
        frame.header[Header.EPOCH] = self.epoch
        try:
            peer.lane.sender(kind).send(frame, elements * self._layout.itemsize)
        except LaneDown as error:
            raise PeerLost(peer.node, str(error)) from error

    def _queries(self, asked: _Asked, frame: Frame) -> Tensor:
        """A QUERY as [count, heads, dim]."""
        return self._kept(asked, frame, self._query_view)

    def _partial(self, asked: _Asked, frame: Frame) -> tuple[Tensor, Tensor]:
        """A PARTIAL as o [count, heads, dim] and lse float32 [count, heads]."""
        return self._kept(asked, frame, self._partial_views)

    def _query_view(self, frame: Frame, count: int) -> Tensor:
        size = count * self._query_elements * self._layout.itemsize
        return torch.from_numpy(frame.body[:size]).view(self._dtype).view(count, *self._query_shape)

    def _partial_views(self, frame: Frame, count: int) -> tuple[Tensor, Tensor]:
        o = self._query_view(frame, count)
        size = o.numel() * o.element_size()
        lse = torch.from_numpy(frame.body[size : size + 4 * count * self._layout.num_query_heads])
        return o, lse.view(torch.float32).view(count, -1)

    def _kept(self, asked: _Asked, frame: Frame, make: Callable[[Frame, int], T]) -> T:
        """Views of a frame, made once per frame and count: making them costs as much as using them."""
        kept = self._views.setdefault(asked.peer, {})
        key = id(frame), asked.count
        if key not in kept:
            if len(kept) >= MOST_VIEWS:
                kept.clear()
            kept[key] = make(frame, asked.count)
        return cast(T, kept[key])  # a frame belongs to one kind


def _never() -> bool:
    return False


def _never_leave(node: str) -> bool:
    return False


def widest_route(exchanges: Sequence[Exchange], rows: int) -> int:
    """The most attention nodes that one of so many rows asks."""
    nodes = torch.zeros(rows, dtype=torch.int64)
    for exchange in exchanges:
        nodes[exchange.queries] += bool(exchange.num_queries)
    return int(nodes.max())


def _asked(exchanges: Sequence[Exchange], buffers: StepBuffers) -> list[_Asked]:
    widest = widest_route(exchanges, buffers.size.rows)
    if widest > buffers.parts:
        raise RouteTooWide(widest, buffers.parts)
    taken = torch.zeros(buffers.size.rows, dtype=torch.int64)
    asked = []
    for exchange in exchanges:
        if exchange.num_queries:
            parts = taken[exchange.queries].clone()
            taken[exchange.queries] += 1
            for number, microbatch in enumerate(buffers.microbatches):
                rows, some = _within(exchange.queries, parts, microbatch.rows)
                if len(some):
                    block = _block(rows, some, microbatch)
                    asked.append(_Asked(exchange.peer, number, microbatch, len(some), rows, some, block))
    return asked


def _within(rows: Index, parts: Tensor, microbatch: slice) -> tuple[Index, Tensor]:
    """Those of a step's rows that are this microbatch's, counted within it, and their parts."""
    if isinstance(rows, slice):
        ours = _overlap(rows, microbatch)
        return _shifted(ours, microbatch.start), parts[_shifted(ours, rows.start)]
    inside = (rows >= microbatch.start) & (rows < microbatch.stop)
    found, some = rows[inside] - microbatch.start, parts[inside]
    if len(found) and int(found[-1] - found[0]) + 1 == len(found):
        return slice(int(found[0]), int(found[-1]) + 1), some
    return found, some


def _overlap(one: slice, other: slice) -> slice:
    """Rows of both; empty, and inside of neither, where there are none."""
    start = max(one.start, other.start)
    return slice(start, max(start, min(one.stop, other.stop)))


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start - by, rows.stop - by)


def _second_rows(exchange: Exchange, buffers: StepBuffers) -> int:
    """How many rows of its PLAN are the second microbatch's: those with queries or appended tokens in it."""
    involved = torch.zeros(buffers.size.rows, dtype=torch.bool)
    involved[exchange.queries] = True
    involved[exchange.append] = True
    return int(involved[buffers.size.microbatch_rows :].sum())


def _block(rows: Index, parts: Tensor, buffers: MicrobatchBuffers) -> _Block | None:
    part = int(parts[0])
    if not isinstance(rows, slice) or bool((parts != part).any()):
        return None
    return _Block(buffers.queries[rows], buffers.part_o[part, rows], buffers.part_lse[part, rows])


def _indices(rows: Index) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
