"""Which IDs are given a row, and which rows make room: both by stated rules."""

from dataclasses import dataclass

from capstan.errors import UsageError


@dataclass(frozen=True)
class Frequency:
    """An ID is given a row at the `count`-th batch that it is looked up in for training.

    Counted in a fixed sketch (count-min, two positions), so another ID's count may let one in early; none
    comes late.
    """

    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 255:
            raise UsageError(f"Frequency({self.count}): give 1 to 255 batches.")


@dataclass(frozen=True)
class Probability:
    """An ID without a row is given one with this probability at each batch that it is looked up in.

    The draw is a function of (seed, table, ID, step): the same run admits the same IDs.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"Probability({self.share}): give a number above 0, up to 1.")


@dataclass(frozen=True)
class LeastRecent:
    """A full table drops the row whose last training lookup is longest ago, with its optimizer state."""


@dataclass(frozen=True)
class LeastFrequent:
    """A full table drops the row that was looked up for training in the fewest batches, with its state; of
    equals the one whose last lookup is longest ago. Counts stop at 256: rows used more often are equals."""


@dataclass(frozen=True)
class TimeToLive:
    """Rows not looked up for training in the last `steps` steps go; a full table drops the oldest."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"TimeToLive({self.steps}): give 1 step or more.")


Admission = Frequency | Probability
Eviction = LeastRecent | LeastFrequent | TimeToLive
