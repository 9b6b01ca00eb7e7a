"""The host's side of a captured step: it polls the device's flags and moves messages, until the step is over.

It never sleeps: between a flag and the message it stands for lies the time of one round of the loop. A
watchdog poisons the flags of a step that outlasts its deadline, whatever the loop is stuck in. A step that
fails is over on the device, and its flags are as new, when `run` raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

from flume_kernels.gpu.flags import Gate, Poisoned, Signals
from flume_kernels.gpu.watchdog import Watchdog

from flume_weight.cuda.captured_steps import CapturedStep
from flume_weight.cuda.errors import DeviceStuck, StepTimedOut

DRAIN_TIMEOUT_S = 5.0
_ROUNDS_PER_BEAT = 4096  # some milliseconds; the watchdog ends a step that the device does not end


class StepExchange(Protocol):
    """The messages of one step. Nothing here waits; what it raises fails the step. Microbatches come in turn,
    layer by layer, as the device does them."""

    def progress(self) -> None:
        """Move what is under way along."""

    def query(self, microbatch: int, layer: int) -> None:
        """The queries of this layer are in their buffer: send them."""

    def keys(self, microbatch: int, layer: int) -> None:
        """K and V of this layer are in their buffer, and stay there until the next step."""

    def arrived(self, microbatch: int, layer: int) -> bool:
        """Whether all partials of this layer are in their buffer; puts there what has come."""
        ...


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step as the driver saw them: `attention_s` from a query's signal to its gate, summed;
    `layers_s` from the first query's signal to the last gate."""

    total_s: float
    attention_s: float
    layers_s: float = 0.0


class _Microbatch:
    """Where one microbatch stands. Signals of a step: a query per layer, then the end of the keys."""

    def __init__(self, number: int, signals: Signals, gate: Gate, num_layers: int) -> None:
        self._number = number
        self._signals = signals
        self._gate = gate
        self._num_layers = num_layers
        self._signalled = 0
        self._asked_at = 0.0
        self.first_asked_at = self.last_answered_at = 0.0
        self.waits_for: int | None = None  # the layer whose partials are not all here
        self.attention_s = 0.0

    @property
    def over(self) -> bool:
        return self._signalled > self._num_layers and self.waits_for is None

    def follow(self, exchange: StepExchange) -> bool:
        """Do what the next signal asks for; whether there was one."""
        taken = self._signals.take()
        if taken:
            self._follow(exchange)
        return taken

    def answer(self, exchange: StepExchange) -> None:
        """Open the gate if all is there that it waits for."""
        if self.waits_for is not None and exchange.arrived(self._number, self.waits_for):
            self._gate.open()
            self.last_answered_at = time.perf_counter()
            self.attention_s += self.last_answered_at - self._asked_at
            self.waits_for = None

    def _follow(self, exchange: StepExchange) -> None:
        layer = self._signalled
        self._signalled += 1
        if layer < self._num_layers:
            self._asked_at = time.perf_counter()
            self.first_asked_at = self.first_asked_at or self._asked_at
            exchange.query(self._number, layer)
            self.waits_for = layer
        if layer > 0:
            exchange.keys(self._number, layer - 1)


class StepDriver:
    """Runs captured steps one after the other."""

    def __init__(
        self, watchdog: Watchdog, timeout_s: float, drain_timeout_s: float = DRAIN_TIMEOUT_S
    ) -> None:
        self._watchdog = watchdog
        self.timeout_s = timeout_s  # of one step
        self.beat: Callable[[], None] = lambda: None  # the host goes on; called now and then
        self._drain_timeout_s = drain_timeout_s

    def run(self, step: CapturedStep, exchange: StepExchange) -> StepTimes:
        """Replay the step and serve it until it is over. Its buffers must have been filled.

        Raises StepTimedOut, DeviceStuck, and whatever `exchange` raises.
        """
        flags = step.buffers.flags.host
        microbatches = [
            _Microbatch(number, flags.signals[number], gate, step.num_layers)
            for number, gate in enumerate(flags.gates)
        ]
        started = time.perf_counter()
        step.launch()
        try:
            with self._watchdog.guard(self.timeout_s, flags.poison):
                _serve(microbatches, flags.signals[-1], exchange, self.beat)
        except Poisoned:
            self._undo(step)
            waiting = [each.waits_for for each in microbatches if each.waits_for is not None]
            raise StepTimedOut(self.timeout_s, waiting) from None
        except BaseException:
            self._undo(step)
            raise
        if flags.poisoned:  # at the very moment that the step ended well
            step.buffers.flags.rearm()
        return StepTimes(
            time.perf_counter() - started,
            sum(each.attention_s for each in microbatches),
            microbatches[-1].last_answered_at - microbatches[0].first_asked_at,
        )

    def _undo(self, step: CapturedStep) -> None:
        """Let the device run to the end of what is worth nothing any more, then start afresh."""
        step.buffers.flags.host.poison()
        if not _within(self._drain_timeout_s, step.graph.done):
            raise DeviceStuck(self._drain_timeout_s)
        step.buffers.flags.rearm()


def _serve(
    microbatches: list[_Microbatch], ended: Signals, exchange: StepExchange, beat: Callable[[], None]
) -> None:
    under_way, over, rounds = list(microbatches), False, 0
    turns = cycle(microbatches)  # as the device signals, whichever flag is looked at first
    turn = next(turns)
    while under_way or not over:
        rounds += 1
        if not rounds % _ROUNDS_PER_BEAT:
            beat()
        exchange.progress()
        while turn.follow(exchange):
            turn = next(turns)
        for microbatch in under_way:
            microbatch.answer(exchange)
        under_way = [microbatch for microbatch in under_way if not microbatch.over]
        # Asked in every round: after the last query it is the only signal that poison can come by.
        over = over or ended.take()


def _within(timeout_s: float, done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0)
    return True
