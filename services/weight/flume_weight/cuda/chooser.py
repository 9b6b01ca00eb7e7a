"""Whether steps run in one microbatch or in two, from what they took. Pure.

Each bucket is looked at alone. Its steps run in one microbatch until WINDOW of them are measured; from their
times the model of `microbatches` predicts two. Where that gains, two are tried for as many steps, and what
was faster stays. As contexts grow and routes change, the other one is tried again: after RETRY_STEPS, and
after twice as many each time that the choice stands.

Medians are compared, each of steps that follow one another, so that a late step or two does not count. From
one to two it takes a gain of GAIN_NEEDED, back any gain will do, so that noise does not pull to and fro.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from flume_weight.cuda.driver import StepTimes
from flume_weight.cuda.microbatches import GAIN_NEEDED, Accuracy, LayerTimes, expected, step_s

WINDOW = 8  # steps
SKIPPED = 1  # the first after a change is not measured
RETRY_STEPS = 512
MOST_RETRY_STEPS = 8192
STALE_STEPS = 64  # of other buckets; then nothing that was measured before is compared with what is now
HOP_S = 30e-6  # of T_A: flags, copies and a lane's round trip over shared memory; more over a network


def predicted_s(steps: Iterable[StepTimes], layers: int, microbatches: int, hop_s: float = HOP_S) -> float:
    """T_step of so many microbatches, from steps of one.

    Between the first query and the last gate lie all layers' attention and all but one of their dense passes.
    """
    steps = list(steps)
    total_s = median(step.total_s for step in steps)
    attention_s = median(step.attention_s for step in steps) / layers
    between_s = median(step.layers_s - step.attention_s for step in steps)
    dense_s = between_s / (layers - 1) if layers > 1 else total_s - attention_s
    whole = LayerTimes(dense_s, attention_s)
    outside_s = max(total_s - layers * (dense_s + attention_s), 0.0)
    return step_s(layers, microbatches, expected(whole, microbatches, hop_s), outside_s)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians of a bucket's steps in one and in two microbatches, and what was predicted for two."""

    one_s: float
    two_s: float
    predicted_s: float


class BucketChooser:
    """The choice for one bucket."""

    def __init__(self, layers: int) -> None:
        self.chosen = 1
        self._layers = layers
        self._tried: int | None = None
        self._steps: dict[int, deque[StepTimes]] = {count: deque(maxlen=WINDOW) for count in (1, 2)}
        self._to_skip = SKIPPED
        self._retry_steps = RETRY_STEPS
        self._wait_steps = 0  # until the other one may be tried

    @property
    def microbatches(self) -> int:
        """Of the next step."""
        return self._tried or self.chosen

    def note(self, times: StepTimes) -> Comparison | None:
        """What a step of `microbatches` took. Returns what it completes."""
        self._wait_steps = max(0, self._wait_steps - 1)
        if self._to_skip:
            self._to_skip -= 1
            return None
        measured = self._steps[self.microbatches]
        measured.append(times)
        if len(measured) < WINDOW:
            return None
        if self._tried is not None:
            return self._decide()
        if not self._wait_steps and (self.chosen == 2 or self._promises()):
            self._try(3 - self.chosen)
        return None

    def forget(self) -> None:
        """What was measured is too old."""
        for steps in self._steps.values():
            steps.clear()
        self._tried, self._to_skip = None, SKIPPED

    def _promises(self) -> bool:
        one_s = _total_s(self._steps[1])
        return predicted_s(self._steps[1], self._layers, 2) < one_s * (1 - GAIN_NEEDED)

    def _try(self, microbatches: int) -> None:
        self._steps[microbatches].clear()
        self._tried, self._to_skip = microbatches, SKIPPED

    def _decide(self) -> Comparison:
        one_s, two_s = _total_s(self._steps[1]), _total_s(self._steps[2])
        needed = GAIN_NEEDED if self.chosen == 1 else 0.0
        faster = 2 if two_s < one_s * (1 - needed) else 1
        stands = faster == self.chosen
        self._retry_steps = min(2 * self._retry_steps, MOST_RETRY_STEPS) if stands else RETRY_STEPS
        self.chosen, self._tried = faster, None
        self._wait_steps, self._to_skip = self._retry_steps, SKIPPED if stands else 0
        return Comparison(one_s, two_s, predicted_s(self._steps[1], self._layers, 2))


class MicrobatchChooser:
    """The choices for all buckets, and how far predictions were from what was measured then."""

    def __init__(self, layers: int) -> None:
        self.accuracy = Accuracy()
        self._layers = layers
        self._buckets: dict[int, BucketChooser] = {}
        self._noted_at: dict[int, int] = {}
        self._steps = 0

    def of(self, bucket: int) -> BucketChooser:
        if bucket not in self._buckets:
            self._buckets[bucket] = BucketChooser(self._layers)
        return self._buckets[bucket]

    def note(self, bucket: int, times: StepTimes) -> None:
        """What a step of this bucket took, in as many microbatches as were chosen."""
        self._steps += 1
        chooser, last = self.of(bucket), self._noted_at.get(bucket, self._steps)
        self._noted_at[bucket] = self._steps
        if self._steps - last > STALE_STEPS:
            chooser.forget()  # this step was one of a trial that is over with this
            return
        if (found := chooser.note(times)) is not None:
            self.accuracy.note(found.predicted_s, found.two_s)


def _total_s(steps: Iterable[StepTimes]) -> float:
    return median(step.total_s for step in steps)
