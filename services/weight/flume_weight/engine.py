"""The weight node's engine: a plain loop that owns the model, the UCX worker and the sequences.

Between two steps it listens (to its supervisor and to attention nodes), ends, admits and places
sequences; a step is one forward pass. Nothing in a step waits for the supervisor, and nothing the
supervisor does waits for a step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from flume_common.engine_link import EngineLink, LinkClosed
from flume_common.lanes import Port, Side
from flume_common.wire import LaneShape

from flume_weight import messages as m
from flume_weight.batch import Batch, build, commit
from flume_weight.errors import PeerLost, RequestRefused
from flume_weight.fleet import Fleet
from flume_weight.model import Transformer
from flume_weight.moves import RETRY_S
from flume_weight.moves import Batch as Moves
from flume_weight.peer import Peer
from flume_weight.placement import Balance, never_fits
from flume_weight.range_attention import Exchange, RangeAttention
from flume_weight.sampling import FinishReason, Sampler, sample_rows
from flume_weight.scheduler import StepLimits, admits, schedule
from flume_weight.sequence import Cause, Recovery, Sequence
from flume_weight.storage import Part
from flume_weight.threads import Threads

_IDLE_WAIT_S = 5.0


class WeightEngine:
    """One engine; `run` returns when the supervisor closes the link."""

    def __init__(
        self,
        link: EngineLink[m.Inbound],
        port: Port,
        model: Transformer,
        shape: LaneShape,
        *,
        node: str,
        limits: StepLimits,
        balance: Balance,
        step_timeout_s: float,
        threads: Threads,
    ) -> None:
        self._link = link
        self._port = port
        self._model = model
        self._shape = shape
        self._limits = limits
        self._threads = threads
        self._fleet = Fleet(shape.layout, balance, node)
        self._attention = RangeAttention(port, shape.layout, shape.layout.head_dim**-0.5, step_timeout_s)
        self._running: list[Sequence] = []  # in order of arrival
        self._waiting: deque[Sequence] = deque()
        self._moving: tuple[Moves, Peer] | None = None  # what is under way, and its target
        self._move_at_s = 0.0
        self._step = 0
        self._told_capacity: tuple[int, int, int] | None = None
        self._recomputed = m.Recomputed()
        self._recomputed_told = True
        self._epoch_rejected = 0  # on lanes that are gone
        self._epoch_rejected_told = 0
        self._handlers: dict[type, Callable[..., None]] = {
            m.Submit: self._submit,
            m.Cancel: self._cancel,
            m.Attach: self._attach,
            m.Detach: self._detach,
            m.NodeDraining: self._node_draining,
            m.RangesMoved: self._ranges_moved,
            m.Epoch: self._set_epoch,
            m.AskSequences: self._tell_sequences,
            m.Configure: self._configure,
        }

    def run(self) -> None:
        """Serve until the supervisor is gone."""
        while True:
            try:
                for message in self._link.receive():
                    self._handlers[type(message)](message)
                if not self._turn():
                    self._idle()
            except LinkClosed:
                return

    # -- one turn of the loop ------------------------------------------------------------------

    def _turn(self) -> bool:
        """Everything between two steps, then a step if there is one. Whether it made progress."""
        _, lost = self._fleet.hear()
        for error in lost:
            self._lose(error)
        self._admit()
        for sequence in (*self._fleet.house(self._running), *self._fleet.move_tails(self._running)):
            self._tell_route(sequence)
        self._move_ranges()
        self._fleet.set_wants(self._running)
        self._tell_capacity()
        self._tell_recomputed()
        self._tell_epoch_rejected()
        stepped = self._try_step()
        try:
            self._fleet.flush(lambda peer: self._attention.send_plan(Exchange(peer)))
        except PeerLost as error:
            self._lose(error)
            return True
        return stepped or self._make_room()

    def _idle(self) -> None:
        """Sleep until someone speaks: the supervisor, or an attention node."""
        self._port.wait(self._heard_or_lost, _IDLE_WAIT_S, fds=(self._link.fileno(),))

    def _heard_or_lost(self) -> bool:
        heard, lost = self._fleet.hear()
        for error in lost:
            self._lose(error)
        return heard or bool(lost)

    def _try_step(self) -> bool:
        by_name = {sequence.name: sequence for sequence in self._running}
        shares = schedule(
            self._fleet.candidates(self._running),
            self._fleet.unused_blocks(),
            self._shape.layout.block_tokens,
            self._limits,
        )
        scheduled = {share.sequence for share in shares}
        for sequence in self._running:
            sequence.stalled = sequence.name not in scheduled
        if not shares:
            return False
        batch = build([(by_name[share.sequence], share.tokens) for share in shares], self._fleet.peers)
        self._step += 1
        try:
            logits = self._forward(batch)
        except PeerLost as error:
            self._lose(error)
            return True
        lost = self._attention.finish()
        again = commit(batch, self._fleet.peers, self._shape.layout.block_tokens)
        self._note_recovery(batch, again)
        self._sample(batch, logits)
        for loss in lost:
            self._lose(loss)
        return True

    def _forward(self, batch: Batch) -> torch.Tensor:
        self._threads.set_for(len(batch.token_ids))
        self._attention.begin(self._step, batch.exchanges, batch.chunks)
        return self._model.forward(batch.token_ids, batch.positions, self._attention, batch.logit_rows)

    # -- tokens ----------------------------------------------------------------------------------

    def _sample(self, batch: Batch, logits: torch.Tensor) -> None:
        sequences = [row.sequence for row in batch.rows if row.sequence.samples]
        if not sequences:
            return
        tokens: list[m.Token] = []
        ended: list[tuple[Sequence, m.Finished]] = []
        chosen = sample_rows([sequence.sampler for sequence in sequences], logits)
        for sequence, sampled in zip(sequences, chosen, strict=True):
            sequence.tokens.append(sampled.token_id)
            reason = _reason_to_end(sequence)
            if reason != "stop":
                top = [m.TopToken(token, logprob) for token, logprob in sampled.top]
                tokens.append(m.Token(sequence.name, sampled.token_id, sampled.logprob, top))
            if reason:
                ended.append((sequence, _finished(sequence, reason)))
        if tokens:
            self._link.send(m.Produced(tokens))
        for sequence, message in ended:
            self._end(sequence, message)

    # -- recovery --------------------------------------------------------------------------------

    def _note_recovery(self, batch: Batch, again: Mapping[str, int]) -> None:
        """Holes that this step filled are closed; what was computed again is counted."""
        for row in batch.rows:
            sequence = row.sequence
            if self._fleet.close_filled_hole(sequence):
                self._tell_route(sequence)
            if again[sequence.name]:
                self._count_recomputed(sequence, again[sequence.name])
            if sequence.recovery is not None and not sequence.recovering:
                self._end_recovery(sequence, sequence.recovery)

    def _count_recomputed(self, sequence: Sequence, tokens: int) -> None:
        assert sequence.recovery is not None
        sequence.recovery.tokens += tokens
        name = sequence.recovery.cause.value
        setattr(self._recomputed, name, getattr(self._recomputed, name) + tokens)
        self._recomputed_told = False

    def _end_recovery(self, sequence: Sequence, recovery: Recovery) -> None:
        elapsed_s = time.monotonic() - recovery.since_s
        self._tell_recomputed()
        self._link.send(m.Recovered(sequence.name, recovery.cause, recovery.tokens, elapsed_s))
        sequence.recovery = None

    # -- sequences -------------------------------------------------------------------------------

    def _submit(self, message: m.Submit) -> None:
        try:
            sequence = self._new_sequence(message)
        except RequestRefused as refused:
            self._link.send(m.Failed(message.sequence, refused.code, str(refused)))
            return
        self._waiting.append(sequence)
        if sequence.completion_tokens >= sequence.max_tokens:
            self._end(sequence, _finished(sequence, "length"))
        elif message.kept:
            self._adopt(sequence, message.kept)
        self._refuse_impossible()

    def _adopt(self, sequence: Sequence, kept: list[m.KeptRange]) -> None:
        """Go on from what is there. It needs little memory beyond what it brings: it runs at once."""
        parts: dict[str, list[Part]] = {}
        for item in kept:
            parts.setdefault(item.node, []).append(Part(item.start, item.tokens))
        if self._fleet.adopt(sequence, parts):
            sequence.computed_tokens = max(sequence.computed_tokens, sequence.committed_tokens)
            self._recover(sequence, Cause.WEIGHT_NODE_LOST)
            tokens = sum(slot.held_tokens for slot in sequence.slots.values())
            self._link.send(m.Adopted(sequence.name, tokens))
            self._waiting.remove(sequence)
            self._start(sequence)

    def _new_sequence(self, message: m.Submit) -> Sequence:
        config = self._model.config
        prompt, said = message.prompt_token_ids, message.output_token_ids
        if not prompt:
            raise RequestRefused("INVALID_ARGUMENT", "prompt_token_ids is empty")
        for field, ids in ("prompt_token_ids", prompt), ("output_token_ids", said):
            if any(not 0 <= token < config.vocab_size for token in ids):
                raise RequestRefused(
                    "INVALID_ARGUMENT", f"{field} has an id outside 0..{config.vocab_size - 1}"
                )
        room = config.context_tokens - len(prompt)
        wanted = message.sampling.max_tokens
        if room < max(wanted, len(said), 1):
            raise RequestRefused(
                "INVALID_ARGUMENT",
                f"the context holds {config.context_tokens} tokens; the prompt has {len(prompt)} and"
                f" max_tokens asks for {wanted or 'at least 1'}",
            )
        if any(sequence.name == message.sequence for sequence in (*self._running, *self._waiting)):
            raise RequestRefused("ALREADY_EXISTS", f"a sequence named {message.sequence} is live")
        try:
            message.sampling.validate(config.vocab_size)
        except ValueError as error:
            raise RequestRefused("INVALID_ARGUMENT", str(error)) from error
        sequence = Sequence(
            name=message.sequence,
            tokens=[*prompt, *said],
            prompt_tokens=len(prompt),
            max_tokens=wanted or room,
            sampler=Sampler(message.sampling, prompt, config.vocab_size, config.eos_token_ids, said),
            arrived_s=time.monotonic(),
            # Whoever said the newest token had computed all before it.
            computed_tokens=len(prompt) + len(said) - 1 if said else 0,
        )
        self._recover(sequence, Cause.WEIGHT_NODE_LOST)
        return sequence

    def _cancel(self, message: m.Cancel) -> None:
        for sequence in (*self._running, *self._waiting):
            if sequence.name == message.sequence:
                self._end(sequence, _finished(sequence, "abort"))
                return

    def _end(self, sequence: Sequence, message: m.Finished | m.Failed) -> None:
        had_route = sequence.route is not None
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._fleet.release(sequence)
        self._link.send(message)
        if had_route:
            self._tell_route(sequence)

    def _admit(self) -> None:
        """Start waiting sequences, oldest first, while their tokens fit beside the running ones'.

        Those that wait for room to be recovered in come before all of them.
        """
        if any(sequence.node not in self._fleet.peers for sequence in self._running):
            return
        while self._waiting and len(self._running) < self._limits.max_sequences:
            sequence = self._waiting[0]
            views = [view for view in self._fleet.views(self._running) if not view.draining]
            available = sum(view.available_blocks for view in views)
            block_tokens = self._shape.layout.block_tokens
            if not admits(sequence.pending_tokens, available, len(self._running), block_tokens):
                return
            if not self._fleet.start(sequence, self._running):
                return
            self._start(self._waiting.popleft())

    def _start(self, sequence: Sequence) -> None:
        self._running.append(sequence)
        self._running.sort(key=lambda sequence: sequence.arrived_s)
        sequence.ran_here = True
        self._tell_route(sequence)

    def _refuse_impossible(self) -> None:
        """Waiting sequences that all attached nodes together could never hold.

        One that ran before, here or elsewhere, did fit when all nodes were there: it waits for them.
        """
        capacities = [peer.ledger.capacity_blocks for peer in self._fleet.peers.values() if not peer.draining]
        if not capacities:
            return
        block_tokens = self._shape.layout.block_tokens
        # Every node but one may end in a block that its range does not fill.
        held = (sum(capacities) - (len(capacities) - 1)) * block_tokens
        for sequence in [sequence for sequence in self._waiting if not sequence.ran_here]:
            asked = sequence.sampler.params.max_tokens
            total = sequence.prompt_tokens + max(asked, 1)
            if never_fits(total, [held // block_tokens], block_tokens) and not sequence.computed_tokens:
                what = f"{sequence.prompt_tokens} prompt tokens and max_tokens {max(asked, 1)}"
                message = (
                    f"{what} need {total} tokens of KV; {len(capacities)} attention nodes hold {held}."
                    " Lower max_tokens, or add nodes: flumectl scale attention --replicas N"
                )
                self._end(sequence, m.Failed(sequence.name, "RESOURCE_EXHAUSTED", message))
            elif not asked:
                sequence.max_tokens = min(sequence.max_tokens, held - sequence.prompt_tokens)

    def _make_room(self) -> bool:
        """Nobody could step: if it is for want of memory, the youngest gives way. Whether one did.

        It is computed again from its tokens once there is room; its stream only pauses.
        """
        stuck = self._running and all(
            peer.ledger.exhausted for peer in self._fleet.peers.values() if not peer.leaving
        )
        if not stuck or not self._fleet.peers:
            return False
        youngest = self._running[-1]
        if len(self._running) == 1 and youngest.preempted_at_tokens == len(youngest.tokens):
            if self._fleet.capacity_blocks * self._shape.layout.block_tokens > len(youngest.tokens):
                return False  # others hold the memory: wait for them
            message = f"KV memory is full at {len(youngest.tokens)} tokens and nothing else can be freed"
            self._end(youngest, m.Failed(youngest.name, "RESOURCE_EXHAUSTED", message))
            return True
        youngest.preempted_at_tokens = len(youngest.tokens)
        self._send_back(youngest, Cause.PREEMPTED)
        return True

    def _send_back(self, sequence: Sequence, cause: Cause) -> None:
        """From running to the head of the waiting line, holding nothing."""
        self._running.remove(sequence)
        self._fleet.release(sequence)
        self._recover(sequence, cause)
        self._waiting.appendleft(sequence)

    # -- attention nodes -------------------------------------------------------------------------

    def _attach(self, message: m.Attach) -> None:
        if message.node in self._fleet.peers:
            self._lose(PeerLost(message.node, "attached again"))
        lane = self._port.connect(
            message.node,
            message.worker_address,
            self._shape,
            Side.WEIGHT,
            send_lane=message.send_lane,
            receive_lane=message.receive_lane,
        )
        self._fleet.peers[message.node] = Peer(message.node, lane, message.capacity_blocks, message.epoch)
        self._link.send(m.LaneUp(message.node))
        self._refuse_impossible()

    def _detach(self, message: m.Detach) -> None:
        if message.node in self._fleet.peers:
            self._lose(PeerLost(message.node, message.reason))

    def _node_draining(self, message: m.NodeDraining) -> None:
        peer = self._fleet.peers.get(message.node)
        if peer is not None:
            peer.leaving, peer.evacuating = message.draining, message.evacuating

    def _move_ranges(self) -> None:
        """Have closed ranges pulled away from nodes that must be empty soon, one batch at a time."""
        if self._moving is not None or time.monotonic() < self._move_at_s:
            return
        batch = self._fleet.next_moves(self._running)
        if batch is not None:
            self._moving = batch, self._fleet.peers[batch.target]
            ranges = [m.MovedRange(item.sequence, item.start, item.tokens) for item in batch.ranges]
            self._link.send(m.MoveRanges(batch.source, batch.target, ranges))

    def _ranges_moved(self, message: m.RangesMoved) -> None:
        """This is a token boundary: swap the routes of what is whole on its new node."""
        assert self._moving is not None
        (batch, target), self._moving = self._moving, None
        here = {(item.sequence, item.start) for item in message.ranges}
        if self._fleet.peers.get(batch.target) is not target:
            return  # another process by now, or none
        by_name = {sequence.name: sequence for sequence in self._running}
        for item in batch.ranges:
            if (item.sequence, item.start) in here:
                sequence = by_name.get(item.sequence)
                if self._fleet.swap(sequence, item, batch.target) and sequence is not None:
                    self._tell_route(sequence)
        if not here:
            self._move_at_s = time.monotonic() + RETRY_S

    def _lose(self, error: PeerLost) -> None:
        """A lane is gone: tokens that were stored there are computed again, nothing else is.

        Sequences that had none there do not notice. One of which nothing is left starts over.
        """
        peer, affected = self._fleet.drop(error.node, self._running)
        if peer is None:
            return
        peer.lane.close()
        self._attention.forget(peer)
        self._epoch_rejected += peer.epoch_rejected
        for sequence in [sequence for sequence in self._running[::-1] if sequence.name in affected]:
            if any(slot.held_tokens for slot in sequence.slots.values()):
                self._recover(sequence, Cause.NODE_LOST)
            else:
                self._send_back(sequence, Cause.NODE_LOST)
        self._link.send(m.LaneLost(error.node, error.reason, len(affected), sum(affected.values())))

    def _recover(self, sequence: Sequence, cause: Cause) -> None:
        """From now on the sequence catches up with where it was, if it lost anything.

        More may be lost meanwhile: the tokens that follow count under the newest cause.
        """
        if sequence.recovery is not None:
            sequence.recovery.cause = cause
        elif sequence.recovering:
            sequence.recovery = Recovery(cause, time.monotonic())

    # -- what the supervisor hears ---------------------------------------------------------------

    def _set_epoch(self, message: m.Epoch) -> None:
        self._fleet.epoch = self._attention.epoch = message.epoch

    def _configure(self, message: m.Configure) -> None:
        self._limits = replace(self._limits, mixed_prefill_tokens=message.mixed_prefill_tokens)
        self._fleet.balance = replace(self._fleet.balance, margin_tokens=message.tail_margin_tokens)
        self._attention.timeout_s = message.step_timeout_s

    def _tell_route(self, sequence: Sequence) -> None:
        self._link.send(m.RouteChanged(sequence.name, _ranges(sequence)))

    def _tell_capacity(self) -> None:
        capacity = (
            self._fleet.capacity_blocks * self._shape.layout.block_tokens,
            len(self._running),
            len(self._waiting),
        )
        if capacity != self._told_capacity:
            self._told_capacity = capacity
            self._link.send(m.Capacity(*capacity))

    def _tell_recomputed(self) -> None:
        if not self._recomputed_told:
            self._recomputed_told = True
            self._link.send(self._recomputed)

    def _tell_epoch_rejected(self) -> None:
        total = self._epoch_rejected + sum(peer.epoch_rejected for peer in self._fleet.peers.values())
        if total != self._epoch_rejected_told:
            self._epoch_rejected_told = total
            self._link.send(m.EpochRejected(total))

    def _tell_sequences(self, message: m.AskSequences) -> None:
        now = time.monotonic()
        states = [
            m.SequenceState(
                sequence=sequence.name,
                state=sequence.state,
                prompt_tokens=sequence.prompt_tokens,
                completion_tokens=sequence.completion_tokens,
                age_s=now - sequence.arrived_s,
                ranges=_ranges(sequence),
            )
            for sequence in (*self._running, *self._waiting)
        ]
        self._link.send(m.Sequences(message.number, states))


def _reason_to_end(sequence: Sequence) -> str | None:
    reason = sequence.sampler.finish_reason(sequence.tokens[-1])
    if reason is FinishReason.STOP:
        return "stop"
    return "length" if sequence.completion_tokens >= sequence.max_tokens else None


def _ranges(sequence: Sequence) -> list[m.RangeInfo]:
    if sequence.route is None:
        return []
    return [m.RangeInfo(item.start, item.end, item.node) for item in sequence.route.ranges]


def _finished(sequence: Sequence, reason: str) -> m.Finished:
    return m.Finished(
        sequence=sequence.name,
        reason=reason,
        prompt_tokens=sequence.prompt_tokens,
        completion_tokens=sequence.completion_tokens,
        stop_token_id=sequence.tokens[-1] if reason == "stop" else 0,
    )
