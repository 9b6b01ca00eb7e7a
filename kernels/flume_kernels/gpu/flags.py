"""Flags as the host sees them: the other end of `signals`. No torch, no device.

A flag is an int64 in host memory that the device sees, too. It only grows, and each end counts for itself,
so a flag left over from an earlier replay never lets a later one pass.

    Signals   a flag the device raises; the host takes its signals one by one, none twice, none lost
    Gate      a flag the device waits at; the host opens it once for each wait that may end

* Poisoned    the device met poison, so what it computed since is worth nothing

Poison releases every wait, now and for good, until both ends are rearmed. A gate may be poisoned from
another thread than the one that opens it: poison wins whatever the order. Plain stores are enough on
x86-64, which keeps them in the order written: data first, then the gate that says so.
"""

from __future__ import annotations

POISON = 1 << 62
OPEN_WIDE = POISON - 1  # lets every wait pass without being poison: for a run that only warms up
LAYER_BITS = 12  # of the mark that flags between two devices show: `direct`
FLAG_STRIDE_BYTES = 128  # two cache lines: the adjacent-line prefetcher reads pairs
WORDS_PER_FLAG = FLAG_STRIDE_BYTES // 8


class Poisoned(Exception):
    """The device passed a wait by poison and says so in place of its next signal."""


class Signals:
    """What the device has signalled on one flag, as far as the host has taken notice."""

    __slots__ = ("_at", "_words", "taken")

    def __init__(self, words: memoryview, at: int) -> None:
        self._words = words
        self._at = at
        self.taken = 0

    def take(self) -> bool:
        """The next signal, if it is there. Raises Poisoned."""
        value = self._words[self._at]
        if value <= self.taken:
            return False
        if value >= POISON:
            raise Poisoned
        self.taken += 1
        return True


class Gate:
    """What the device waits at, and how often the host has opened it."""

    __slots__ = ("_at", "_words", "opened", "poisoned")

    def __init__(self, words: memoryview, at: int) -> None:
        self._words = words
        self._at = at
        self.poisoned = False
        self.opened = 0

    def open(self) -> None:
        """Let one more wait pass. Everything the device will read must be in place."""
        self.opened += 1
        self._words[self._at] = self.opened
        # Looked at after the store: whoever poisons in between stores after it.
        if self.poisoned:
            self._words[self._at] = POISON

    def poison(self) -> None:
        """Release whoever waits here, and everyone after. From any thread."""
        self.poisoned = True
        self._words[self._at] = POISON

    def rearm(self) -> None:
        self.poisoned = False
        self.opened = 0


class FlagBlock:
    """`count` flags over host memory of count · FLAG_STRIDE_BYTES bytes: the first ones gates, then signals.

    Raises ValueError for memory of another size.
    """

    def __init__(self, memory: memoryview, gates: int, signals: int) -> None:
        words = memory.cast("B").cast("q")
        if len(words) != (gates + signals) * WORDS_PER_FLAG:
            raise ValueError(f"{gates + signals} flags of {WORDS_PER_FLAG} words, got {len(words)} words")
        self._words = words
        self.gates = [Gate(words, at * WORDS_PER_FLAG) for at in range(gates)]
        self.signals = [Signals(words, at * WORDS_PER_FLAG) for at in range(gates, gates + signals)]

    @property
    def poisoned(self) -> bool:
        """Whether a gate was poisoned since the last `rearm`, whether or not the device met it."""
        return any(gate.poisoned for gate in self.gates)

    def poison(self) -> None:
        """Release every wait of the device. From any thread."""
        for gate in self.gates:
            gate.poison()

    def open_wide(self) -> None:
        """Let every wait pass until `rearm`, counting nothing."""
        for at in range(len(self.gates)):
            self._words[at * WORDS_PER_FLAG] = OPEN_WIDE

    def rearm(self) -> None:
        """Count from 0 again, poison or not. The device must be idle and its counters go to 0 with this."""
        for gate in self.gates:
            gate.rearm()
        for signals in self.signals:
            signals.taken = 0
        for at in range(len(self.gates) + len(self.signals)):
            self._words[at * WORDS_PER_FLAG] = 0
