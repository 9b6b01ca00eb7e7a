"""Why an engine's process ended, in words for people; the same for both kinds of nodes. Pure."""

from __future__ import annotations

import signal


def cause_of(returncode: int | None, *, words: str = "", silent: str = "") -> str:
    """Describe an end. `words`: the engine's last ones; `silent`: why its supervisor killed it."""
    if silent:
        return silent
    if words:
        return words
    if returncode is None:
        return "closed its link"
    if returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"killed by signal {-returncode}"
    return f"exit code {returncode}"
