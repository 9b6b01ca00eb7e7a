"""The step model, against a pipeline that is simulated event by event."""

import pytest
from flume_weight.cuda.microbatches import Accuracy, LayerTimes, choose, expected, step_s
from hypothesis import given
from hypothesis import strategies as st

SECONDS = st.floats(min_value=1e-6, max_value=1e-2)
WHOLE = LayerTimes(dense_s=150e-6, attention_s=180e-6)


def simulated(layers, microbatches, times):
    """Two servers, each first come first served: a microbatch is in the dense path, then at attention."""
    dense_free = attention_free = 0.0
    asked = [0.0] * microbatches
    for microbatch in range(microbatches):  # before the first layer's queries: counted as a dense pass
        dense_free += times.dense_s
        attention_free = max(attention_free, dense_free) + times.attention_s
        asked[microbatch] = attention_free
    for layer in range(layers):
        for microbatch in range(microbatches):
            dense_free = max(dense_free, asked[microbatch]) + times.dense_s
            if layer + 1 < layers:
                attention_free = max(attention_free, dense_free) + times.attention_s
                asked[microbatch] = attention_free
    return dense_free - times.dense_s * microbatches


@given(SECONDS, SECONDS, st.integers(1, 4), st.integers(20, 60))
def test_the_formula_is_what_a_pipeline_does(dense_s, attention_s, microbatches, layers):
    times = LayerTimes(dense_s, attention_s)
    got, want = step_s(layers, microbatches, times), simulated(layers, microbatches, times)
    # Filling and draining is only estimated: within one more period.
    slack = microbatches * max(dense_s, attention_s)
    assert abs(got - want) <= slack + 1e-9


def test_one_microbatch_costs_the_sum():
    assert step_s(32, 1, WHOLE, outside_s=1e-3) == pytest.approx(32 * 330e-6 + 1e-3)


def test_two_microbatches_cost_the_longer_side_twice_and_the_fill():
    times = LayerTimes(dense_s=150e-6, attention_s=100e-6)
    assert step_s(32, 2, times) == pytest.approx(32 * 300e-6 + 100e-6)


def test_weights_that_are_read_again_make_two_microbatches_slower_where_attention_is_short():
    times = {count: expected(WHOLE, count, hop_s=20e-6) for count in (1, 2, 4)}
    short = {count: LayerTimes(150e-6, 40e-6) for count in (1, 2)}
    assert choose(32, short).microbatches == 1
    assert times[2].dense_s == WHOLE.dense_s
    assert times[2].attention_s == pytest.approx(20e-6 + 80e-6)


def test_long_attention_hides_behind_the_dense_path():
    whole = LayerTimes(dense_s=100e-6, attention_s=200e-6)
    times = {count: expected(whole, count, hop_s=0.0) for count in (1, 2, 4)}
    chosen = choose(32, times)
    assert chosen.microbatches == 2
    assert chosen.predicted_s < 0.7 * step_s(32, 1, whole)


def test_a_gain_smaller_than_the_models_error_is_no_gain():
    times = {1: LayerTimes(100e-6, 100e-6), 2: LayerTimes(99.5e-6, 99.5e-6)}
    assert choose(32, times).microbatches == 1


@given(st.dictionaries(st.integers(2, 8), st.tuples(SECONDS, SECONDS), max_size=4), SECONDS, SECONDS)
def test_the_choice_is_never_predicted_to_be_longer_than_one_microbatch(others, dense_s, attention_s):
    times = {1: LayerTimes(dense_s, attention_s)} | {
        count: LayerTimes(*each) for count, each in others.items()
    }
    chosen = choose(16, times)
    assert chosen.predicted_s <= step_s(16, 1, times[1])
    assert chosen.predicted_s == step_s(16, chosen.microbatches, times[chosen.microbatches])


def test_times_of_one_microbatch_are_asked_for():
    with pytest.raises(ValueError, match=r"got those of \[2\]"):
        choose(32, {2: WHOLE})


def test_the_models_error_is_kept():
    accuracy = Accuracy()
    assert accuracy.note(predicted_s=1.1, measured_s=1.0) == pytest.approx(0.1)
    assert accuracy.note(predicted_s=0.8, measured_s=1.0) == pytest.approx(-0.2)
    assert accuracy.mean_absolute == pytest.approx(0.15)
    assert accuracy.bias == pytest.approx(-0.05)
    assert accuracy.worst == pytest.approx(0.2)
