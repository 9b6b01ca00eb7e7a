"""Faults that an engine injects on purpose, for tests and drills, by environment variables.

FLUME_FAULT_PREFILL_LAYER_DELAY_MS=2000   each layer of a step with 8 tokens or more of a prompt lasts so
                                          much longer; canaries and shorter prompts are as fast as ever
FLUME_FAULT_RAISE_TOKEN=77                a step with this token id among its tokens raises
FLUME_FAULT_ABORT_TOKEN=78                ends the engine without a word, as a fault in native code does
"""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

_PREFILL_LAYER_DELAY_MS = "FLUME_FAULT_PREFILL_LAYER_DELAY_MS"
_SLOWED_FROM_TOKENS = 8
_RAISE_TOKEN = "FLUME_FAULT_RAISE_TOKEN"
_ABORT_TOKEN = "FLUME_FAULT_ABORT_TOKEN"


class InjectedFault(RuntimeError):
    """Raised on purpose."""


def prefill_layer_delay_s() -> float:
    return float(os.environ.get(_PREFILL_LAYER_DELAY_MS) or 0.0) / 1e3


def is_slowed(chunk: slice) -> bool:
    """True if these rows of a batch, of one sequence, are enough of a prompt to be slowed down."""
    return int(chunk.stop - chunk.start) >= _SLOWED_FROM_TOKENS


def step_fault() -> Callable[[Tensor], None] | None:
    """What is to be called with the token ids of each step; None where no fault is wanted."""
    raises, aborts = (os.environ.get(name) for name in (_RAISE_TOKEN, _ABORT_TOKEN))
    if not (raises or aborts):
        return None

    def fault(token_ids: Tensor) -> None:
        ids = token_ids.tolist()
        if aborts and int(aborts) in ids:
            os.abort()
        if raises and int(raises) in ids:
            raise InjectedFault(f"a step with token {raises}")

    return fault
