"""The weight node's engine: a plain loop that owns the model, the UCX worker and the sequences.

Between two steps it listens (to its supervisor and to attention nodes), ends, admits and places
sequences; a step is one forward pass. Nothing in a step waits for the supervisor, and nothing the
supervisor does waits for a step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch
from flume_common.engine_link import EngineLink, LinkClosed
from flume_common.lanes import Port, Side
from flume_common.wire import LaneShape

from flume_weight import messages as m
from flume_weight.batch import Batch, build, commit
from flume_weight.errors import PeerLost, RequestRefused
from flume_weight.fleet import Fleet
from flume_weight.model import Transformer
from flume_weight.peer import Peer
from flume_weight.placement import Balance, never_fits
from flume_weight.range_attention import Exchange, RangeAttention
from flume_weight.sampling import FinishReason, Sampler, sample_rows
from flume_weight.scheduler import StepLimits, admits, schedule
from flume_weight.sequence import Sequence
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
        self._step = 0
        self._told_capacity: tuple[int, int, int] | None = None
        self._handlers: dict[type, Callable[..., None]] = {
            m.Submit: self._submit,
            m.Cancel: self._cancel,
            m.Attach: self._attach,
            m.Detach: self._detach,
            m.NodeDraining: self._node_draining,
            m.Epoch: self._set_epoch,
            m.AskSequences: self._tell_sequences,
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
        for sequence in self._fleet.move_tails(self._running):
            self._tell_route(sequence)
        self._fleet.set_wants(self._running)
        self._tell_capacity()
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
        commit(batch, self._fleet.peers, self._shape.layout.block_tokens)
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
        # A row that samples fed its sequence's newest token; committing it left nothing pending.
        sequences = [row.sequence for row in batch.rows if not row.sequence.pending_tokens]
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

    # -- sequences -------------------------------------------------------------------------------

    def _submit(self, message: m.Submit) -> None:
        try:
            sequence = self._new_sequence(message)
        except RequestRefused as refused:
            self._link.send(m.Failed(message.sequence, refused.code, str(refused)))
            return
        self._waiting.append(sequence)
        self._refuse_impossible()

    def _new_sequence(self, message: m.Submit) -> Sequence:
        config = self._model.config
        prompt = message.prompt_token_ids
        if not prompt:
            raise RequestRefused("INVALID_ARGUMENT", "prompt_token_ids is empty")
        if any(not 0 <= token < config.vocab_size for token in prompt):
            raise RequestRefused(
                "INVALID_ARGUMENT", f"prompt_token_ids has an id outside 0..{config.vocab_size - 1}"
            )
        room = config.context_tokens - len(prompt)
        wanted = message.sampling.max_tokens
        if room < max(wanted, 1):
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
        return Sequence(
            name=message.sequence,
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            max_tokens=wanted or room,
            sampler=Sampler(message.sampling, prompt, config.vocab_size, config.eos_token_ids),
            arrived_s=time.monotonic(),
        )

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
        """Start waiting sequences, oldest first, while their tokens fit beside the running ones'."""
        while self._waiting and len(self._running) < self._limits.max_sequences:
            sequence = self._waiting[0]
            views = [view for view in self._fleet.views(self._running) if not view.draining]
            available = sum(view.available_blocks for view in views)
            block_tokens = self._shape.layout.block_tokens
            if not admits(sequence.pending_tokens, available, len(self._running), block_tokens):
                return
            if not self._fleet.start(sequence, self._running):
                return
            self._running.append(self._waiting.popleft())
            self._running.sort(key=lambda sequence: sequence.arrived_s)
            self._tell_route(sequence)

    def _refuse_impossible(self) -> None:
        """Waiting sequences that all attached nodes together could never hold."""
        capacities = [peer.ledger.capacity_blocks for peer in self._fleet.peers.values() if not peer.draining]
        if not capacities:
            return
        block_tokens = self._shape.layout.block_tokens
        # Every node but one may end in a block that its range does not fill.
        held = (sum(capacities) - (len(capacities) - 1)) * block_tokens
        for sequence in list(self._waiting):
            asked = sequence.sampler.params.max_tokens
            total = sequence.prompt_tokens + max(asked, 1)
            if never_fits(total, [held // block_tokens], block_tokens):
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
        self._send_back(youngest)
        return True

    def _send_back(self, sequence: Sequence) -> None:
        """From running to the head of the waiting line, holding nothing."""
        self._running.remove(sequence)
        self._fleet.release(sequence)
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
        self._fleet.peers[message.node] = Peer(message.node, lane, message.capacity_blocks)
        self._link.send(m.LaneUp(message.node))
        self._refuse_impossible()

    def _detach(self, message: m.Detach) -> None:
        if message.node in self._fleet.peers:
            self._lose(PeerLost(message.node, message.reason))

    def _node_draining(self, message: m.NodeDraining) -> None:
        peer = self._fleet.peers.get(message.node)
        if peer is not None:
            peer.leaving = message.draining

    def _lose(self, error: PeerLost) -> None:
        """A lane is gone: sequences that had a part there are computed again, the others do not notice."""
        peer, affected = self._fleet.drop(error.node, self._running)
        if peer is None:
            return
        peer.lane.close()
        self._attention.forget(peer)
        for sequence in reversed(affected):
            self._send_back(sequence)
        self._link.send(m.LaneLost(error.node, error.reason, len(affected)))
        self._refuse_impossible()

    # -- what the supervisor hears ---------------------------------------------------------------

    def _set_epoch(self, message: m.Epoch) -> None:
        self._fleet.epoch = self._attention.epoch = message.epoch

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
