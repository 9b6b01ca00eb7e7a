"""The attention nodes a weight engine is attached to, and the storage of its sequences on them.

Everything here happens between two steps. A tail moves by closing its range (an op that leaves with
the next PLAN) and naming another node in the route; the new range is opened by the first step that
appends there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from flume_common.layout import KvLayout
from flume_common.routes import Route
from flume_common.wire import sequence_key

from flume_weight.adoption import choose, lay_out
from flume_weight.errors import PeerLost
from flume_weight.moves import Batch, ClosedRange
from flume_weight.moves import choose as choose_moves
from flume_weight.peer import Peer
from flume_weight.placement import Balance, NodeView, TailView, place, relieve
from flume_weight.scheduler import Candidate, needed_blocks
from flume_weight.sequence import Sequence as Seq
from flume_weight.storage import Hole, Part, Slot

_TAIL_RESERVE_BLOCKS = 2  # credit kept ahead of every open tail, so that no step waits for a grant


class Fleet:
    """Peers by node name, and the moves of tails between them."""

    def __init__(self, layout: KvLayout, balance: Balance, node: str) -> None:
        self.peers: dict[str, Peer] = {}
        self.epoch = 0
        self._layout = layout
        self._block_tokens = layout.block_tokens
        self.balance = balance
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
                lost.append(error.bare())
        return heard, lost

    @property
    def silent(self) -> dict[str, float]:
        """Nodes that left a step waiting and have said nothing since, and since when (monotonic)."""
        since_s = {name: peer.silent_since_s for name, peer in self.peers.items()}
        return {name: at_s for name, at_s in since_s.items() if at_s is not None}

    def candidates(self, running: Iterable[Seq]) -> list[Candidate]:
        """The running sequences whose next tokens have an attached node to go to, and none to wait for."""
        silent = self.silent
        return [
            Candidate(
                sequence=sequence.name,
                node=sequence.node,
                pending_tokens=sequence.pending_tokens,
                slack_tokens=self._slack_tokens(sequence),
                context_tokens=sequence.position,
            )
            for sequence in running
            if sequence.node is not None and sequence.node in self.peers and not needs(sequence, silent)
        ]

    def unused_blocks(self) -> dict[str, int]:
        return {name: peer.ledger.unused_blocks for name, peer in self.peers.items()}

    def views(self, running: Sequence[Seq]) -> list[NodeView]:
        """The nodes as placement sees them: what running sequences still need is promised to them.

        A silent one is no place for anything.
        """
        need = needed_blocks(self.candidates(running), self._block_tokens)
        tails: dict[str, int] = {}
        for sequence in running:
            tails[sequence.node or ""] = tails.get(sequence.node or "", 0) + 1
        return [
            NodeView(
                node=name,
                capacity_blocks=peer.ledger.capacity_blocks,
                available_blocks=max(0, peer.ledger.reachable_blocks - need.get(name, 0)),
                tails=tails.get(name, 0),
                draining=peer.draining,
            )
            for name, peer in self.peers.items()
            if peer.silent_since_s is None
        ]

    def set_wants(self, running: Sequence[Seq]) -> None:
        """What each lane should hold in unused credit: pending tokens and a reserve for every tail."""
        need = needed_blocks(self.candidates(running), self._block_tokens)
        for name, peer in self.peers.items():
            tails = sum(sequence.node == name for sequence in running)
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

    def adopt(self, sequence: Seq, kept: Mapping[str, Sequence[Part]]) -> bool:
        """Take over what is kept of the sequence, but for its newest token. Whether there was anything."""
        position = len(sequence.tokens) - 1
        chosen = choose({node: parts for node, parts in kept.items() if node in self.peers}, position)
        if not chosen:
            return False
        last = max(chosen, key=lambda node: max(part.end for part in chosen[node]))
        stays = not self.peers[last].draining
        tail_node = last if stays else place(self.views([])) or last
        ranges, holes = lay_out(chosen, tail_node)
        # Before anything is changed: it raises where the nodes' words make no route.
        route = Route(sequence.name, self._node, self.epoch, ranges)
        for node, parts in chosen.items():
            peer = self.peers[node]
            slot = Slot(peer.take_slot(), parts, sum(part.tokens for part in parts))
            sequence.slots[node] = slot
            peer.adopt(slot.number, position, sequence_key(sequence.name))
            peer.ledger.take(sum(part.blocks(self._block_tokens) for part in parts))
        sequence.route, sequence.holes = route, holes
        sequence.committed_tokens = ranges[-1].start
        return True

    def house(self, running: Sequence[Seq]) -> list[Seq]:
        """Find a node for the next tokens of sequences that have none. Returns those whose route changed.

        None has one whose first hole is new, or whose tail was lost with its node; a hole that cannot
        be filled on where it is goes on elsewhere.
        """
        moved = []
        for sequence in running:
            if not sequence.holes:
                if sequence.tail_node not in self.peers and self._move_tail_anywhere(sequence, running):
                    moved.append(sequence)
            elif self._must_move(sequence.node, sequence):
                elsewhere = place(view for view in self.views(running) if view.node != sequence.node)
                if elsewhere is not None:
                    self._move_hole(sequence, elsewhere)
                    moved.append(sequence)
        return moved

    def move_tails(self, running: Sequence[Seq]) -> list[Seq]:
        """Tails that leave full, draining or much fuller nodes at this token boundary."""
        silent = self.silent
        whole = [s for s in running if not s.holes and s.tail_node in self.peers and not needs(s, silent)]
        if len(self.peers) < 2 or not whole:
            return []
        views = self.views(running)
        by_name = {sequence.name: sequence for sequence in whole}
        moves = relieve([_tail_view(s) for s in whole], views, self._block_tokens, self.balance)
        for sequence in whole:
            if sequence.name not in moves and self._is_stuck(sequence, self.peers[sequence.tail_node]):
                elsewhere = place(view for view in views if view.node != sequence.tail_node)
                if elsewhere is not None:
                    moves[sequence.name] = elsewhere
        for name, node in moves.items():
            self.move_tail(by_name[name], node)
        return [by_name[name] for name in moves]

    def move_tail(self, sequence: Seq, node: str) -> None:
        """Close the tail at the committed length and continue on `node`. Moves no KV."""
        assert sequence.route is not None
        self._close_growing(sequence)
        sequence.route = sequence.route.move_tail(sequence.committed_tokens, node)

    def next_moves(self, running: Sequence[Seq]) -> Batch | None:
        """Closed ranges that should leave nodes that must be empty soon, as far as others have room."""
        if not any(peer.evacuating for peer in self.peers.values()):
            return None
        room = {
            view.node: min(view.available_blocks, self.peers[view.node].ledger.free_blocks)
            for view in self.views(running)
            if not view.draining
        }
        return choose_moves(self._to_move(running), room, self._layout)

    def _to_move(self, running: Iterable[Seq]) -> Iterator[ClosedRange]:
        for sequence in running:
            for node, slot in sequence.slots.items():
                if self.peers[node].evacuating:
                    for part in slot.parts:
                        if not part.is_open:
                            yield ClosedRange(
                                sequence.name, part.start, part.tokens, node, sequence.tail_node
                            )

    def swap(self, sequence: Seq | None, item: ClosedRange, target: str) -> bool:
        """The target has pulled this range: from now on it is asked there, and the source frees it.

        Whether the route changed. A range that nobody needs any more, because its sequence ended or lost
        it meanwhile, is freed on the target.
        """
        peer = self.peers.get(target)
        if peer is None:
            return False
        peer.ledger.take(self._layout.blocks_of(item.tokens))
        slot = sequence.slots.get(item.node) if sequence is not None else None
        part = slot.closed_at(item.start, item.tokens) if slot is not None else None
        if sequence is None or slot is None or part is None:
            number = peer.take_slot()
            peer.take(number, item.start, sequence_key(item.sequence))
            peer.release(number)
            return False
        assert sequence.route is not None
        new = sequence.slots.get(target)
        if new is None:
            new = sequence.slots[target] = Slot(peer.take_slot())
        peer.take(new.number, part.start, sequence_key(sequence.name))
        new.add(Part(part.start, part.tokens, is_open=False))
        slot.remove(part)
        if slot.parts:
            self.peers[item.node].drop(slot.number, part.start, part.tokens)
        else:
            self.peers[item.node].release(slot.number)
            del sequence.slots[item.node]
        sequence.route = sequence.route.replace_holder(part.start, part.end, target)
        return True

    def close_filled_hole(self, sequence: Seq) -> bool:
        """The first hole, once it is filled, is a closed range like any other. Whether one was."""
        if not sequence.holes or sequence.pending_tokens:
            return False
        self._keep_filled(sequence)
        del sequence.holes[0]
        return True

    def _move_tail_anywhere(self, sequence: Seq, running: Sequence[Seq]) -> bool:
        node = place(self.views(running))
        if node is not None:
            self.move_tail(sequence, node)
        return node is not None

    def _move_hole(self, sequence: Seq, node: str) -> None:
        self._keep_filled(sequence)
        hole = sequence.holes[0]
        sequence.holes[0] = Hole(hole.at, hole.end, hole.at, node)

    def _keep_filled(self, sequence: Seq) -> None:
        """What is back of the first hole becomes a closed range of the route."""
        hole = sequence.holes[0]
        self._close_growing(sequence)
        if hole.at > hole.start:
            assert sequence.route is not None and hole.node is not None
            sequence.route = sequence.route.replace_holder(hole.start, hole.at, hole.node)

    def _close_growing(self, sequence: Seq) -> None:
        part = sequence.growing
        if part is not None:
            node = sequence.node or ""
            slot = sequence.slots[node]
            slot.close(part)
            self.peers[node].close(slot.number, part.start, part.tokens)

    def _must_move(self, node: str | None, sequence: Seq) -> bool:
        peer = self.peers.get(node or "")
        return peer is None or peer.draining or self._is_stuck(sequence, peer)

    def release(self, sequence: Seq) -> None:
        """Free everything the sequence holds, on the nodes that are still there."""
        for node, slot in sequence.slots.items():
            peer = self.peers.get(node)
            if peer is not None:
                peer.release(slot.number)
        sequence.forget_storage()

    def drop(self, node: str, running: Iterable[Seq]) -> tuple[Peer | None, dict[str, int]]:
        """Forget a node: the peer it was, and how many tokens each affected sequence has lost.

        One that only had its empty tail there has lost 0.
        """
        peer = self.peers.pop(node, None)
        if peer is None:
            return None, {}
        affected = [s for s in running if s.route is not None and (node in s.slots or s.node == node)]
        return peer, {sequence.name: sequence.lose(node) for sequence in affected}

    def flush(self, send: Callable[[Peer], None]) -> None:
        """Tell nodes what they should hear although no step went to them."""
        for peer in list(self.peers.values()):
            if peer.has_news and peer.silent_since_s is None:
                send(peer)

    def _is_stuck(self, sequence: Seq, peer: Peer) -> bool:
        return self._slack_tokens(sequence) == 0 and peer.ledger.exhausted

    def _slack_tokens(self, sequence: Seq) -> int:
        part = sequence.growing
        return part.slack_tokens(self._block_tokens) if part is not None else 0


def needs(sequence: Seq, nodes: Collection[str]) -> bool:
    """Whether a step of the sequence asks, or adds to, any of these nodes."""
    return bool(nodes) and (sequence.node in nodes or any(node in nodes for node in sequence.slots))


def _tail_view(sequence: Seq) -> TailView:
    part = sequence.growing
    open_tokens = part.tokens if part is not None else 0
    return TailView(sequence.name, sequence.tail_node, open_tokens, sequence.committed_tokens)
