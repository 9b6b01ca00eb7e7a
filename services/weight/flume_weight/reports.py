"""What the engine tells its supervisor of its state, each thing when it changes. No decisions."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from contextlib import suppress

from flume_common.engine_link import EngineLink, LinkClosed
from flume_common.routes import Route

from flume_weight import messages as m
from flume_weight.failing import described
from flume_weight.sequence import Sequence

_MODEL_EVERY_S = 1.0
_TRACEBACK_CHARS = 4000  # its end says most


class Reports:
    """Counts of this engine and what was last said of them. May be called as often as one likes."""

    def __init__(self, link: EngineLink[m.Inbound]) -> None:
        self._link = link
        self._routes: dict[str, Route] = {}  # as last reported
        self._step_sequences: Seq[str] = ()
        self._capacity: tuple[int, int, int] | None = None
        self._recomputed = m.Recomputed()
        self._recomputed_told = True
        self._epoch_rejected = 0
        self._model: m.StepModel | None = None
        self._model_due_s = 0.0
        self._logit_rows = 0
        self._logit_rows_told = 0

    def routes(self, live: Iterable[Sequence]) -> None:
        """Report the routes that differ from the last report: new, changed, and those that are gone.

        A route is a value, so one that is another object is another route. Whatever made it change, or made
        its sequence lose it, need not say so.
        """
        now = {sequence.name: sequence.route for sequence in live if sequence.route is not None}
        for name in self._routes.keys() - now.keys():
            self._link.send(m.RouteChanged(name, []))
        for name, route in now.items():
            if self._routes.get(name) is not route:
                self._link.send(m.RouteChanged(name, _ranges(route)))
        self._routes = now

    def step_sequences(self, names: Seq[str]) -> None:
        """Report which sequences the next step has, if they are others than those of the last one."""
        if names != self._step_sequences:
            self._step_sequences = names
            self._link.send(m.StepSequences(list(names)))

    def contained(self, event: str, error: Exception, *sequences: str, attention_node: str = "") -> None:
        """Report an exception that ended no more than what it was about."""
        trace = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]
        self._link.send(m.Contained(event, trace, list(sequences), attention_node))

    def failed(self, error: BaseException, *, in_step: bool) -> None:
        """Report that the engine ends of this."""
        sequences = list(self._step_sequences) if in_step else []
        with suppress(LinkClosed):
            self._link.send(m.EngineFailed(described(error), sequences))

    def capacity(self, tokens: int, running: int, waiting: int) -> None:
        """KV capacity of all nodes, and how many sequences there are."""
        capacity = (tokens, running, waiting)
        if capacity != self._capacity:
            self._capacity = capacity
            self._link.send(m.Capacity(*capacity))

    def count_recomputed(self, sequence: Sequence, tokens: int) -> None:
        """`tokens` of a recovering sequence were computed again."""
        assert sequence.recovery is not None
        sequence.recovery.tokens += tokens
        name = sequence.recovery.cause.value
        setattr(self._recomputed, name, getattr(self._recomputed, name) + tokens)
        self._recomputed_told = False

    def recomputed(self) -> None:
        if not self._recomputed_told:
            self._recomputed_told = True
            self._link.send(self._recomputed)

    def recovered(self, sequence: Sequence) -> None:
        """The sequence is where it was before it lost something."""
        recovery, sequence.recovery = sequence.recovery, None
        assert recovery is not None
        self.recomputed()
        elapsed_s = time.monotonic() - recovery.since_s
        self._link.send(m.Recovered(sequence.name, recovery.cause, recovery.tokens, elapsed_s))

    def epoch_rejected(self, total: int) -> None:
        if total != self._epoch_rejected:
            self._epoch_rejected = total
            self._link.send(m.EpochRejected(total))

    def step_model(self, model: m.StepModel) -> None:
        """Not more often than a person looks: batches of other sizes may run in other parts."""
        now = time.monotonic()
        if model != self._model and now >= self._model_due_s:
            self._model, self._model_due_s = model, now + _MODEL_EVERY_S
            self._link.send(model)

    def count_logit_rows(self, rows: int) -> None:
        """All logits of so many rows had to be read, as the step's own shortlists did not tell the token."""
        self._logit_rows += rows

    def logit_rows(self) -> None:
        if self._logit_rows != self._logit_rows_told:
            self._logit_rows_told = self._logit_rows
            self._link.send(m.LogitRowsRead(self._logit_rows))

    def sequences(self, live: Iterable[Sequence]) -> None:
        """What every sequence does now."""
        states = [m.SequenceState(sequence.name, sequence.state, sequence.stored_tokens) for sequence in live]
        self._link.send(m.Sequences(states))


def _ranges(route: Route | None) -> list[m.RangeInfo]:
    if route is None:
        return []
    return [m.RangeInfo(item.start, item.end, item.node) for item in route.ranges]
