"""A step's batch: whose tokens sit where, and what each attention node is told about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from flume_common.wire import sequence_key
from torch import Tensor

from flume_weight.peer import Peer
from flume_weight.range_attention import Exchange, Index
from flume_weight.sampling import Sampler
from flume_weight.sequence import Sequence as Seq
from flume_weight.storage import Part, Slot


@dataclass(frozen=True, slots=True)
class Row:
    """`tokens` pending tokens of one sequence, at `[at, at + tokens)` of the batch, stored in `part`."""

    sequence: Seq
    at: int
    tokens: int
    node: str
    slot: Slot
    part: Part

    @property
    def samples(self) -> bool:
        """Whether the row reaches the sequence's newest token, so that a new one follows."""
        return not self.sequence.holes and self.tokens == self.sequence.pending_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, grouped by the node that stores them so that what it appends is one slice."""

    rows: Sequence[Row]
    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    logit_rows: Tensor  # int64 [R], the last token of every row that samples
    chunks: Sequence[slice]  # rows of more than one token
    exchanges: Sequence[Exchange]
    samplers: Sequence[Sampler] = ()  # of the logit rows


def build(shares: Sequence[tuple[Seq, int]], peers: Mapping[str, Peer]) -> Batch:
    """Lay out a step. Opens ranges (as ops on the peers) where a node has none for the tokens yet."""
    ordered = sorted(shares, key=lambda share: share[0].node or "")
    rows: list[Row] = []
    at = 0
    for sequence, tokens in ordered:
        peer = peers[sequence.node or ""]
        slot, part = open_range(sequence, peer)
        rows.append(Row(sequence, at, tokens, peer.node, slot, part))
        at += tokens
    ids: list[int] = []
    positions: list[int] = []
    for row in rows:
        start = row.sequence.position
        ids += row.sequence.tokens[start : start + row.tokens]
        positions += range(start, start + row.tokens)
    return Batch(
        rows=rows,
        token_ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        logit_rows=torch.tensor([row.at + row.tokens - 1 for row in rows if row.samples], dtype=torch.int64),
        chunks=[slice(row.at, row.at + row.tokens) for row in rows if row.tokens > 1],
        exchanges=_exchanges(rows, peers),
        samplers=[row.sequence.sampler for row in rows if row.samples],
    )


def open_range(sequence: Seq, peer: Peer) -> tuple[Slot, Part]:
    """Make sure that the node has an open range for the sequence's next tokens."""
    slot = sequence.slots.get(peer.node)
    if slot is None:
        slot = sequence.slots[peer.node] = Slot(peer.take_slot())
    part = slot.open_at(sequence.position)
    if part is None:
        part = Part(sequence.position)
        slot.parts.append(part)
        peer.open(slot.number, part.start, sequence_key(sequence.name))
    return slot, part


def _exchanges(rows: Sequence[Row], peers: Mapping[str, Peer]) -> list[Exchange]:
    """One per node that holds or receives tokens of this batch, in order of name."""
    involved = sorted({node for row in rows for node in row.sequence.slots})
    return [exchange for node in involved if (exchange := _exchange(rows, peers[node])).rows]


def _exchange(rows: Sequence[Row], peer: Peer) -> Exchange:
    exchange = Exchange(peer)
    asked: list[Row] = []
    appended: list[Row] = []
    for row in rows:
        slot = row.sequence.slots.get(peer.node)
        if slot is None:
            continue
        position, grows = row.sequence.position, row.node == peer.node
        queries = row.tokens if slot.holds_before(position) else 0
        if not (queries or grows):
            continue
        appends = row.tokens if grows else 0
        exchange.rows.append((slot.number, queries, appends, slot.held_tokens, position))
        if queries:
            asked.append(row)
        if grows:
            appended.append(row)
    exchange.queries, exchange.num_queries = _index(asked)
    if appended:
        exchange.append = slice(appended[0].at, appended[-1].at + appended[-1].tokens)
        exchange.layers_per_kv = peer.lane.shape.layers_per_kv(exchange.num_appended)
    return exchange


def _index(rows: Sequence[Row]) -> tuple[Index, int]:
    """The batch positions of these rows' tokens: a slice where they are contiguous."""
    if not rows:
        return slice(0, 0), 0
    count = sum(row.tokens for row in rows)
    start, stop = rows[0].at, rows[-1].at + rows[-1].tokens
    if stop - start == count:
        return slice(start, stop), count
    return torch.cat([torch.arange(row.at, row.at + row.tokens) for row in rows]), count


def commit(batch: Batch, peers: Mapping[str, Peer], block_tokens: int) -> dict[str, int]:
    """The step's KV is on its way: move lengths and take the credit its blocks cost.

    Returns how many tokens of each sequence had been computed before.
    """
    again: dict[str, int] = {}
    for row in batch.rows:
        before = row.part.blocks(block_tokens)
        row.slot.append(row.part, row.tokens)
        again[row.sequence.name] = row.sequence.advance(row.tokens)
        peer = peers.get(row.node)
        if peer is not None:
            peer.ledger.take(row.part.blocks(block_tokens) - before)
    return again
