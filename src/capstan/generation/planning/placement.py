"""Where each thing lies: device, host or disk, for whole tensors and whole layers.

FlexGen's percentages were rounded per layer, so that "20 %" became 8 % and "25 to 30 %" a jump of 18 GiB.
Here a share is spread over the tensors of the whole model by carrying the rounding error along, which
misses the share by two tensors at most; what was realised is printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from capstan.errors import UsageError, unknown_name

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")
Shares = Mapping[Tier, float]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the weights, the KV cache and the activations of a model lie.

    `weights` maps tensor names to tiers; `cache` has a tier for each layer; `host_attention` is the share of
    a block's batches whose cache, where it is not on the device, is attended on the host; that of the others
    crosses the link. `ring_slots` says how many streamed layers have room on the device: 2, or 3, so that
    neither links nor processors wait for each other between layers.
    """

    weights: Mapping[str, Tier]
    cache: tuple[Tier, ...]
    activations: Tier
    host_attention: float
    ring_slots: int = 2

    def __hash__(self) -> int:
        rest = (self.cache, self.activations, self.host_attention, self.ring_slots)
        return hash((tuple(sorted(self.weights.items())), *rest))

    def host_batches(self, num_batches: int) -> frozenset[int]:
        """The batches that are attended on the host, spread evenly among all."""
        count = round(self.host_attention * num_batches)
        return frozenset(
            batch
            for batch in range(num_batches)
            if (batch + 1) * count // num_batches > batch * count // num_batches
        )


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A placement asked for by hand: shares of the weights and of the cache's layers; None leaves a part
    to the planner."""

    weights: Shares | None = None
    cache: Shares | None = None
    activations: Tier | None = None
    attention: float | None = None  # the share of it that runs on the host


def parse_wish(words: Sequence[str]) -> Wish:
    """Read `weights=device:0.3,host:0.7 cache=host activations=device attention=host:0.6,device:0.4`.

    Raises:
        UsageError: an unknown part or tier, or shares that do not add up to 1.
    """
    parts: dict[str, str] = {}
    for word in words:
        for item in word.split():
            name, separator, value = item.partition("=")
            if name not in ("weights", "cache", "activations", "attention"):
                raise unknown_name("thing to place", name, ("weights", "cache", "activations", "attention"))
            if not separator or not value:
                raise UsageError(f"--place {item!r} says nothing; write for example {name}=host.")
            parts[name] = value
    attention = _shares("attention", parts["attention"]) if "attention" in parts else None
    if attention is not None and "disk" in attention:
        raise UsageError("Attention runs on 'device' or 'host', not on 'disk'.")
    return Wish(
        weights=_shares("weights", parts["weights"]) if "weights" in parts else None,
        cache=_shares("cache", parts["cache"]) if "cache" in parts else None,
        activations=_tier(parts["activations"]) if "activations" in parts else None,
        attention=None if attention is None else attention.get("host", 0.0),
    )


def _tier(name: str) -> Tier:
    if name not in TIERS:
        raise unknown_name("place", name, TIERS)
    return name


def _shares(part: str, text: str) -> Shares:
    if ":" not in text:
        return {_tier(text): 1.0}
    shares: dict[Tier, float] = {}
    for item in text.split(","):
        name, _, number = item.partition(":")
        try:
            shares[_tier(name)] = float(number)
        except ValueError:
            raise UsageError(f"{part}: {number!r} in {item!r} is not a number; write device:0.3.") from None
    if not (min(shares.values()) >= 0 and abs(sum(shares.values()) - 1) <= 1e-6):
        raise UsageError(
            f"{part}: the shares {text!r} add up to {sum(shares.values()):g}; they must be at least 0 and "
            "add up to 1, as in device:0.3,host:0.5,disk:0.2."
        )
    return shares


def spread(sizes: Sequence[int], shares: Shares) -> list[Tier]:
    """Give each item, in order, to the tier that lags furthest behind its share of the bytes so far.

    Every tier's total differs from its share by at most two of the largest items.
    """
    given = dict.fromkeys(shares, 0.0)
    total = 0.0
    tiers: list[Tier] = []
    for size in sizes:
        total += size
        lagging = max(given, key=lambda tier: (shares[tier] * total - given[tier], -TIERS.index(tier)))
        given[lagging] += size
        tiers.append(lagging)
    return tiers


def realised(tiers: Sequence[Tier], sizes: Sequence[int]) -> str:
    """The shares that came out, for people: `device 29 %, host 51 %, disk 20 %`."""
    total = sum(sizes) or 1
    parts = []
    for tier in TIERS:
        share = sum(size for each, size in zip(tiers, sizes, strict=True) if each == tier) / total
        if share:
            parts.append(f"{tier} {share:.0%}")
    return ", ".join(parts)
