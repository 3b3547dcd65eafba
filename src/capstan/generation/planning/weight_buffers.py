"""What streaming weights takes: a ring on the device, staging for the disk, decoded units."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from capstan.generation.planning.placement import Tier
from capstan.models.weight_manifest import StoredTensor, WeightManifest
from capstan.storage.slab import aligned

# Units that are read from disk ahead of the one that crosses to the device.
STAGING_SLOTS = 2


class WeightBuffers(NamedTuple):
    """Sizes of the buffers that streaming needs: one slot of each ring, and the decoded unit."""

    ring_slots: int
    device_slot_bytes: int
    host_slot_bytes: int
    decoded_bytes: int
    scratch_bytes: int

    @property
    def num_decoded(self) -> int:
        """Units that are computed with at the same time: the last batches of one, the first of the next."""
        return self.ring_slots - 1

    @property
    def device_bytes(self) -> int:
        decoded = self.num_decoded * self.decoded_bytes + self.scratch_bytes
        return self.ring_slots * self.device_slot_bytes + decoded

    @property
    def host_bytes(self) -> int:
        return STAGING_SLOTS * self.host_slot_bytes


def buffers_for(manifest: WeightManifest, tiers: Mapping[str, Tier], *, ring_slots: int) -> WeightBuffers:
    """The buffers that a placement of the weights needs."""

    def largest(sizes: Iterator[int]) -> int:
        return max(sizes, default=0)

    def part(unit: tuple[StoredTensor, ...], *away: Tier) -> int:
        return sum(aligned(each.stored_bytes) for each in unit if tiers[each.name] in away)

    return WeightBuffers(
        ring_slots=ring_slots,
        device_slot_bytes=largest(part(unit, "host", "disk") for unit in manifest.units),
        host_slot_bytes=largest(part(unit, "disk") for unit in manifest.units),
        decoded_bytes=largest(sum(aligned(each.decoded_bytes) for each in unit) for unit in manifest.units),
        scratch_bytes=largest(each.scratch_bytes for unit in manifest.units for each in unit),
    )
