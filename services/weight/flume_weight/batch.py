"""A step's batch: whose tokens sit where, and what each attention node is told about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from flume_common.wire import sequence_key
from torch import Tensor

from flume_weight.peer import Peer
from flume_weight.range_attention import Exchange, Index
from flume_weight.sequence import Sequence as Seq
from flume_weight.sequence import Slot


@dataclass(frozen=True, slots=True)
class Row:
    """`tokens` pending tokens of one sequence, at positions `[at, at + tokens)` of the batch."""

    sequence: Seq
    at: int
    tokens: int

    @property
    def samples(self) -> bool:
        """Whether the row reaches the sequence's newest token, so that a new one follows."""
        return self.tokens == self.sequence.pending_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, grouped by tail node so that what a node appends is one slice."""

    rows: Sequence[Row]
    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    logit_rows: Tensor  # int64 [R], the last token of every row that samples
    chunks: Sequence[slice]  # rows of more than one token
    exchanges: Sequence[Exchange]


def build(shares: Sequence[tuple[Seq, int]], peers: Mapping[str, Peer]) -> Batch:
    """Lay out a step. Opens ranges (as ops on the peers) where a tail has not reached its node yet."""
    ordered = sorted(shares, key=lambda share: share[0].tail_node)
    rows: list[Row] = []
    at = 0
    for sequence, tokens in ordered:
        open_tail(sequence, peers[sequence.tail_node])
        rows.append(Row(sequence, at, tokens))
        at += tokens
    ids: list[int] = []
    positions: list[int] = []
    for row in rows:
        start = row.sequence.committed_tokens
        ids += row.sequence.tokens[start : start + row.tokens]
        positions += range(start, start + row.tokens)
    return Batch(
        rows=rows,
        token_ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        logit_rows=torch.tensor([row.at + row.tokens - 1 for row in rows if row.samples], dtype=torch.int64),
        chunks=[slice(row.at, row.at + row.tokens) for row in rows if row.tokens > 1],
        exchanges=_exchanges(rows, peers),
    )


def open_tail(sequence: Seq, peer: Peer) -> None:
    """Make sure the tail's node has an open range for this sequence."""
    slot = sequence.slots.get(peer.node)
    if slot is None:
        slot = sequence.slots[peer.node] = Slot(peer.take_slot())
    if not slot.is_open:
        slot.is_open, slot.open_tokens = True, 0
        peer.open(slot.number, sequence.committed_tokens, sequence_key(sequence.name))


def _exchanges(rows: Sequence[Row], peers: Mapping[str, Peer]) -> list[Exchange]:
    """One per node that holds or receives tokens of this batch, in order of name."""
    involved = sorted({node for row in rows for node in row.sequence.slots})
    return [_exchange(rows, peers[node]) for node in involved]


def _exchange(rows: Sequence[Row], peer: Peer) -> Exchange:
    exchange = Exchange(peer)
    asked: list[Row] = []
    appended: list[Row] = []
    for row in rows:
        slot = row.sequence.slots.get(peer.node)
        if slot is None:
            continue
        is_tail = row.sequence.tail_node == peer.node
        queries = row.tokens if slot.held_tokens else 0
        if not (queries or is_tail):
            continue
        exchange.rows.append((slot.number, queries, row.tokens if is_tail else 0, slot.held_tokens))
        if queries:
            asked.append(row)
        if is_tail:
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


def commit(batch: Batch, peers: Mapping[str, Peer], block_tokens: int) -> None:
    """The step's KV is on its way: move lengths and take the credit its blocks cost."""
    for row in batch.rows:
        sequence = row.sequence
        sequence.committed_tokens += row.tokens
        slot = sequence.slots[sequence.tail_node]
        before = -(-slot.open_tokens // block_tokens)
        slot.held_tokens += row.tokens
        slot.open_tokens += row.tokens
        peer = peers.get(sequence.tail_node)
        if peer is not None:
            peer.ledger.take(-(-slot.open_tokens // block_tokens) - before)
