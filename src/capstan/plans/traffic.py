"""Bytes that cross links, by link and by what they carry."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


def link_name(source: str, target: str) -> str:
    """What plans, traces and ledgers call the link from one place to another: `"host->device"`."""
    return f"{source}->{target}"


def rank_link(source: int, target: int) -> str:
    """The link between two ranks of a group: `"rank 0->rank 1"`."""
    return link_name(f"rank {source}", f"rank {target}")


@dataclass(frozen=True)
class Traffic:
    """How many bytes crossed each link, per content; a value that can be added.

    The key is `(link, content)`: link is `"source->target"`, content says what the bytes were
    (`"weights"`, `"cache"`, `"activations"`, …). Predicted and measured traffic have the same type, so
    that they can be compared with `==`.
    """

    size_bytes: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kept = {key: int(count) for key, count in sorted(self.size_bytes.items()) if count}
        object.__setattr__(self, "size_bytes", MappingProxyType(kept))

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic.total((self, other))

    def __sub__(self, other: "Traffic") -> "Traffic":
        difference = Counter(self.size_bytes)
        difference.subtract(other.size_bytes)
        return Traffic(difference)

    def __rmul__(self, times: int) -> "Traffic":
        return Traffic({key: times * count for key, count in self.size_bytes.items()})

    def __hash__(self) -> int:
        return hash(tuple(self.size_bytes.items()))

    def on(self, link: str) -> int:
        """All bytes that crossed `link`."""
        return sum(count for (name, _), count in self.size_bytes.items() if name == link)

    def of(self, *contents: str) -> "Traffic":
        """Only the bytes that carried one of `contents`."""
        return Traffic({key: count for key, count in self.size_bytes.items() if key[1] in contents})

    @property
    def links(self) -> tuple[str, ...]:
        """The links that carried anything, in alphabetical order."""
        return tuple(sorted({link for link, _ in self.size_bytes}))

    def to_dict(self) -> dict[str, dict[str, int]]:
        """`{link: {content: bytes}}`, for JSON."""
        nested: dict[str, dict[str, int]] = {}
        for (link, content), count in self.size_bytes.items():
            nested.setdefault(link, {})[content] = count
        return nested

    @classmethod
    def from_dict(cls, told: Mapping[str, Mapping[str, int]]) -> "Traffic":
        """The traffic that `to_dict` told of."""
        return cls({(link, content): count for link, of in told.items() for content, count in of.items()})

    @staticmethod
    def total(parts: Iterable["Traffic"]) -> "Traffic":
        """The sum of many."""
        counter: Counter[tuple[str, str]] = Counter()
        for part in parts:
            counter.update(part.size_bytes)
        return Traffic(counter)
