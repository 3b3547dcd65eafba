"""Measuring within a share of time: repeats and sizes grow until the share is used, and no further."""

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import NamedTuple

Clock = Callable[[], float]

# So often the last size is run again when the next seems too long: the last time may have been a stall.
SECOND_THOUGHTS = 3


class TimeSlice:
    """So many seconds, counted from now on a clock that never goes back."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self._seconds = seconds
        self._clock = clock
        self._start = clock()

    def spent(self) -> float:
        return self._clock() - self._start

    def left(self) -> float:
        return max(0.0, self._seconds - self.spent())

    def part(self, share: float) -> "TimeSlice":
        """A share of the whole slice that starts now and ends no later than the slice does."""
        return TimeSlice(min(share * self._seconds, self.left()), self._clock)

    def seconds_of(self, action: Callable[[], object]) -> float:
        """How long one call of `action` takes on this slice's clock."""
        start = self._clock()
        action()
        return self._clock() - start


class Sample(NamedTuple):
    """One timed piece of work: how large it was, and the seconds it took."""

    size: int
    seconds: float


def median_seconds(
    action: Callable[[], object], time_slice: TimeSlice, *, at_least: int = 3, at_most: int = 50
) -> float:
    """The median time of `action`, called until the slice is used."""
    return median_measure(
        lambda: time_slice.seconds_of(action), time_slice, at_least=at_least, at_most=at_most
    )


def median_measure(
    measure: Callable[[], float], time_slice: TimeSlice, *, at_least: int = 3, at_most: int = 50
) -> float:
    """The median of the seconds that `measure` gives, after one call that only warms up.

    The median: one stall of a shared machine must not become the machine's rate.
    """
    measure()
    times: list[float] = []
    while len(times) < at_least or (time_slice.left() and len(times) < at_most):
        times.append(measure())
    return median(times)


def growing_samples(
    measure: Callable[[int], float],
    sizes: Iterable[int],
    time_slice: TimeSlice,
    *,
    growth: float,
    calls: int = 1,
    repeats: int = 20,
) -> list[Sample]:
    """Samples at growing sizes, then repeated at the largest that still fits into the slice.

    `measure(size)` runs a piece of work `calls` times and gives the seconds of one. `growth` is the
    factor by which the work grows from size to size. The next size is predicted from the last two, as
    a fixed cost and one that grows, and tried only when that time is left. So whatever the machine's
    speed, only the two smallest sizes are run without knowing how long they will take.
    """
    samples: list[Sample] = []

    def fits(seconds: float) -> bool:
        return calls * seconds <= time_slice.left()

    def run(size: int) -> None:
        samples.append(Sample(size, measure(size)))

    for size in sizes:
        for _ in range(SECOND_THOUGHTS):
            if not fits(_predicted(samples, growth)) and fits(samples[-1].seconds):
                run(samples[-1].size)
        if not fits(_predicted(samples, growth)):
            break
        run(size)
    largest = samples[-1].size
    while _count(samples, largest) < repeats and fits(samples[-1].seconds):
        run(largest)
    return samples


def _predicted(samples: list[Sample], growth: float) -> float:
    """The next size's seconds, when each step of size adds `growth` times what the step before added.

    A fixed cost, such as waiting for a busy core, must not be multiplied: it would end the growth at
    sizes that say nothing about the rate. For the same reason the shortest time at each size counts.
    """
    shortest: dict[int, float] = {}
    for size, seconds in samples:
        shortest[size] = min(seconds, shortest.get(size, seconds))
    if len(shortest) < 2:
        return 0.0
    before, last = list(shortest.values())[-2:]
    return last + growth * max(0.0, last - before)


def median_at_each_size(samples: Iterable[Sample]) -> dict[int, float]:
    """Size → median seconds, in the order in which the sizes were first measured."""
    times: dict[int, list[float]] = {}
    for sample in samples:
        times.setdefault(sample.size, []).append(sample.seconds)
    return {size: median(seconds) for size, seconds in times.items()}


def _count(samples: list[Sample], size: int) -> int:
    return sum(sample.size == size for sample in samples)
