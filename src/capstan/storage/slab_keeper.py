"""A slab that outlives a job, because pinning memory takes seconds for every few gigabytes."""

import torch

from capstan.storage.slab import Slab


class SlabKeeper:
    """Lends one slab of host memory to one job after another, as long as they want the same size."""

    def __init__(self, name: str, *, pinned: bool) -> None:
        self._name, self._pinned = name, pinned
        self._kept: Slab | None = None

    def take(self, size_bytes: int) -> Slab:
        """A slab of exactly this size; what was in it before may still be there."""
        kept, self._kept = self._kept, None
        if kept is not None and kept.size_bytes == size_bytes:
            kept.used_bytes = 0
            return kept
        if kept is not None:
            kept.close()
        return Slab(self._name, size_bytes, device=torch.device("cpu"), pinned=self._pinned)

    def give_back(self, slab: Slab) -> None:
        """Nobody uses the slab any more: keep it for the next job."""
        self.close()
        self._kept = slab

    def close(self) -> None:
        """Give the memory back to the system."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
