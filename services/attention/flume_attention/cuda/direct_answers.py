"""One lane's answers to steps that are asked about in its region: launched, and then the devices' own affair.

The host learns nothing of single layers. It sees a step that its weight node has given up when the next PLAN
comes, or the lane ends: then it releases the device, which answers nothing any more.
"""

from __future__ import annotations

from flume_kernels.gpu.device import Device
from flume_kernels.gpu.watchdog import Watchdog

from flume_attention.cuda.answers import QUERY_TIMEOUT_S, drain
from flume_attention.cuda.direct_steps import DirectStep, DirectSteps
from flume_attention.holdings import Step


class DirectAnswers:
    """A step that does not end within `timeout_s` is released by the watchdog, which may serve others when
    none is under way. `begin` and `end` may raise DeviceStuck."""

    def __init__(
        self,
        device: Device,
        steps: DirectSteps,
        *,
        watchdog: Watchdog,
        timeout_s: float = QUERY_TIMEOUT_S,
    ) -> None:
        self.steps = steps
        self._device = device
        self._watchdog = watchdog
        self._timeout_s = timeout_s
        self._running: DirectStep | None = None

    @property
    def under_way(self) -> bool:
        """Whether the device works, or waits for the other one."""
        return self._running is not None and not self._running.graph.done()

    def begin(self, step: Step) -> None:
        """A step's PLAN is in, and the memory holds all that its queries ask about: one each row."""
        self.end()
        self._running = self.steps.fill(step.number, step.asking)
        self._device.join()
        self._watchdog.arm(self._timeout_s, self.steps.flags.host.poison)
        self._running.launch()

    def over(self) -> bool:
        """Whether a step has been answered, all of it. Said once."""
        if self._running is None or self.steps.flags.host.poisoned or not self._running.graph.done():
            return False
        self.end()
        return True

    def end(self) -> None:
        """Leave the step under way, complete or not, with the device idle and its flags as new."""
        running, self._running = self._running, None
        if running is None:
            return
        self._watchdog.disarm()
        flags = self.steps.flags
        if not running.graph.done():
            flags.host.poison()
            drain(running.graph)
        if flags.host.poisoned:
            flags.rearm()
