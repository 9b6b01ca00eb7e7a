"""Ends an answer at a stop string, and never shows a part of one.

Text that could still turn into a stop string is held back: the longest suffix that is the beginning of
one. Of several stop strings the one that is complete first wins, and of those complete at the same
character the longest; so where text was cut into pieces changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Over the text of one answer."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty."""
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown now. After `stopped`, nothing more."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        cut = first_stop(text, self._stops)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        safe = len(text) - self._held_back(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back, as no more text comes to complete a stop string."""
        held, self._held = self._held, ""
        return held

    def _held_back(self, text: str) -> int:
        """Length of the longest suffix that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the answer ends: the start of the stop string that is complete first."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None
