"""In how many microbatches a batch runs: as the setting says, or as measured times do."""

from __future__ import annotations

from collections.abc import Iterator

from flume_common.config_schema import Microbatches
from flume_common.wire import MOST_MICROBATCHES

from flume_weight.cuda.buckets import Buckets, StepSize
from flume_weight.cuda.chooser import MicrobatchChooser
from flume_weight.cuda.driver import StepTimes
from flume_weight.messages import StepModel


class Microbatching:
    """`setting` when the node starts says what is captured: a node that starts with 1 stays there."""

    def __init__(self, layers: int, setting: Microbatches = "auto") -> None:
        self._setting = setting
        self._most = 1 if setting == "1" else MOST_MICROBATCHES
        self._chooser = MicrobatchChooser(layers)
        self._last = 1

    def use(self, setting: Microbatches) -> None:
        """From the next step on."""
        self._setting = setting

    def sizes(self, buckets: Buckets) -> Iterator[StepSize]:
        """All that may run."""
        for rows in buckets.rows:
            yield StepSize(rows)
            if self._fits(rows):
                yield StepSize(rows, MOST_MICROBATCHES)

    def size(self, bucket: int, rows: int) -> StepSize:
        """What a batch of so many rows runs as. A second microbatch that would be empty is none."""
        wanted = self._chooser.of(bucket).microbatches if self._setting == "auto" else int(self._setting)
        possible = self._fits(bucket) and rows > bucket // MOST_MICROBATCHES
        return StepSize(bucket, wanted if possible else 1)

    def note(self, size: StepSize, times: StepTimes) -> None:
        """What a step of this size took."""
        self._last = size.microbatches
        chosen = self._chooser.of(size.rows).microbatches
        if self._setting == "auto" and self._fits(size.rows) and size.microbatches == chosen:
            self._chooser.note(size.rows, times)

    @property
    def model(self) -> StepModel:
        """Of the last step, and of all comparisons so far."""
        accuracy = self._chooser.accuracy
        return StepModel(
            microbatches=self._last,
            comparisons=accuracy.steps,
            error_ratio=accuracy.mean_absolute,
            bias_ratio=accuracy.bias,
            worst_error_ratio=accuracy.worst,
        )

    def _fits(self, bucket: int) -> bool:
        return self._most > 1 and bucket % MOST_MICROBATCHES == 0
