"""The byte ledger: what crossed which link, carrying what, and how long the link was busy."""

from collections import Counter
from threading import Lock

from capstan.plans import Traffic


class Ledger:
    """Thread-safe counters of bytes and busy seconds.

    Names of links are `"source->target"`. Bytes are exact; seconds are what the worker of that link spent.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._busy_s: Counter[str] = Counter()

    def count(self, link: str, content: str, size_bytes: int) -> None:
        """Note that `size_bytes` of `content` crossed `link`."""
        with self._lock:
            self._bytes[link, content] += size_bytes

    def spend(self, resource: str, seconds: float) -> None:
        """Note that `resource` worked for `seconds`."""
        with self._lock:
            self._busy_s[resource] += seconds  # type: ignore[assignment]  # typeshed: Counter of int only

    @property
    def traffic(self) -> Traffic:
        """All bytes so far."""
        with self._lock:
            return Traffic(dict(self._bytes))

    @property
    def busy_s(self) -> dict[str, float]:
        """Busy seconds by resource so far."""
        with self._lock:
            return dict(self._busy_s)
