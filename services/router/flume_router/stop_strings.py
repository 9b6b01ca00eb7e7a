"""Ends an answer at a stop string, and never shows a part of one.

Text that could still turn into a stop string is held back: the longest suffix that is the beginning of
one. Of several stop strings the one that is complete first wins, and of those complete at the same
character the longest; so where text was cut into pieces changes nothing.

A stop string that has the text of a control token in it is also looked for in the answer as it is with
those texts, which are not shown. Offsets count characters of that whole text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence


class StopStrings:
    """Over the text of one answer."""

    def __init__(self, stops: Sequence[str], control_texts: Iterable[str] = ()) -> None:
        """`stops`: none of them empty. `control_texts`: of tokens whose text is hidden."""
        controls = list(control_texts) if stops else []
        spelled = [stop for stop in stops if any(text and text in stop for text in controls)]
        self._visible = _Matcher(stops)
        self._whole = _Matcher(spelled) if spelled else None
        self._held: deque[tuple[str, bool]] = deque()
        """Text that is not released yet, and whether it is hidden."""
        self._released_visible = 0
        self.stopped = False
        self.length = 0
        """Characters pushed so far."""
        self.released = 0
        """Characters that no stop string can take back any more."""

    def push(self, text: str, *, hidden: bool = False) -> str:
        """The text that may be shown now. After `stopped`, nothing more."""
        if self.stopped:
            return ""
        if hidden and self._whole is None:
            return ""  # nothing looks at it
        if text:
            self._held.append((text, hidden))
        self.length += len(text)
        ends = [] if hidden else self._found_visible(text)
        if self._whole is not None and (found := self._whole.push(text)) is not None:
            ends.append(found)
        if ends:
            self.stopped = True
            return self._release(min(ends)[1])
        return self._release(self._safe())

    def finish(self) -> str:
        """What was held back, as no more text comes to complete a stop string."""
        return "" if self.stopped else self._release(self.length)

    def _found_visible(self, text: str) -> list[tuple[int, int]]:
        found = self._visible.push(text)
        if found is None:
            return []
        end, start = found
        return [(self._offset_of(end - 1) + 1, self._offset_of(start))]

    def _safe(self) -> int:
        visible = self._visible.safe
        safe = self.length if visible == self._visible.length else self._offset_of(visible)
        return safe if self._whole is None else min(safe, self._whole.safe)

    def _offset_of(self, visible: int) -> int:
        """Where the visible character of that number is in the whole text."""
        offset, passed = self.released, self._released_visible
        for text, hidden in self._held:
            if not hidden:
                if visible < passed + len(text):
                    return offset + visible - passed
                passed += len(text)
            offset += len(text)
        return offset

    def _release(self, offset: int) -> str:
        shown = []
        while self._held and self.released < offset:
            text, hidden = self._held.popleft()
            part = text[: offset - self.released]
            if len(part) < len(text):
                self._held.appendleft((text[len(part) :], hidden))
            self.released += len(part)
            if not hidden:
                self._released_visible += len(part)
                shown.append(part)
        return "".join(shown)


class _Matcher:
    """Looks for stop strings in one text as it grows."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.length = 0

    @property
    def safe(self) -> int:
        """The text up to here is in no stop string."""
        return self.length - len(self._held)

    def push(self, text: str) -> tuple[int, int] | None:
        """End and start of the first stop string, once it is complete."""
        if not self._stops:
            self.length += len(text)
            return None
        began, text = self.safe, self._held + text
        self.length = began + len(text)
        found = _first(text, self._stops)
        if found is not None:
            return began + found[0], began + found[1]
        held = self._held_back(text)
        self._held = text[len(text) - held :]
        return None

    def _held_back(self, text: str) -> int:
        """Length of the longest suffix that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the answer ends: the start of the stop string that is complete first."""
    found = _first(text, stops)
    return None if found is None else found[1]


def _first(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)
