"""Which sequences an engine's death is blamed on, and what their clients are told. Pure.

An engine that ends by an exception says so, and which sequences its step had: if it was one alone, that one
is the cause, and to run it again would end another engine. Where several were in the step, or where the
engine ended without a word (a signal, no memory), each of them may be the cause: they are to run alone where
they go on. The others merely lost their engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from flume_common.failures import Failure

from flume_weight import messages as m


@dataclass(frozen=True, slots=True)
class EngineDeath:
    node: str
    cause: str
    in_step: frozenset[str]  # sequences of the step it ended in; none: it ended between steps
    by_exception: bool

    def failed(self, sequence: str) -> m.Failed:
        """How the sequence ends."""
        message = f"the engine of weight node {self.node} ended ({self.cause})"
        if sequence not in self.in_step:
            return m.Failed(sequence, "UNAVAILABLE", message)
        if self.by_exception and len(self.in_step) == 1:
            return m.Failed(sequence, "INTERNAL", f"{message} in a step of this request alone",
                            Failure.ENGINE_CRASHED)  # fmt: skip
        return m.Failed(sequence, "UNAVAILABLE", f"{message} in a step of this request",
                        Failure.ENGINE_CRASHED)  # fmt: skip
