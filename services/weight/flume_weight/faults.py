"""Faults that an engine injects on purpose, for tests and drills, by environment variables.

FLUME_FAULT_PREFILL_LAYER_DELAY_MS=2000   each layer of a step with prompt tokens lasts so much longer
"""

from __future__ import annotations

import os

_PREFILL_LAYER_DELAY_MS = "FLUME_FAULT_PREFILL_LAYER_DELAY_MS"


def prefill_layer_delay_s() -> float:
    return float(os.environ.get(_PREFILL_LAYER_DELAY_MS) or 0.0) / 1e3
