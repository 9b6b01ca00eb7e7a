"""Who runs, who waits, and who gives way: the sequences of a weight engine between two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from flume_weight.fleet import Fleet
from flume_weight.placement import fits_empty
from flume_weight.scheduler import StepLimits, admits
from flume_weight.sequence import Sequence


class Roster:
    """`running` is in order of arrival; those that wait for room to be recovered in wait at the head."""

    def __init__(self, fleet: Fleet, block_tokens: int) -> None:
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._fleet = fleet
        self._block_tokens = block_tokens

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def find(self, name: str) -> Sequence | None:
        return next((sequence for sequence in self if sequence.name == name), None)

    def by_name(self) -> dict[str, Sequence]:
        """Those that run."""
        return {sequence.name: sequence for sequence in self.running}

    def run(self, sequence: Sequence) -> None:
        """From waiting to running."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.running.sort(key=lambda sequence: sequence.arrived_s)
        sequence.ran_here = True

    def send_back(self, sequence: Sequence) -> None:
        """From running to the head of the waiting line, holding nothing."""
        self.running.remove(sequence)
        self._fleet.release(sequence)
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It ended, and holds nothing any more."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._fleet.release(sequence)

    def admit(self, limits: StepLimits) -> int:
        """Start waiting sequences, in order, while their tokens fit beside the running ones'.

        Those that run and have nowhere to go come before all of them. Returns how many were started.
        """
        started = 0
        if any(sequence.node not in self._fleet.peers for sequence in self.running):
            return 0
        while self.waiting and len(self.running) < limits.max_sequences:
            sequence = self.waiting[0]
            views = [view for view in self._fleet.views(self.running) if not view.draining]
            available = sum(view.available_blocks for view in views)
            if not admits(sequence.pending_tokens, available, len(self.running), self._block_tokens):
                break
            if not self._fleet.start(sequence, self.running):
                break
            self.run(sequence)
            started += 1
        return started

    def impossible(self) -> list[tuple[Sequence, str]]:
        """Waiting sequences that all attached nodes together could never hold, and what to say of each.

        One that ran before, here or elsewhere, did fit when all nodes were there: it waits for them. One
        that named no max_tokens gets as many as fit.
        """
        capacities = [peer.ledger.capacity_blocks for peer in self._fleet.peers.values() if not peer.draining]
        refused: list[tuple[Sequence, str]] = []
        for sequence in [sequence for sequence in self.waiting if capacities and not sequence.ran_here]:
            asked = sequence.sampler.params.max_tokens
            total = sequence.prompt_tokens + max(asked, 1)
            room = fits_empty(capacities, self._block_tokens)
            if total > room and not sequence.computed_tokens:
                what = f"{sequence.prompt_tokens} prompt tokens and max_tokens {max(asked, 1)}"
                message = (
                    f"{what} need {total} tokens of KV; {len(capacities)} attention nodes hold {room}."
                    " Lower max_tokens, or add nodes: flumectl scale attention --replicas N"
                )
                refused.append((sequence, message))
            elif not asked:
                sequence.max_tokens = min(sequence.max_tokens, room - sequence.prompt_tokens)
        return refused

    def to_give_way(self) -> Sequence | None:
        """When nobody could step for want of memory: the youngest. None when others hold the memory.

        It is computed again from its tokens once there is room; its stream only pauses.
        """
        peers = self._fleet.peers.values()
        exhausted = all(peer.ledger.exhausted for peer in peers if not peer.leaving)
        if not self.running or not peers or not exhausted:
            return None
        youngest = self.running[-1]
        fits = self._fleet.capacity_blocks * self._block_tokens > len(youngest.tokens)
        return None if self.gave_way_in_vain(youngest) and fits else youngest

    def gave_way_in_vain(self, sequence: Sequence) -> bool:
        """Whether it is alone and has not got further since it last gave way."""
        return len(self.running) == 1 and sequence.preempted_at_tokens == len(sequence.tokens)
