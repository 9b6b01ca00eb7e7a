"""The attention nodes a weight engine is attached to, and the storage of its sequences on them.

Everything here happens between two steps. A tail moves by closing its range (an op that leaves with
the next PLAN) and naming another node in the route; the new range is opened by the first step that
appends there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from flume_common.layout import KvLayout
from flume_common.routes import Route

from flume_weight.errors import PeerLost
from flume_weight.peer import Peer
from flume_weight.placement import Balance, NodeView, TailView, place, relieve
from flume_weight.scheduler import Candidate, needed_blocks
from flume_weight.sequence import Sequence as Seq

_TAIL_RESERVE_BLOCKS = 2  # credit kept ahead of every open tail, so that no step waits for a grant


class Fleet:
    """Peers by node name, and the moves of tails between them."""

    def __init__(self, layout: KvLayout, balance: Balance, node: str) -> None:
        self.peers: dict[str, Peer] = {}
        self.epoch = 0
        self._block_tokens = layout.block_tokens
        self._balance = balance
        self._node = node  # the weight node, which owns the routes

    @property
    def capacity_blocks(self) -> int:
        return sum(peer.ledger.capacity_blocks for peer in self.peers.values())

    def hear(self) -> tuple[bool, list[PeerLost]]:
        """Take in what nodes said: whether any spoke, and which lanes turned out to be lost."""
        heard, lost = False, []
        for peer in self.peers.values():
            try:
                heard |= peer.hear()
            except PeerLost as error:
                lost.append(error)
        return heard, lost

    def candidates(self, running: Iterable[Seq]) -> list[Candidate]:
        """The running sequences whose tail's node is attached."""
        return [
            Candidate(
                sequence=sequence.name,
                node=sequence.tail_node,
                pending_tokens=sequence.pending_tokens,
                slack_tokens=slot.slack_tokens(self._block_tokens) if (slot := sequence.tail_slot) else 0,
            )
            for sequence in running
            if sequence.tail_node in self.peers
        ]

    def unused_blocks(self) -> dict[str, int]:
        return {name: peer.ledger.unused_blocks for name, peer in self.peers.items()}

    def views(self, running: Sequence[Seq]) -> list[NodeView]:
        """The nodes as placement sees them: what running sequences still need is promised to them."""
        need = needed_blocks(self.candidates(running), self._block_tokens)
        tails: dict[str, int] = {}
        for sequence in running:
            tails[sequence.tail_node] = tails.get(sequence.tail_node, 0) + 1
        return [
            NodeView(
                node=name,
                capacity_blocks=peer.ledger.capacity_blocks,
                available_blocks=max(0, peer.ledger.reachable_blocks - need.get(name, 0)),
                tails=tails.get(name, 0),
                draining=peer.draining,
            )
            for name, peer in self.peers.items()
        ]

    def set_wants(self, running: Sequence[Seq]) -> None:
        """What each lane should hold in unused credit: pending tokens and a reserve for every tail."""
        need = needed_blocks(self.candidates(running), self._block_tokens)
        for name, peer in self.peers.items():
            tails = sum(sequence.tail_node == name for sequence in running)
            peer.want_blocks = 0 if peer.draining else need.get(name, 0) + tails * _TAIL_RESERVE_BLOCKS
            if not tails:
                peer.ledger.give_back_beyond(0)

    def start(self, sequence: Seq, running: Sequence[Seq]) -> bool:
        """Give the sequence its first tail. False when no node has a block for it."""
        node = place(self.views(running))
        if node is None:
            return False
        sequence.route = Route.start(sequence.name, self._node, self.epoch, node)
        return True

    def move_tails(self, running: Sequence[Seq]) -> list[Seq]:
        """Tails that leave full, draining or much fuller nodes at this token boundary."""
        if len(self.peers) < 2:
            return []
        views = self.views(running)
        by_name = {sequence.name: sequence for sequence in running}
        moves = relieve([_tail_view(s) for s in running], views, self._block_tokens, self._balance)
        for sequence in running:
            peer = self.peers.get(sequence.tail_node)
            if sequence.name not in moves and peer and self._is_stuck(sequence, peer):
                elsewhere = place(view for view in views if view.node != sequence.tail_node)
                if elsewhere is not None:
                    moves[sequence.name] = elsewhere
        for name, node in moves.items():
            self.move_tail(by_name[name], node)
        return [by_name[name] for name in moves]

    def move_tail(self, sequence: Seq, node: str) -> None:
        """Close the tail at the committed length and continue on `node`. Moves no KV."""
        assert sequence.route is not None
        slot = sequence.tail_slot
        if slot is not None and slot.is_open:
            slot.is_open = False
            self.peers[sequence.tail_node].close(slot.number, slot.held_tokens)
        sequence.route = sequence.route.move_tail(sequence.committed_tokens, node)

    def release(self, sequence: Seq) -> None:
        """Free everything the sequence holds, on the nodes that are still there."""
        for node, slot in sequence.slots.items():
            peer = self.peers.get(node)
            if peer is not None:
                peer.release(slot.number)
        sequence.forget_storage()

    def drop(self, node: str, running: Iterable[Seq]) -> tuple[Peer | None, list[Seq]]:
        """Forget a node; the sequences that held something there (or had their tail there)."""
        peer = self.peers.pop(node, None)
        affected = [s for s in running if s.route is not None and (node in s.slots or s.tail_node == node)]
        return peer, affected

    def flush(self, send: Callable[[Peer], None]) -> None:
        """Tell nodes what they should hear although no step went to them."""
        for peer in list(self.peers.values()):
            if peer.has_news:
                send(peer)

    def _is_stuck(self, sequence: Seq, peer: Peer) -> bool:
        slot = sequence.tail_slot
        slack = slot.slack_tokens(self._block_tokens) if slot else 0
        return slack == 0 and peer.ledger.exhausted


def _tail_view(sequence: Seq) -> TailView:
    slot = sequence.tail_slot
    open_tokens = slot.open_tokens if slot is not None and slot.is_open else 0
    assert sequence.route is not None
    return TailView(sequence.name, sequence.tail_node, open_tokens, sequence.committed_tokens)
