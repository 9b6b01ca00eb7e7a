"""The bandwidth that a line through timed steps gives."""

import random

import pytest
from flume_common.read_speed import ReadSums


def steps(bandwidth, fixed_s, sizes, noise_s=0.0, seed=1):
    rng = random.Random(seed)
    sums = ReadSums()
    for size in sizes:
        sums.add(size, fixed_s + size / bandwidth + rng.gauss(0, noise_s))
    return sums


def test_what_does_not_grow_with_the_bytes_does_not_count():
    sums = steps(4e9, fixed_s=0.002, sizes=range(1_000_000, 9_000_000, 50_000))
    assert sums.bandwidth_bytes_per_s() == pytest.approx(4e9)
    assert sums.bytes / sums.seconds < 2e9, "the ratio of the sums is far off"


def test_noise_is_borne_while_the_slope_stands_out_of_it():
    sums = steps(4e9, 0.002, range(1_000_000, 9_000_000, 20_000), noise_s=0.0005)
    assert sums.bandwidth_bytes_per_s() == pytest.approx(4e9, rel=0.15)


@pytest.mark.parametrize("seed", range(20))
def test_steps_that_are_alike_or_few_tell_nothing(seed):
    alike = steps(4e9, 0.002, range(5_000_000, 5_010_000, 50), noise_s=0.001, seed=seed)
    assert alike.bandwidth_bytes_per_s() == 0
    assert steps(4e9, 0.002, [5_000_000] * 50).bandwidth_bytes_per_s() == 0
    assert steps(4e9, 0.002, range(1, 8), seed=seed).bandwidth_bytes_per_s() == 0
    assert ReadSums().bandwidth_bytes_per_s() == 0


def test_sums_differ_by_what_came_between():
    early, late = range(1_000_000, 2_000_000, 50_000), range(3_000_000, 6_000_000, 50_000)
    both = steps(1e9, 0.01, [*early, *late])
    window = both.plus(steps(1e9, 0.01, early), -1.0)
    assert window.steps == len(late)
    assert window.bandwidth_bytes_per_s() == pytest.approx(1e9)
