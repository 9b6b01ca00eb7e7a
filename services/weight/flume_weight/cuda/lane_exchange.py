"""A captured step's messages over lanes, without ever waiting: the step's `driver.StepExchange`.

Rows of the step and rows of its buffers are the same. Each attention node asked about a row fills one of the
row's parts, in order of the nodes' names. Queries are copied from the buffer into a frame per lane, as each
node gets only its rows. Keys leave as frames become free, those of the last layers only in `finish`: they
commit the step on the nodes, and until it is over it may fail here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from flume_common.lanes import Frame, LaneDown, Port
from flume_common.layout import KvLayout
from flume_common.wire import Header, Kind
from flume_kernels.dtypes import DTYPES
from torch import Tensor

from flume_weight.cuda.errors import RouteTooWide
from flume_weight.cuda.step_buffers import StepBuffers
from flume_weight.errors import PeerLost
from flume_weight.peer import Peer
from flume_weight.range_attention import Exchange

ROUNDS_PER_LOOK = 1024  # some milliseconds; a look costs system calls, a round none


@dataclass(slots=True)
class _Asked:
    """One attention node's queries: which rows, and which of each row's parts it fills."""

    peer: Peer
    rows: Tensor  # int64 [n]
    parts: Tensor  # int64 [n]
    answered: bool = True  # about the layer under way


@dataclass(slots=True)
class _Keys:
    """K and V of layers [first, end) for one attention node, not sent yet."""

    exchange: Exchange
    first: int
    end: int


class LaneExchange:
    """One step. Its PLANs have been sent. Raises RouteTooWide.

    One microbatch only: messages carry no number of one, so a second would answer in the first's place.
    """

    def __init__(
        self,
        port: Port,
        layout: KvLayout,
        step: int,
        epoch: int,
        exchanges: Sequence[Exchange],
        buffers: StepBuffers,
    ) -> None:
        if buffers.size.microbatches > 1:
            raise ValueError(f"lanes carry one microbatch, not {buffers.size.microbatches}")
        self._port = port
        self._layout = layout
        self._dtype = DTYPES[layout.dtype]
        self._step = step
        self._epoch = epoch
        self._buffers = buffers.microbatches[0]
        self._asked = _parts(exchanges, buffers)
        self._appending = [exchange for exchange in exchanges if exchange.num_appended]
        self._unsent: deque[_Keys] = deque()
        self._rounds = 0

    @property
    def silent(self) -> list[Peer]:
        """Who has not answered about the layer under way."""
        return [asked.peer for asked in self._asked if not asked.answered]

    def progress(self) -> None:
        self._rounds += 1
        if self._rounds % ROUNDS_PER_LOOK:
            self._port.progress()
        else:
            self._port.wait(_never, 0.0)  # also looks whether a peer's process has ended
        self._send_keys()

    def query(self, microbatch: int, layer: int) -> None:
        queries = self._buffers.queries
        for asked in self._asked:
            sender = asked.peer.lane.sender(Kind.QUERY)
            frame = self._free(asked.peer, Kind.QUERY)
            # The node has answered what lay in the frames before, so they have left.
            assert frame is not None, "more queries under way than a step has"
            body = self._body(frame, len(asked.rows) * queries[0].numel())
            torch.index_select(queries, 0, asked.rows, out=body.view(-1, *queries.shape[1:]))
            frame.header[Header.LAYER] = layer
            self._stamp(frame)
            try:
                sender.send(frame, body.numel() * body.element_size())
            except LaneDown as error:
                raise PeerLost(asked.peer.node, str(error)) from error
            asked.answered = False
        self._port.progress()

    def keys(self, microbatch: int, layer: int) -> None:
        end = layer + 1
        for exchange in self._appending:
            if end % exchange.layers_per_kv == 0 and end < self._layout.num_layers:
                self._unsent.append(_Keys(exchange, end - exchange.layers_per_kv, end))
        self._send_keys()

    def arrived(self, microbatch: int, layer: int) -> bool:
        for asked in self._asked:
            if not asked.answered:
                asked.answered = self._take(asked, layer)
        return all(asked.answered for asked in self._asked)

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
                lost.append(error)
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
            frame = self._free(keys.exchange.peer, Kind.KV)
            if frame is None:
                return
            self._unsent.popleft()
            self._send(keys, frame)

    def _send(self, keys: _Keys, frame: Frame) -> None:
        exchange, peer = keys.exchange, keys.exchange.peer
        source = self._buffers.keys[keys.first : keys.end, :, exchange.append]
        body = self._body(frame, source.numel())
        body.view(source.shape).copy_(source)
        frame.header[Header.LAYER], frame.header[Header.LAYER_END] = keys.first, keys.end
        self._stamp(frame)
        try:
            peer.lane.sender(Kind.KV).send(frame, body.numel() * body.element_size())
        except LaneDown as error:
            raise PeerLost(peer.node, str(error)) from error
        if keys.end == self._layout.num_layers:
            peer.kv_sent_step = self._step

    def _take(self, asked: _Asked, layer: int) -> bool:
        """Put this node's partial where the step merges it; False while it is not there. Raises PeerLost,
        StepRefused."""
        peer = asked.peer
        receiver = peer.lane.receiver(Kind.PARTIAL)
        try:
            while (frame := receiver.poll()) is not None:
                header = frame.header
                awaited = header[Header.STEP] == self._step and header[Header.LAYER] == layer
                ours = peer.accepts(frame) and awaited
                if ours:
                    self._put(asked, frame)
                receiver.give_back(frame)  # taken over, or of a step that was abandoned
                if ours:
                    return True
        except LaneDown as error:
            raise PeerLost(peer.node, str(error)) from error
        peer.hear()
        return False

    def _put(self, asked: _Asked, frame: Frame) -> None:
        heads, dim = self._layout.num_query_heads, self._layout.head_dim
        count = len(asked.rows)
        o = self._body(frame, count * heads * dim)
        at = o.numel() * o.element_size()
        lse = torch.from_numpy(frame.body[at : at + 4 * count * heads]).view(torch.float32)
        self._buffers.part_o[asked.parts, asked.rows] = o.view(count, heads, dim)
        self._buffers.part_lse[asked.parts, asked.rows] = lse.view(count, heads)

    def _free(self, peer: Peer, kind: Kind) -> Frame | None:
        try:
            return peer.lane.sender(kind).frame()
        except LaneDown as error:
            raise PeerLost(peer.node, str(error)) from error

    def _body(self, frame: Frame, count: int) -> Tensor:
        """The first `count` elements of a frame's body."""
        return torch.from_numpy(frame.body[: count * self._layout.itemsize]).view(self._dtype)

    def _stamp(self, frame: Frame) -> None:
        frame.header[Header.STEP] = self._step
        frame.header[Header.EPOCH] = self._epoch


def _never() -> bool:
    return False


def _parts(exchanges: Sequence[Exchange], buffers: StepBuffers) -> list[_Asked]:
    taken = torch.zeros(buffers.size.rows, dtype=torch.int64)
    asked = []
    for exchange in exchanges:
        if not exchange.num_queries:
            continue
        index = exchange.queries
        rows = torch.arange(index.start, index.stop) if isinstance(index, slice) else index
        asked.append(_Asked(exchange.peer, rows, taken[rows]))
        taken[rows] += 1
    widest = int(taken.max())
    if widest > buffers.parts:
        raise RouteTooWide(widest, buffers.parts)
    return asked
