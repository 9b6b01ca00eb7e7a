"""The weight node's engine: a plain loop that owns the model, the UCX worker and the sequences.

Between two steps it listens (to its supervisor and to attention nodes), ends, admits and places
sequences; a step is one forward pass. Nothing in a step waits for the supervisor, and nothing the
supervisor does waits for a step.

What goes wrong with one sequence ends that sequence: no token to choose, an exception in its sampler, in a
message about it, or in a step of it alone. A step of several that raises is abandoned, and its sequences run
alone until each has a token or has failed. Anything else ends the engine, loudly.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from flume_common.engine_link import EngineLink, LinkClosed
from flume_common.lanes import Port, Side
from flume_common.wire import LaneShape
from flume_kernels.gpu.shared_memory import MappingFailed

from flume_weight import faults
from flume_weight import messages as m
from flume_weight.batch import Batch, build, commit
from flume_weight.cuda.errors import StepError
from flume_weight.errors import PeerLost, PeerSilent, RequestRefused
from flume_weight.evacuation import Evacuation
from flume_weight.failing import (
    canary_has_no_room,
    described,
    message_failed,
    no_lane,
    no_token,
    nodes_lost,
    step_failed,
)
from flume_weight.fleet import Fleet, needs
from flume_weight.isolation import Isolation
from flume_weight.model import ModelConfig
from flume_weight.pace import PaceEstimate
from flume_weight.passes import Passes
from flume_weight.peer import PATIENCE_S, Peer
from flume_weight.placement import Balance
from flume_weight.range_attention import Exchange
from flume_weight.reports import Reports
from flume_weight.requests import new_sequence
from flume_weight.roster import Roster
from flume_weight.sampling import FinishReason, InvalidLogits, NotSampled
from flume_weight.scheduler import Share, StepLimits, TimeBudget, schedule
from flume_weight.scores import Scores
from flume_weight.sequence import Cause, Recovery, Sequence
from flume_weight.silence import Silence
from flume_weight.storage import Part
from flume_weight.unserved import Unserved

_IDLE_WAIT_S = 5.0
_NODES_LOST_TO_SUSPECT = 2  # attention nodes, in steps of one sequence, without a new token
_MOST_FAILED_STEPS = 8  # in a row, before the engine itself is taken to be at fault


class WeightEngine:
    """One engine; `run` returns when the supervisor closes the link."""

    def __init__(
        self,
        link: EngineLink[m.Inbound],
        port: Port,
        config: ModelConfig,
        passes: Passes,
        shape: LaneShape,
        *,
        node: str,
        limits: StepLimits,
        balance: Balance,
    ) -> None:
        self._link = link
        self._port = port
        self._config = config
        self._passes = passes
        self._shape = shape
        self._limits = limits
        self._step_target_s = 0.0  # of steps with prompt tokens, as told by the supervisor; 0: none
        self._pace = PaceEstimate()
        self._fleet = Fleet(shape.layout, balance, node)
        self._attention = passes.attention
        self._roster = Roster(self._fleet, shape.layout.block_tokens)
        self._silence = Silence(self._fleet, self._roster)
        self._attention.may_leave = self._silence.may_leave
        self._progress = self._attention.progress = link.progress
        self._evacuation = Evacuation(self._fleet)
        self._unserved = Unserved()
        self._isolation = Isolation()
        self._failed_steps = 0  # in a row
        self._in_step = False
        self._step_fault = faults.step_fault()
        self._reports = Reports(link)
        self._lanes = itertools.count(1)  # numbers are never used twice
        self._step = 0
        self._stages_changed = False  # of some sequence, since they were last reported
        self._epoch_rejected = 0  # on lanes that are gone
        self._handlers: dict[type, Callable[..., None]] = {
            m.Submit: self._submit,
            m.Cancel: self._cancel,
            m.OpenLane: self._open_lane,
            m.CloseLane: self._close_lane,
            m.Attach: self._attach,
            m.Detach: self._detach,
            m.NodeDraining: self._node_draining,
            m.RangesMoved: self._ranges_moved,
            m.Epoch: self._set_epoch,
            m.Configure: self._configure,
        }

    def run(self) -> None:
        """Serve until the supervisor is gone. What is raised here has been reported."""
        try:
            while True:
                for message in self._link.receive():
                    self._handle(message)
                if not self._turn():
                    self._idle()
        except LinkClosed:
            return
        except BaseException as error:
            self._reports.failed(error, in_step=self._in_step)
            raise

    def _handle(self, message: m.Inbound) -> None:
        """Take in a message. One that fails is the end of the sequence, or of the lane, that it is about."""
        try:
            self._handlers[type(message)](message)
        except (LinkClosed, StepError):
            raise
        except Exception as error:
            match message:
                case m.Submit(sequence=name) | m.Cancel(sequence=name):
                    self._reports.contained("message_failed", error, name)
                    self._drop(name, message_failed(name, type(message).__name__, error))
                case m.Attach(node=node):
                    self._reports.contained("attach_failed", error, attention_node=node)
                    self._lose(PeerLost(node, described(error)))
                    self._link.send(m.LaneLost(node, described(error), 0, 0))
                case _:
                    raise

    def _drop(self, name: str, message: m.Failed) -> None:
        sequence = self._roster.find(name)
        if sequence is None:
            self._link.send(message)
        else:
            self._end(sequence, message)

    # -- one turn of the loop ------------------------------------------------------------------

    def _turn(self) -> bool:
        """Everything between two steps, then a step if there is one. Whether it made progress."""
        self._in_step = False
        self._port.progress()  # a step without queries may not have heard what has long been said
        _, lost = self._fleet.hear()
        for error in (*lost, *self._silence.overdue(self._attention.timeout_s)):
            self._lose(error)
        if self._roster.admit(self._limits):
            self._stages_changed = True
        self._end_unserved()
        running = self._roster.running
        self._fleet.house(running)
        self._fleet.move_tails(running)
        if (moves := self._evacuation.next(running)) is not None:
            self._link.send(moves)
        self._fleet.set_wants(running)
        self._report()
        stepped = self._try_step()
        try:
            self._fleet.flush(lambda peer: self._attention.send_plan(Exchange(peer)))
        except PeerLost as error:
            self._lose(error)
            return True
        except PeerSilent as error:
            self._link.send(self._silence.set_aside(error))
            return True
        return stepped or self._make_room()

    def _report(self) -> None:
        if self._stages_changed:
            self._stages_changed = False
            self._reports.sequences(self._roster)
        # A canary is nobody's request: it is not written to etcd, and not counted.
        self._reports.routes(sequence for sequence in self._roster if not sequence.canary)
        capacity_tokens = self._fleet.capacity_blocks * self._shape.layout.block_tokens
        running, waiting = map(_num_requests, (self._roster.running, self._roster.waiting))
        self._reports.capacity(capacity_tokens, running, waiting)
        self._reports.recomputed()
        if self._passes.microbatching is not None:
            self._reports.step_model(self._passes.microbatching.model)
        self._reports.logit_rows()
        peers = self._fleet.peers.values()
        self._reports.epoch_rejected(self._epoch_rejected + sum(peer.epoch_rejected for peer in peers))

    def _idle(self) -> None:
        """Sleep until someone speaks: the supervisor, or an attention node; or has been silent too long."""
        self._progress.idle()
        wait_s = min(
            self._silence.next_look_s(self._attention.timeout_s),
            self._unserved.next_look_s(self._roster.waiting, time.monotonic()),
            _IDLE_WAIT_S,
        )
        self._port.wait(self._heard_or_lost, wait_s, fds=(self._link.fileno(),))

    def _heard_or_lost(self) -> bool:
        heard, lost = self._fleet.hear()
        for error in lost:
            self._lose(error)
        return heard or bool(lost)

    def _try_step(self) -> bool:
        by_name = self._roster.by_name()
        shares = self._next_shares()
        if not shares:
            return False
        self._in_step = True
        self._reports.step_sequences([share.sequence for share in shares])
        self._step += 1
        began_s = time.perf_counter()
        try:
            batch = build([(by_name[share.sequence], share.tokens) for share in shares], self._fleet.peers)
            self._begin_step(batch)
            if self._step_fault is not None:
                self._step_fault(batch.token_ids)
            chosen = self._passes.of(batch)
            scores = chosen.forward(self._step, batch)
        except PeerLost as error:
            guilty = self._blame([by_name[share.sequence] for share in shares], error.node)
            self._lose(error)
            if guilty is not None:
                self._end(guilty, nodes_lost(guilty, error))
            return True
        except PeerSilent as error:
            self._link.send(self._silence.set_aside(error))
            return True
        except (LinkClosed, StepError):
            raise
        except Exception as error:
            self._contain_step([by_name[share.sequence] for share in shares], error)
            return True
        self._failed_steps = 0
        for exchange in batch.exchanges:
            exchange.peer.patience_s = PATIENCE_S
        lost = chosen.finish()
        again = commit(batch, self._fleet.peers, self._shape.layout.block_tokens)
        self._note_recovery(batch, again)
        self._sample(batch, scores)
        if batch.chunks:
            attended = float(batch.positions.sum())
            self._pace.note(len(batch.token_ids), attended, time.perf_counter() - began_s)
        for loss in lost:
            self._lose(loss)
        return True

    def _time_budget(self) -> TimeBudget | None:
        if not self._step_target_s:
            return None
        return TimeBudget(
            self._pace.pace, self._step_target_s, self._pace.most_tokens, probe=self._pace.probes
        )

    def _begin_step(self, batch: Batch) -> None:
        prefill_tokens = sum(chunk.stop - chunk.start for chunk in batch.chunks)
        self._progress.begin_step(self._step, self._shape.layout.num_layers, prefill_tokens, len(batch.rows))
        fresh = [row.sequence for row in batch.rows if not row.sequence.begun]
        for sequence in fresh:
            sequence.begun = True
        if fresh:  # now, as the step may be long
            self._reports.sequences(self._roster)
        self._stages_changed = prefill_tokens > 0

    def _next_shares(self) -> list[Share]:
        """Schedule the next step; nothing when no sequence can have one."""
        running = self._roster.running
        suspects = {sequence.name for sequence in running if sequence.suspect}
        every = self._fleet.candidates(running)
        for candidates in self._isolation.groups(every, suspects):
            shares = schedule(
                candidates,
                self._fleet.unused_blocks(),
                self._shape.layout.block_tokens,
                self._limits,
                self._time_budget(),
            )
            scheduled = {share.sequence for share in shares}
            # One that is left for another step does not wait for memory.
            left = {each.sequence for each in every if suspects} - {each.sequence for each in candidates}
            for sequence in running:
                stalled = sequence.name not in scheduled
                if stalled != sequence.stalled and sequence.name not in left:
                    sequence.stalled, self._stages_changed = stalled, True
            if shares:
                return shares
        return []

    def _contain_step(self, sequences: Seq[Sequence], error: Exception) -> None:
        """Abandon a step that raised; nodes undo what they have of it when the next one begins.

        Of several sequences each must run alone now; one that did so ends. Raises the error again where
        the device may not be used any more, and when one step after another fails.
        """
        self._failed_steps += 1
        if not self._passes.containable or self._failed_steps > _MOST_FAILED_STEPS:
            raise error
        self._reports.contained("step_failed", error, *(sequence.name for sequence in sequences))
        if len(sequences) == 1:
            self._end(sequences[0], step_failed(sequences[0], error))
            return
        for sequence in sequences:
            sequence.suspect = True

    def _blame(self, sequences: Seq[Sequence], node: str) -> Sequence | None:
        """Count a node that was lost in a step of these. Returns the one that is to be taken for the cause.

        Nodes die for many reasons, so it takes several, in a row and without a new token; and in the end
        the sequence must have been alone with the node.
        """
        for sequence in sequences:
            if needs(sequence, (node,)):
                sequence.nodes_lost += 1
                sequence.suspect = sequence.suspect or sequence.nodes_lost >= _NODES_LOST_TO_SUSPECT
        alone = sequences[0] if len(sequences) == 1 else None
        return alone if alone is not None and alone.nodes_lost > _NODES_LOST_TO_SUSPECT else None

    # -- tokens ----------------------------------------------------------------------------------

    def _sample(self, batch: Batch, scores: Scores) -> None:
        sequences = [row.sequence for row in batch.rows if row.sequence.samples]
        if not sequences:
            return
        tokens: list[m.Token] = []
        ended: list[tuple[Sequence, m.Finished | m.Failed]] = []
        chosen = scores.choose([sequence.sampler for sequence in sequences])
        self._reports.count_logit_rows(scores.rows_read)
        for sequence, outcome in zip(sequences, chosen, strict=True):
            sequence.suspect, sequence.nodes_lost = False, 0
            if isinstance(outcome, NotSampled):
                if not isinstance(outcome.error, InvalidLogits):
                    self._reports.contained("sampling_failed", outcome.error, sequence.name)
                ended.append((sequence, no_token(sequence, outcome.error)))
                continue
            sequence.tokens.append(outcome.token_id)
            reason = _reason_to_end(sequence)
            if reason != "stop":
                top = [m.TopToken(token, logprob) for token, logprob in outcome.top]
                tokens.append(m.Token(sequence.name, outcome.token_id, outcome.logprob, top))
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
            self._fleet.close_filled_hole(sequence)
            if again[sequence.name]:
                self._reports.count_recomputed(sequence, again[sequence.name])
            if sequence.recovery is not None and not sequence.recovering:
                self._reports.recovered(sequence)
                self._stages_changed = True

    # -- sequences -------------------------------------------------------------------------------

    def _submit(self, message: m.Submit) -> None:
        try:
            if self._roster.find(message.sequence) is not None:
                raise RequestRefused("ALREADY_EXISTS", f"a sequence named {message.sequence} is live")
            sequence = new_sequence(message, self._config, time.monotonic())
        except RequestRefused as refused:
            self._link.send(m.Failed(message.sequence, refused.code, str(refused)))
            return
        if sequence.canary and self._roster.waiting:
            self._link.send(canary_has_no_room(sequence))
            return
        _recover(sequence, Cause.WEIGHT_NODE_LOST)
        self._roster.waiting.append(sequence)
        self._stages_changed = True
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
            _recover(sequence, Cause.WEIGHT_NODE_LOST)
            tokens = sum(slot.held_tokens for slot in sequence.slots.values())
            self._link.send(m.Adopted(sequence.name, tokens))
            self._roster.run(sequence)

    def _cancel(self, message: m.Cancel) -> None:
        sequence = self._roster.find(message.sequence)
        if sequence is not None:
            self._end(sequence, _finished(sequence, "abort"))

    def _end(self, sequence: Sequence, message: m.Finished | m.Failed) -> None:
        self._roster.remove(sequence)
        self._link.send(message)

    def _end_unserved(self) -> None:
        """End sequences that wait for a lane for too long, and a canary that would have to wait for anything.

        What has just been admitted waits no more, so a canary is in nobody's way.
        """
        peers, now_s = self._fleet.peers.values(), time.monotonic()
        num_open = sum(not peer.draining for peer in peers)
        self._unserved.note(now_s, lanes=len(peers), open_lanes=num_open)
        canaries = [sequence for sequence in self._roster.waiting if sequence.canary]
        for sequence in canaries:
            self._end(sequence, canary_has_no_room(sequence) if num_open else no_lane(sequence, len(peers)))
        for sequence in self._unserved.overdue(self._roster.waiting, now_s):
            self._end(sequence, no_lane(sequence, len(peers)))

    def _refuse_impossible(self) -> None:
        for sequence, message in self._roster.impossible():
            self._end(sequence, m.Failed(sequence.name, "RESOURCE_EXHAUSTED", message))

    def _make_room(self) -> bool:
        """Nobody could step: if it is for want of memory, the youngest gives way. Whether one did."""
        youngest = self._roster.to_give_way()
        if youngest is None or self._fleet.silent:
            return False
        if self._roster.gave_way_in_vain(youngest):
            message = f"KV memory is full at {len(youngest.tokens)} tokens and nothing else can be freed"
            self._end(youngest, m.Failed(youngest.name, "RESOURCE_EXHAUSTED", message))
            return True
        youngest.preempted_at_tokens = len(youngest.tokens)
        self._send_back(youngest, Cause.PREEMPTED)
        return True

    def _send_back(self, sequence: Sequence, cause: Cause) -> None:
        self._roster.send_back(sequence)
        self._stages_changed = True
        _recover(sequence, cause)

    # -- attention nodes -------------------------------------------------------------------------

    def _open_lane(self, _: m.OpenLane) -> None:
        lane = next(self._lanes)
        self._link.send(m.LaneOpen(lane, self._port.berth(lane)))

    def _close_lane(self, message: m.CloseLane) -> None:
        self._port.leave(message.lane)

    def _attach(self, message: m.Attach) -> None:
        if message.node in self._fleet.peers:
            self._lose(PeerLost(message.node, "attached again"), replaced=True)
        lane = self._port.connect(
            message.node,
            message.worker_address,
            self._shape,
            Side.WEIGHT,
            send_lane=message.send_lane,
            receive_lane=message.receive_lane,
        )
        peer = Peer(message.node, lane, message.capacity_blocks, message.epoch)
        self._fleet.peers[message.node] = peer
        why_not = self._map_region(peer, message.direct_region)
        self._link.send(m.LaneUp(message.node, "direct" if peer.region else "frames", why_not))
        self._refuse_impossible()

    def _map_region(self, peer: Peer, handle: bytes) -> str:
        """Into the peer, where there is one. Why not, if it was offered; the lane is as good without."""
        if not handle or self._passes.map_region is None:
            return ""
        try:
            peer.region = self._passes.map_region(handle)
        except MappingFailed as error:
            return str(error)
        return ""

    def _detach(self, message: m.Detach) -> None:
        if message.node in self._fleet.peers:
            self._lose(PeerLost(message.node, message.reason))

    def _node_draining(self, message: m.NodeDraining) -> None:
        peer = self._fleet.peers.get(message.node)
        if peer is not None:
            peer.leaving, peer.evacuating = message.draining, message.evacuating

    def _ranges_moved(self, message: m.RangesMoved) -> None:
        """This is a token boundary: the routes of what is whole on its new node are swapped."""
        self._evacuation.moved(message, self._roster.by_name())

    def _lose(self, error: PeerLost, *, replaced: bool = False) -> None:
        """A lane is gone: tokens that were stored there are computed again, nothing else is.

        Sequences that had none there do not notice. One of which nothing is left starts over.
        """
        peer, affected = self._fleet.drop(error.node, self._roster.running)
        if peer is None:
            return
        peer.lane.close()
        self._passes.forget(peer)
        self._epoch_rejected += peer.epoch_rejected
        for sequence in [sequence for sequence in self._roster.running[::-1] if sequence.name in affected]:
            if any(slot.held_tokens for slot in sequence.slots.values()):
                _recover(sequence, Cause.NODE_LOST)
            else:
                self._send_back(sequence, Cause.NODE_LOST)
        lost_tokens = sum(affected.values())
        self._stages_changed = self._stages_changed or bool(affected)
        self._link.send(m.LaneLost(error.node, error.reason, len(affected), lost_tokens, replaced))

    # -- settings ------------------------------------------------------------------------------

    def _set_epoch(self, message: m.Epoch) -> None:
        self._fleet.epoch = self._attention.epoch = message.epoch
        for peer in self._fleet.peers.values():
            peer.tell_anew()  # a lane that says nothing would be taken for one of an epoch that is over

    def _configure(self, message: m.Configure) -> None:
        self._limits = replace(self._limits, mixed_prefill_tokens=message.mixed_prefill_tokens)
        self._fleet.balance = replace(self._fleet.balance, margin_tokens=message.tail_margin_tokens)
        self._attention.timeout_s = message.step_timeout_s
        self._unserved.wait_s = message.unavailable_wait_s
        self._step_target_s = message.step_target_ms / 1e3
        if self._passes.microbatching is not None:
            self._passes.microbatching.use(message.microbatches)


def _recover(sequence: Sequence, cause: Cause) -> None:
    """From now on the sequence catches up with where it was, if it lost anything.

    More may be lost meanwhile: the tokens that follow count under the newest cause.
    """
    if sequence.recovery is not None:
        sequence.recovery.cause = cause
    elif sequence.recovering:
        sequence.recovery = Recovery(cause, time.monotonic())


def _reason_to_end(sequence: Sequence) -> str | None:
    reason = sequence.sampler.finish_reason(sequence.tokens[-1])
    if reason is FinishReason.STOP:
        return "stop"
    return "length" if sequence.completion_tokens >= sequence.max_tokens else None


def _finished(sequence: Sequence, reason: str) -> m.Finished:
    return m.Finished(
        sequence=sequence.name,
        reason=reason,
        prompt_tokens=sequence.prompt_tokens,
        completion_tokens=sequence.completion_tokens,
        stop_token_id=sequence.tokens[-1] if reason == "stop" else 0,
    )


def _num_requests(sequences: Iterable[Sequence]) -> int:
    return sum(not sequence.canary for sequence in sequences)
