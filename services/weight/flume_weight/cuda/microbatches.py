"""How many microbatches make a step shortest, from measured times. Pure.

With m microbatches, each taking T_W in the dense path of a layer and T_A from its query's flag to its
partials, a layer is over every

    period = max(m · T_W, m · T_A, T_W + T_A)

as the dense path has m of them to work on, the attention nodes too, and none can be in both at once. The last
term is what one microbatch costs; from two on it never counts. Then

    T_step = L · period + fill + outside        fill = min(T_W, T_A) for m > 1, 0 for one

with `outside` for all that is not a layer. T_W hardly falls with m, as each microbatch reads all the weights
again; T_A falls as 1 / m where it is the reading of keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GAIN_NEEDED = 0.02  # of the step: less than the model's own error is no reason to cut a batch


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of one microbatch in one layer."""

    dense_s: float  # T_W
    attention_s: float  # T_A, both ways included


@dataclass(frozen=True, slots=True)
class Choice:
    microbatches: int
    predicted_s: float  # of the step


def step_s(layers: int, microbatches: int, times: LayerTimes, outside_s: float = 0.0) -> float:
    """T_step."""
    dense, attention = times.dense_s, times.attention_s
    period = max(microbatches * dense, microbatches * attention, dense + attention)
    fill = min(dense, attention) if microbatches > 1 else 0.0
    return layers * period + fill + outside_s


def expected(whole: LayerTimes, microbatches: int, hop_s: float) -> LayerTimes:
    """Times of a microbatch that was never measured, from those of the batch in one piece.

    The dense path is taken to be bound by the weights, which each microbatch reads anew; attention beyond the
    hop by keys and values, of which it reads its share.
    """
    hop_s = min(hop_s, whole.attention_s)
    attention = hop_s + (whole.attention_s - hop_s) / microbatches
    return LayerTimes(whole.dense_s, attention)


def choose(layers: int, times: Mapping[int, LayerTimes], outside_s: float = 0.0) -> Choice:
    """The best number of microbatches among those with times; more than one only for a gain that counts.

    Raises ValueError when the times of one microbatch are not among them.
    """
    if 1 not in times:
        raise ValueError(f"times of one microbatch are needed, got those of {sorted(times)}")
    predicted = {count: step_s(layers, count, each, outside_s) for count, each in times.items()}
    best = min(predicted, key=lambda count: (predicted[count], count))
    if predicted[best] > predicted[1] * (1 - GAIN_NEEDED):
        best = 1
    return Choice(best, predicted[best])


@dataclass(slots=True)
class Accuracy:
    """How far predictions were from what was measured."""

    steps: int = 0
    _absolute: float = 0.0
    _signed: float = 0.0
    worst: float = field(default=0.0)  # the largest |relative error|

    def note(self, predicted_s: float, measured_s: float) -> float:
        """Relative error of one step: positive when the prediction was too long."""
        error = (predicted_s - measured_s) / measured_s
        self.steps += 1
        self._absolute += abs(error)
        self._signed += error
        self.worst = max(self.worst, abs(error))
        return error

    @property
    def mean_absolute(self) -> float:
        return self._absolute / self.steps if self.steps else 0.0

    @property
    def bias(self) -> float:
        return self._signed / self.steps if self.steps else 0.0
