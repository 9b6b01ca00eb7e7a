"""What `/readyz` says: whether new work should come here, and with `?verbose`, or when not, why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Readiness(NamedTuple):
    """The answer to a probe."""

    status: int  # of HTTP: 200 or 503
    text: str


def readiness(checks: Mapping[str, bool], facts: Mapping[str, bool], *, verbose: bool) -> Readiness:
    """All of `checks` must hold; `facts` are told and decide nothing."""
    passed = all(checks.values())
    lines = [f"[+]{name} ok" if ok else f"[-]{name} failed" for name, ok in checks.items()]
    lines += [f"{name}: {str(fact).lower()}" for name, fact in facts.items()]
    return Readiness(200 if passed else 503, "\n".join(lines) if verbose or not passed else "ok")
