"""What can go wrong on an attention node.

* StepRefused     a PLAN asks for something that does not fit what the lane holds; the weight node is told
* AttachRefused   two nodes cannot be joined: layout, protocol version, epoch, memory or sizes
* ClaimRefused    etcd does not confirm the epoch that a message claims
* ClaimUnverified etcd could not be asked whether it does
* ConfigRefused   a flag's value cannot be
* EngineGone      the engine is not up now, or did not answer; it is being restarted
  + EngineBusy    it works and is in a long step, or compiles kernels: ask again
* LenderGone      the node that ranges should be pulled from did not answer, or refused
* DeviceStuck     the device did not end a step although its wait was released: the engine must go
* ProtocolError   a weight node's messages contradict each other; its lane is closed

`blocks.OutOfBlocks` and `blocks.StaleBlock` are bugs of the node itself and end the engine.
"""

from __future__ import annotations

from flume_common.wire import Refusal


class StepRefused(Exception):
    """Answered with a CREDIT message carrying `refusal`."""

    def __init__(self, refusal: Refusal, detail: str) -> None:
        super().__init__(f"{refusal.name}: {detail}")
        self.refusal = refusal
        self.detail = detail


class AttachRefused(Exception):
    """Answered with FAILED_PRECONDITION. `field` is the field of AttachRequest that is to blame."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field
        self.detail = detail


class ClaimRefused(Exception):
    """Answered with FAILED_PRECONDITION."""


class ClaimUnverified(Exception):
    """Answered with UNAVAILABLE: whatever works goes on; ask again when etcd is back."""


class ConfigRefused(Exception):
    """Printed at start, naming the flag and what it may be."""


class EngineGone(Exception):
    """Answered with UNAVAILABLE: worth a retry."""


class EngineBusy(EngineGone):
    """Answered with RESOURCE_EXHAUSTED: nothing failed, it only takes longer than one waits."""


class LenderGone(Exception):
    """Answered with UNAVAILABLE: another time, or from the tokens."""


class ProtocolError(Exception):
    """The lane is closed with this reason, and everything it holds is freed."""


class DeviceStuck(Exception):
    """Ends the engine: whatever it gave the device next would wait behind that step."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the device did not end a released step within {timeout_s:g} s")
        self.timeout_s = timeout_s
