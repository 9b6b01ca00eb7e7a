"""The choice between one microbatch and two, on steps whose times are drawn around a true pipeline's."""

import random

import pytest
from flume_weight.cuda.buckets import Buckets, StepSize
from flume_weight.cuda.chooser import MOST_RETRY_STEPS, RETRY_STEPS, WINDOW, MicrobatchChooser, predicted_s
from flume_weight.cuda.driver import StepTimes
from flume_weight.cuda.microbatches import LayerTimes, step_s
from flume_weight.cuda.microbatching import Microbatching
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS, OUTSIDE_S = 32, 1e-3
MICROSECONDS = st.floats(min_value=20e-6, max_value=500e-6)


def one(dense_s, attention_s, noise=1.0):
    layers_s = (LAYERS * attention_s + (LAYERS - 1) * dense_s) * noise
    total_s = step_s(LAYERS, 1, LayerTimes(dense_s, attention_s), OUTSIDE_S) * noise
    return StepTimes(total_s, LAYERS * attention_s * noise, layers_s)


class Machine:
    """Steps of one bucket. `gain`: what two microbatches really take, as a share of one."""

    def __init__(self, gain, attention_s=200e-6, noise=0.0, seed=0):
        self.gain, self.attention_s, self.noise = gain, attention_s, noise
        self.random = random.Random(seed)
        self.chooser = MicrobatchChooser(LAYERS)
        self.ran = []  # microbatches of every step
        self.chosen = []

    def run(self, steps):
        for _ in range(steps):
            bucket = self.chooser.of(8)
            self.ran.append(bucket.microbatches)
            noise = max(0.5, self.random.gauss(1.0, self.noise))
            times = one(100e-6, self.attention_s, noise)
            if bucket.microbatches == 2:
                times = StepTimes(times.total_s * self.gain, times.attention_s, times.layers_s)
            self.chooser.note(8, times)
            self.chosen.append(bucket.chosen)

    @property
    def changes(self):
        return sum(a != b for a, b in zip(self.chosen, self.chosen[1:], strict=False))


@given(MICROSECONDS, MICROSECONDS)
def test_the_prediction_is_the_models_for_the_times_that_were_measured(dense_s, attention_s):
    steps = [one(dense_s, attention_s)] * 3
    assert predicted_s(steps, LAYERS, 1) == pytest.approx(steps[0].total_s)
    whole = LayerTimes(dense_s, attention_s / 2)
    assert predicted_s(steps, LAYERS, 2, hop_s=0.0) == pytest.approx(step_s(LAYERS, 2, whole, OUTSIDE_S))


@settings(max_examples=20)
@given(st.floats(0.5, 0.95), st.integers(0, 9))
def test_two_are_chosen_where_they_are_faster_and_one_is_still_looked_at_now_and_then(gain, seed):
    machine = Machine(gain, noise=0.01, seed=seed)
    machine.run(40 * WINDOW)
    assert machine.chosen[-1] == 2
    machine.run(8 * RETRY_STEPS)
    assert machine.chosen[-1] == 2 and machine.changes == 1
    assert 0 < machine.ran[40 * WINDOW :].count(1) < 0.05 * 8 * RETRY_STEPS


@settings(max_examples=8)
@given(st.floats(1.02, 3.0), st.integers(0, 9))
def test_one_stays_where_it_is_faster_though_the_model_promised_more_and_trials_become_rare(gain, seed):
    machine = Machine(gain, noise=0.01, seed=seed)
    machine.run(2 * MOST_RETRY_STEPS)
    assert machine.changes == 0 and machine.chosen[-1] == 1
    assert 0 < machine.ran.count(2) <= 0.003 * len(machine.ran) + 2 * WINDOW


def test_where_the_model_promises_nothing_nothing_is_tried():
    machine = Machine(0.5, attention_s=30e-6)
    machine.run(2000)
    assert set(machine.ran) == {1}


@pytest.mark.parametrize("gain", [0.97, 0.98, 0.99, 1.0, 1.01])
def test_noise_alone_does_not_pull_the_choice_to_and_fro(gain):
    machine = Machine(gain, noise=0.03)
    machine.run(20_000)
    assert machine.changes <= 20_000 / (2 * RETRY_STEPS)


@pytest.mark.parametrize("gain", [0.995, 1.0, 1.01])
def test_what_is_as_fast_is_no_reason_to_change(gain):
    machine = Machine(gain, noise=0.01)
    machine.run(20_000)
    assert machine.changes == 0 and machine.ran.count(2) > WINDOW


def test_one_is_looked_at_again_whatever_the_model_says_of_two():
    machine = Machine(0.8)
    machine.run(10 * WINDOW)
    machine.attention_s = 30e-6
    machine.run(2 * RETRY_STEPS)
    assert machine.chosen[-1] == 2
    machine.gain = 1.5
    machine.run(8 * RETRY_STEPS)
    assert machine.chosen[-1] == 1


def test_a_choice_follows_what_has_changed():
    machine = Machine(0.8)
    machine.run(10 * WINDOW)
    assert machine.chosen[-1] == 2
    machine.gain = 1.5
    machine.run(2 * RETRY_STEPS)
    assert machine.chosen[-1] == 1
    machine.gain = 0.8
    machine.run(2 * RETRY_STEPS)
    assert machine.chosen[-1] == 2


def test_a_step_that_took_very_long_decides_nothing():
    machine = Machine(0.8)
    machine.run(10 * WINDOW)
    for _ in range(50):
        machine.chooser.note(8, StepTimes(1.0, 0.5, 0.9))
        machine.run(WINDOW)
    assert machine.chosen[-1] == 2 and machine.changes == 1


def test_the_models_error_is_that_against_what_two_took():
    machine = Machine(0.8)
    machine.run(10 * WINDOW)
    accuracy, whole = machine.chooser.accuracy, one(100e-6, 200e-6)
    assert accuracy.steps == 1
    predicted, measured = predicted_s([whole], LAYERS, 2), 0.8 * whole.total_s
    assert accuracy.bias == pytest.approx((predicted - measured) / measured)


def test_a_trial_that_other_buckets_interrupted_is_begun_anew():
    machine = Machine(0.8)
    while machine.chooser.of(8).microbatches == 1:
        machine.run(1)
    for _ in range(100):
        machine.chooser.note(16, one(100e-6, 30e-6))
    machine.run(1)
    assert machine.chooser.of(8).microbatches == 1 and machine.chooser.accuracy.steps == 0
    machine.run(4 * WINDOW)
    assert machine.chosen[-1] == 2


def sizes(setting):
    return list(Microbatching(LAYERS, setting).sizes(Buckets((1, 2, 4, 7))))


def test_what_may_run_is_captured_and_a_node_that_starts_with_one_stays_there():
    ones = [StepSize(1), StepSize(2), StepSize(4), StepSize(7)]
    assert sizes("1") == ones
    both = [StepSize(1), StepSize(2), StepSize(2, 2), StepSize(4), StepSize(4, 2), StepSize(7)]
    assert sizes("2") == sizes("auto") == both
    fixed = Microbatching(LAYERS, "1")
    fixed.use("2")
    assert fixed.size(4, 4) == StepSize(4)


@pytest.mark.parametrize(
    "bucket, rows, microbatches", [(4, 4, 2), (4, 3, 2), (4, 2, 1), (7, 7, 1), (1, 1, 1), (2, 2, 2)]
)
def test_a_second_microbatch_that_would_be_empty_is_none(bucket, rows, microbatches):
    assert Microbatching(LAYERS, "2").size(bucket, rows) == StepSize(bucket, microbatches)


def test_a_setting_holds_from_the_next_step_on_and_what_runs_is_told():
    microbatching = Microbatching(LAYERS, "auto")
    assert microbatching.size(8, 8) == StepSize(8)
    microbatching.use("2")
    assert microbatching.size(8, 8) == StepSize(8, 2)
    microbatching.note(StepSize(8, 2), one(1e-4, 1e-4))
    assert microbatching.model.microbatches == 2 and microbatching.model.comparisons == 0


def test_measured_steps_make_the_choice():
    microbatching = Microbatching(LAYERS, "auto")
    for _ in range(20 * WINDOW):
        size = microbatching.size(8, 8)
        times = one(100e-6, 200e-6)
        share = 0.8 if size.microbatches == 2 else 1.0
        microbatching.note(size, StepTimes(times.total_s * share, times.attention_s, times.layers_s))
    assert microbatching.size(8, 8) == StepSize(8, 2)
    assert microbatching.model.comparisons == 1 and 0 < microbatching.model.error_ratio < 0.5
