"""An event simulator: works that need a resource each and wait for each other, in virtual time."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from capstan.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Work:
    """`seconds` of one resource, from when all works named in `after` are done.

    `delay_s` passes between its end and what waits for it, while the resource is free again: a message's
    latency. Of several works that are ready the resource takes the one with the lowest `order`. `behind`
    names works and the seconds by which this one starts later than they do, at the least: how works follow
    each other through something that they occupy for only a part of their time.
    """

    name: str
    resource: str
    seconds: float
    after: tuple[str, ...] = ()
    delay_s: float = 0.0
    order: int = 0
    behind: tuple[tuple[str, float], ...] = ()


class Interval(NamedTuple):
    """When a work ran, and on what."""

    name: str
    resource: str
    start_s: float
    end_s: float


def simulate(works: Iterable[Work]) -> tuple[Interval, ...]:
    """When each work runs, in the order in which they start; a resource does one work at a time.

    Raises:
        UsageError: two works have one name, wait for one that is not there, or wait for each other.
    """
    listed = list(works)
    _require_names(listed)
    run = _Run(listed)
    while run.events:
        run.start_what_is_ready(*run.next_events())
    if len(run.intervals) < len(listed):
        stuck = next(work.name for work in listed if run.waits[work.name])
        raise UsageError(f"{stuck!r} waits for itself by way of others; nothing would ever start.")
    return tuple(run.intervals)


class _Event(NamedTuple):
    """At `time_s` a work becomes ready, or (`ready` is False) the resource of one becomes free."""

    time_s: float
    place: int
    ready: bool


class _Run:
    """The state of one simulation."""

    def __init__(self, works: list[Work]) -> None:
        self.works = works
        self.waits = {work.name: len(set(work.after)) + len(work.behind) for work in works}
        self.reached_s = dict.fromkeys(self.waits, 0.0)
        self.followers: defaultdict[str, list[int]] = defaultdict(list)
        for place, work in enumerate(works):
            for before in set(work.after):
                self.followers[before].append(place)
        self.starts_later: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        for place, work in enumerate(works):
            for before, lag_s in work.behind:
                self.starts_later[before].append((place, lag_s))
        self.ready: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.free_from_s: defaultdict[str, float] = defaultdict(float)
        self.events = [
            _Event(0.0, place, True) for place, work in enumerate(works) if not self.waits[work.name]
        ]
        heapq.heapify(self.events)
        self.intervals: list[Interval] = []

    def next_events(self) -> tuple[float, list[str]]:
        """Take all events of the next moment; the moment, and the resources on which something changed."""
        now = self.events[0].time_s
        changed: dict[str, None] = {}
        while self.events and self.events[0].time_s == now:
            event = heapq.heappop(self.events)
            work = self.works[event.place]
            changed[work.resource] = None
            if event.ready:
                heapq.heappush(self.ready[work.resource], (work.order, event.place))
        return now, list(changed)

    def start_what_is_ready(self, now: float, resources: list[str]) -> None:
        for resource in resources:
            if self.ready[resource] and self.free_from_s[resource] <= now:
                self._start(heapq.heappop(self.ready[resource])[1], now)

    def _start(self, place: int, now: float) -> None:
        work = self.works[place]
        end_s = now + work.seconds
        self.free_from_s[work.resource] = end_s
        self.intervals.append(Interval(work.name, work.resource, now, end_s))
        heapq.heappush(self.events, _Event(end_s, place, False))
        for follower in self.followers[work.name]:
            self._reach(follower, end_s + work.delay_s)
        for follower, lag_s in self.starts_later[work.name]:
            self._reach(follower, now + lag_s)

    def _reach(self, place: int, time_s: float) -> None:
        """One of the things that a work waits for comes at `time_s`."""
        name = self.works[place].name
        self.waits[name] -= 1
        self.reached_s[name] = max(self.reached_s[name], time_s)
        if not self.waits[name]:
            heapq.heappush(self.events, _Event(self.reached_s[name], place, True))


def _require_names(works: list[Work]) -> None:
    names = {work.name for work in works}
    if len(names) < len(works):
        twice = next(name for name, count in Counter(work.name for work in works).items() if count > 1)
        raise UsageError(f"Two works have the name {twice!r}; give each its own.")
    for work in works:
        if not (math.isfinite(work.seconds + work.delay_s) and min(work.seconds, work.delay_s) >= 0):
            raise UsageError(
                f"{work.name!r} takes {work.seconds} s and {work.delay_s} s of delay; give times."
            )
        if not all(math.isfinite(lag_s) and lag_s >= 0 for _, lag_s in work.behind):
            raise UsageError(f"{work.name!r} starts {work.behind} behind others; give times of 0 s or more.")
        for before in (*work.after, *(name for name, _ in work.behind)):
            if before not in names:
                raise UsageError(f"{work.name!r} waits for {before!r}, which is not among the works.")
