"""How the demo shows a sequence: one bar per attention node, redrawn in place. Pure but for `Screen`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from flume_protos.v1 import common_pb2

TEXT_LINES = 5
_BOLD, _DIM = 1, 2
_NODE_COLOURS = (36, 33, 35, 32, 34, 31)
_STATE_COLOURS = {"READY": 32, "PREPARING": 33, "DRAINING": 31}
_GONE = "GONE"


@dataclass(frozen=True, slots=True)
class Held:
    """Tokens `[start, end)` of the sequence on one node."""

    node: str
    start: int
    end: int
    tail: bool  # grows


@dataclass(slots=True)
class Scene:
    """What there is to see at one moment."""

    title: str
    expected_tokens: int  # what a full bar stands for
    length: int = 0  # tokens of the sequence so far, those of the prompt included
    held: Sequence[Held] = ()
    states: dict[str, str] = field(default_factory=dict)  # of every attention node ever seen
    text: str = ""
    tokens_per_s: float = 0.0
    news: str = ""

    def saw_nodes(self, states: dict[str, str]) -> None:
        """`states` of the attention nodes that are there now; others are gone."""
        known = sorted(self.states.keys() | states.keys(), key=lambda node: (len(node), node))
        self.states = {node: states.get(node, _GONE) for node in known}


def held_ranges(route: common_pb2.Route, length: int) -> list[Held]:
    """Where the tokens of a sequence of this length lie."""
    return [
        Held(
            item.node, item.start, item.end if item.HasField("end") else max(length, item.start), item is tail
        )
        for tail in (route.ranges[-1],)
        for item in route.ranges
    ]


def as_lines(scene: Scene) -> list[str]:
    """For output that cannot be redrawn."""
    nodes = ", ".join(f"{node} {state}" for node, state in scene.states.items())
    ranges = ", ".join(f"{item.node} [{item.start}, {'∞' if item.tail else item.end})" for item in scene.held)
    lines = [f"  {scene.length:>4} tokens at {scene.tokens_per_s:.1f}/s: {ranges}", f"       {nodes}"]
    return [*lines, f"       {scene.news}"] if scene.news else lines


def as_frame(scene: Scene, width: int) -> list[str]:
    """The lines of one picture, with ANSI colours."""
    speed = f"{scene.tokens_per_s:.1f} tokens/s" if scene.tokens_per_s else "waiting for the first token"
    rows = [_row(scene, node, index, width) for index, node in enumerate(scene.states)]
    return [
        _paint(scene.title, _BOLD),
        "",
        *rows,
        "",
        f"  {scene.length} tokens, {speed}",
        f"  {_paint(scene.news[: width - 2], _BOLD)}",
        "",
        *(f"  {_paint(line, _DIM)}" for line in last_lines(scene.text, width - 4)),
    ]


def bar(held: Sequence[Held], expected_tokens: int, cells: int) -> str:
    """The sequence from its first to its last token, filled where it is held. Pure ASCII art."""
    filled = [" "] * cells
    for item in held:
        first = min(item.start * cells // expected_tokens, cells - 1)
        last = min(max(item.end - 1, item.start) * cells // expected_tokens, cells - 1)
        filled[first : last + 1] = "█" * (last + 1 - first)
        if item.tail:
            filled[last] = "▶"
    return "".join(filled)


def last_lines(text: str, width: int) -> list[str]:
    """The end of the answer, always as many lines."""
    wrapped = [line for part in text.splitlines() for line in (textwrap.wrap(part, width) or [""])]
    shown = wrapped[-TEXT_LINES:]
    return shown + [""] * (TEXT_LINES - len(shown))


def _row(scene: Scene, node: str, index: int, width: int) -> str:
    mine = [item for item in scene.held if item.node == node]
    state, colour = scene.states[node], _NODE_COLOURS[index % len(_NODE_COLOURS)]
    cells = max(10, width - 42)
    tokens = sum(item.end - item.start for item in mine)
    return (
        f"  {_paint(f'{node:<12}', colour if state != _GONE else _DIM)}"
        f" {_paint(f'{state:<10}', _STATE_COLOURS.get(state, _DIM))}"
        f"│{_paint(bar(mine, scene.expected_tokens, cells), colour)}│ {tokens:>4} tokens"
    )


def _paint(text: str, code: int) -> str:
    return f"\033[{code}m{text}\033[0m" if text else ""


class Screen:
    """Shows scenes: redrawn in place on a terminal, a line for each change elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty()
        self._height = 0
        self._last = ""

    def show(self, scene: Scene) -> None:
        if self._live:
            self._redraw(as_frame(scene, shutil.get_terminal_size().columns))
            return
        ranges = [(item.node, item.start) for item in scene.held]
        if scene.held and (key := f"{ranges} {scene.states} {scene.news}") != self._last:
            self._last = key
            print("\n".join(as_lines(scene)), file=self._out, flush=True)

    def _redraw(self, lines: list[str]) -> None:
        up = f"\033[{self._height}F" if self._height else ""
        # A picture may grow, not shrink: nodes that are gone keep their row.
        self._out.write(up + "".join(f"{line}\033[K\n" for line in lines))
        self._out.flush()
        self._height = len(lines)
