import pytest
from hypothesis import given
from hypothesis import strategies as st

from capstan.hardware.time_slice import (
    Sample,
    TimeSlice,
    growing_samples,
    median_at_each_size,
    median_seconds,
)


class FakeClock:
    """Time that passes only when the work says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_part_ends_no_later_than_the_whole() -> None:
    clock = FakeClock()
    whole = TimeSlice(10.0, clock)
    clock.now += 8.0
    assert whole.part(0.5).left() == pytest.approx(2.0)
    clock.now += 5.0
    assert whole.left() == 0.0
    assert whole.part(0.5).left() == 0.0


def test_the_median_hides_one_stall() -> None:
    clock = FakeClock()
    times = iter([9.0, 1.0, 50.0, 1.0, 2.0, 1.0])  # the first warms up

    def work() -> None:
        clock.now += next(times)

    assert median_seconds(work, TimeSlice(54.5, clock)) == 1.0


def test_at_least_three_measurements_are_made_even_without_time() -> None:
    calls: list[int] = []
    median_seconds(lambda: calls.append(1), TimeSlice(0.0))
    assert len(calls) == 1 + 3


@given(
    budget_s=st.floats(min_value=0.0, max_value=100.0),
    fixed_s=st.floats(min_value=0.0, max_value=5.0),
    first_s=st.floats(min_value=1e-3, max_value=50.0),
    growth=st.floats(min_value=1.1, max_value=10.0),
    calls=st.integers(min_value=1, max_value=4),
)
def test_growing_stays_within_the_slice_when_work_grows_as_said(
    budget_s: float, fixed_s: float, first_s: float, growth: float, calls: int
) -> None:
    clock = FakeClock()
    seconds = {size: fixed_s + first_s * growth**size for size in range(12)}

    def measure(size: int) -> float:
        clock.now += calls * seconds[size]
        return seconds[size]

    time_slice = TimeSlice(budget_s, clock)
    samples = growing_samples(measure, range(12), time_slice, growth=growth * 1.001, calls=calls)
    assert samples[:2] == [Sample(0, seconds[0]), Sample(1, seconds[1])]
    assert [sample.size for sample in samples] == sorted(sample.size for sample in samples)
    # Only the two smallest sizes may overrun, because nothing is known before them.
    assert time_slice.spent() <= max(budget_s, calls * (seconds[0] + seconds[1])) * (1 + 1e-9)


def test_a_fixed_cost_does_not_end_the_growth_at_small_sizes() -> None:
    clock = FakeClock()

    def measure(size: int) -> float:
        seconds = 0.016 + 1e-12 * size**3
        clock.now += seconds
        return seconds

    sizes = [64, 128, 256, 512, 1024, 2048]
    samples = growing_samples(measure, sizes, TimeSlice(0.2, clock), growth=8.0)
    assert samples[-1].size == 2048


def test_one_stall_does_not_end_the_growth() -> None:
    clock = FakeClock()
    stalls = iter([0.0, 0.1])  # the second size stalls, once

    def measure(size: int) -> float:
        seconds = 1e-12 * size**3 + next(stalls, 0.0)
        clock.now += seconds
        return seconds

    sizes = [64, 128, 256, 512, 1024, 2048]
    samples = growing_samples(measure, sizes, TimeSlice(0.3, clock), growth=8.0)
    assert samples[-1].size == 2048


def test_time_that_is_left_goes_into_repeats_at_the_largest_size() -> None:
    clock = FakeClock()

    def measure(size: int) -> float:
        clock.now += size
        return float(size)

    samples = growing_samples(measure, [1, 2, 4], TimeSlice(20.0, clock), growth=2.0)
    assert [sample.size for sample in samples] == [1, 2, 4, 4, 4, 4]


def test_a_median_is_given_for_each_size() -> None:
    samples = [Sample(1, 5.0), Sample(2, 1.0), Sample(2, 9.0), Sample(2, 2.0)]
    assert median_at_each_size(samples) == {1: 5.0, 2: 2.0}
