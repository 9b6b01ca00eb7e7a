"""What can go wrong in a captured step. `flume_weight.errors.PeerLost` passes through as well.

* StepError
  + BatchTooLarge   more rows than the largest bucket
  + RouteTooWide    a sequence lies on more nodes than a captured step merges: run it uncaptured
  + StepTimedOut    partials did not come in time; the step is undone, the next may run
  + DeviceStuck     the device did not end a step although every wait was released: the engine must go
"""

from __future__ import annotations


class StepError(Exception):
    """Base of these."""


class BatchTooLarge(StepError):
    def __init__(self, rows: int, largest: int) -> None:
        super().__init__(f"{rows} rows, the largest bucket has {largest}")
        self.rows = rows
        self.largest = largest


class RouteTooWide(StepError):
    def __init__(self, parts: int, most: int) -> None:
        super().__init__(f"a sequence lies on {parts} attention nodes, captured steps merge {most}")
        self.parts = parts
        self.most = most


class StepTimedOut(StepError):
    def __init__(self, timeout_s: float, layers: list[int]) -> None:
        waiting = ", ".join(map(str, layers)) or "none"
        super().__init__(f"the step did not end within {timeout_s:g} s; layers waited for: {waiting}")
        self.timeout_s = timeout_s
        self.layers = layers


class DeviceStuck(StepError):
    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the device did not end a released step within {timeout_s:g} s")
        self.timeout_s = timeout_s
