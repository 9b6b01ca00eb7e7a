"""What the host has to do with a direct step: say where its rows lie, send its keys, notice who is gone.

Queries and partials travel without it. It learns how far the device is by the signal that comes with each
layer's queries, and only when none comes for long does it look at the nodes' own flags.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from flume_common.direct_region import ANSWERED_AT, mark
from flume_common.lanes import Port
from flume_common.layout import KvLayout
from flume_kernels.gpu.device import Device

from flume_weight.cuda.lane_exchange import LaneExchange
from flume_weight.cuda.step_buffers import StepBuffers
from flume_weight.errors import PeerSilent
from flume_weight.peer import Peer
from flume_weight.range_attention import Exchange


class DirectExchange(LaneExchange):
    """The same for a step in which every node that is asked has a region."""

    def __init__(self, port: Port, layout: KvLayout, device: Device) -> None:
        super().__init__(port, layout)
        self._device = device
        self._peers: list[Peer] = []  # who is asked
        self._layer = 0  # whose queries the device has sent
        self._sent_s = 0.0  # and when

    def begin(self, step: int, exchanges: Sequence[Exchange], buffers: StepBuffers) -> None:
        """As in LaneExchange, for buffers of a direct step."""
        asking = [exchange for exchange in exchanges if exchange.num_queries]
        assert buffers.direct is not None
        buffers.direct.fill(step, asking)
        self._peers = [exchange.peer for exchange in asking]
        self._layer, self._sent_s = 0, time.monotonic()
        # What is left for lanes asks nobody.
        appends = [replace(exchange, queries=slice(0, 0), num_queries=0) for exchange in exchanges]
        super().begin(step, appends, buffers)

    def query(self, microbatch: int, layer: int) -> None:
        """They are with the nodes already."""
        self._layer, self._sent_s = layer, time.monotonic()

    def arrived(self, microbatch: int, layer: int) -> bool:
        """The device waits by itself."""
        return True

    def forget(self, peer: Peer) -> None:
        super().forget(peer)
        peer.region = None  # nothing runs: it may be unmapped
        self._peers = []

    @property
    def silent(self) -> list[Peer]:
        awaited = mark(self._step, self._layer)
        return [peer for peer in self._peers if self._answered(peer) < awaited]

    def _answered(self, peer: Peer) -> int:
        assert peer.region is not None
        flag = peer.region.memory[ANSWERED_AT : ANSWERED_AT + 8].view(torch.int64)
        with self._device.beside():  # on the stream itself is what waits for this flag
            return int(flag.cpu())

    def _leave_silent(self) -> None:
        """Raises PeerLost for a lane that is down, StepRefused, or PeerSilent."""
        for peer in self._peers:
            peer.hear()
        waited_s = time.monotonic() - self._sent_s
        if any(waited_s > peer.patience_s for peer in self._peers):
            for peer in self.silent:
                if waited_s > peer.patience_s and self.may_leave(peer.node):
                    raise PeerSilent(peer.node, self._sent_s)


def can_be_direct(exchanges: Sequence[Exchange]) -> bool:
    """Whether every node that is asked has a region, with room for what it is asked."""
    asked = [exchange for exchange in exchanges if exchange.num_queries]
    return bool(asked) and all(_has_room(exchange) for exchange in asked)


def _has_room(exchange: Exchange) -> bool:
    mapped = exchange.peer.region
    return mapped is not None and exchange.num_queries <= mapped.region.rows
