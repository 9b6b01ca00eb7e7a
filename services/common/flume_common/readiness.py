"""What `/readyz` says: whether new work should come here, and with `?verbose`, or when not, why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Check = bool | str
"""True: it holds; a text says why it does not."""


class Readiness(NamedTuple):
    """The answer to a probe."""

    status: int  # of HTTP: 200 or 503
    text: str


def readiness(checks: Mapping[str, Check], facts: Mapping[str, bool], *, verbose: bool) -> Readiness:
    """All of `checks` must hold; `facts` are told and decide nothing."""
    passed = all(check is True for check in checks.values())
    lines = [_line(name, check) for name, check in checks.items()]
    lines += [f"{name}: {str(fact).lower()}" for name, fact in facts.items()]
    return Readiness(200 if passed else 503, "\n".join(lines) if verbose or not passed else "ok")


def _line(name: str, check: Check) -> str:
    if check is True:
        return f"[+]{name} ok"
    return f"[-]{name} failed: {check}" if check else f"[-]{name} failed"
