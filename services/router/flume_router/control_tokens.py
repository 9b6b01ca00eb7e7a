"""Keeps texts of clients from being read as control tokens, whatever a template makes of them.

Before a template is rendered a mark goes behind the first character of every control token's text in a
client's texts, also of one that is only begun at the end of a text, lest another text complete it. The marks
are taken out of what was rendered; control tokens are those that could be read with the marks in place.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

_MARKS = [chr(code) for code in range(0xE000, 0xF900)]  # for private use


class ShieldedText(msgspec.Struct, frozen=True):
    """A rendered chat in which some text looks like control tokens and is none."""

    parts: tuple[tuple[str, bool], ...]
    """Pieces of the text in order; True: a control token."""

    @property
    def text(self) -> str:
        return "".join(part for part, _ in self.parts)


class ControlTokens:
    """The control tokens of one vocabulary."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted(filter(None, set(texts)))
        tree = _tree(self._texts)
        self._token = re.compile(_regex(tree)) if self._texts else None
        self._start = re.compile(_starts(tree), re.IGNORECASE) if self._texts else None
        self._beginnings = {text[:n].lower() for text in self._texts for n in range(1, len(text))}
        self._longest = max(map(len, self._texts), default=0)

    def mark_for(self, values: Any, *more: str) -> str | None:
        """A character for marks that is in no text of `values`; None if no text there needs one.

        Raises ValueError if they leave none.
        """
        texts = list(_texts_of(values))
        if not any(map(self._suspicious, texts)):
            return None
        for mark in _MARKS:
            if not any(mark in text for text in (*texts, *more)):
                return mark
        raise ValueError("the texts hold every character for private use")

    def shielded(self, value: Any, mark: str) -> Any:
        """A copy of a JSON value with the marks in all its texts."""
        match value:
            case str():
                return self.shield(value, mark)
            case Mapping():
                return {self.shield(k, mark): self.shielded(v, mark) for k, v in value.items()}
            case list() | tuple():
                return [self.shielded(item, mark) for item in value]
        return value

    def shield(self, text: str, mark: str) -> str:
        """A text with its marks; where it has some already they are set anew."""
        if self._start is None:
            return text
        text = text.replace(mark, "")
        starts = {found.start() for found in self._start.finditer(text)} | self._begun(text)
        edges = [0, *(start + 1 for start in sorted(starts)), len(text)]
        return mark.join(text[a:b] for a, b in itertools.pairwise(edges))

    def read(self, rendered: str, mark: str) -> str | ShieldedText:
        """What was rendered, without marks; shielded where reading it plainly would find other tokens."""
        text = rendered.replace(mark, "")
        if self._token is None:
            return text
        genuine, taken, at = [], 0, 0
        for found in self._token.finditer(rendered):
            taken += rendered.count(mark, at, found.start())
            at = found.start()
            genuine.append((found.start() - taken, found.end() - taken))
        if genuine == [found.span() for found in self._token.finditer(text)]:
            return text
        parts, at = [], 0
        for start, end in genuine:
            parts += [(text[at:start], False), (text[start:end], True)]
            at = end
        return ShieldedText(tuple((part, control) for part, control in [*parts, (text[at:], False)] if part))

    def _suspicious(self, text: str) -> bool:
        return self._start is not None and bool(self._start.search(text) or self._begun(text))

    def _begun(self, text: str) -> set[int]:
        """Where a control token's text begins that the end of `text`, or white space there, cuts off."""
        ends = {len(text), len(text.rstrip())}
        return {
            end - n
            for end in ends
            for n in range(1, min(self._longest, end + 1))
            if text[end - n : end].lower() in self._beginnings
        }


def _texts_of(value: Any) -> Iterable[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, item in value.items():
                yield key
                yield from _texts_of(item)
        case list() | tuple():
            for item in value:
                yield from _texts_of(item)


_Tree = dict[str, Any]
_END = ""


def _tree(texts: Iterable[str]) -> _Tree:
    """Texts by their characters, so that a regular expression looks at each only once."""
    root: _Tree = {}
    for text in texts:
        node = root
        for character in text:
            node = node.setdefault(character, {})
        node[_END] = {}
    return root


def _regex(node: _Tree) -> str:
    """Of the longest text from here on."""
    further = [re.escape(character) + _regex(child) for character, child in node.items() if character != _END]
    if not further:
        return ""
    return f"(?:{'|'.join(further)})" + ("?" if _END in node else "")


def _starts(root: _Tree) -> str:
    """Of the first character of every text, also of those that overlap."""
    return "|".join(f"{re.escape(c)}(?={_shortest(child)})" for c, child in root.items())


def _shortest(node: _Tree) -> str:
    if _END in node:
        return ""
    return f"(?:{'|'.join(re.escape(c) + _shortest(child) for c, child in node.items())})"
