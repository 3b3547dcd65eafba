"""Weights: where they rest, and how they arrive.

Tensors rest on the device, in one slab of host memory, or on disk: there as byte ranges of the checkpoint
itself, or, when they are stored in fewer bits, in a scratch file. What does not rest on the device is
streamed: while one unit (a layer, or the output matrix) computes, the next one arrives in the other of two
buffers. Encoded tensors are decoded once for each visit of a unit, whatever the number of batches.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.generation.checkpoint_map import Piece, Sources
from capstan.generation.inventory import Inventory, StoredTensor
from capstan.generation.placement import Tier
from capstan.storage import Checkpoint, DiskSlab, Slab
from capstan.storage.slab import aligned
from capstan.transport import Lane, Ledger, Ticket

HOST_TO_DEVICE, DEVICE_TO_HOST = "host->device", "device->host"
DISK_TO_HOST, HOST_TO_DISK = "disk->host", "host->disk"

# Weights are read and encoded in runs of about this many checkpoint bytes while loading.
LOADING_BYTES = 16 << 20


class WeightBuffers(NamedTuple):
    """Sizes of the buffers that streaming needs: one slot of each ring, and the decoded unit."""

    device_slot_bytes: int
    host_slot_bytes: int
    decoded_bytes: int
    scratch_bytes: int

    @property
    def device_bytes(self) -> int:
        return 2 * self.device_slot_bytes + self.decoded_bytes + self.scratch_bytes

    @property
    def host_bytes(self) -> int:
        return 2 * self.host_slot_bytes


def buffers_for(inventory: Inventory, tiers: Mapping[str, Tier]) -> WeightBuffers:
    """The buffers that a placement of the weights needs."""

    def largest(sizes: Iterator[int]) -> int:
        return max(sizes, default=0)

    def part(unit: tuple[StoredTensor, ...], *away: Tier) -> int:
        return sum(aligned(each.stored_bytes) for each in unit if tiers[each.name] in away)

    return WeightBuffers(
        device_slot_bytes=largest(part(unit, "host", "disk") for unit in inventory.units),
        host_slot_bytes=largest(part(unit, "disk") for unit in inventory.units),
        decoded_bytes=largest(sum(aligned(each.decoded_bytes) for each in unit) for unit in inventory.units),
        scratch_bytes=largest(each.scratch_bytes for unit in inventory.units for each in unit),
    )


class WeightStore:
    """All weights of a model at their places, and the stream that brings them to the device."""

    def __init__(
        self,
        inventory: Inventory,
        tiers: Mapping[str, Tier],
        *,
        checkpoint: Checkpoint,
        sources: Sources,
        device: torch.device,
        disk: DiskSlab | None,
        lane: Lane,
    ) -> None:
        self._inventory, self._tiers = inventory, tiers
        self._checkpoint, self._sources = checkpoint, sources
        self._device, self._disk, self._lane = device, disk, lane
        self._disk_offsets: dict[str, int] = {}
        pinned = device.type == "cuda"
        placed = inventory.placeable.values()

        def resting(tier: Tier) -> int:
            return sum(aligned(each.stored_bytes) for each in placed if tiers[each.name] == tier)

        buffers = buffers_for(inventory, tiers)
        rest_bytes = sum(aligned(each.computed_bytes) for each in inventory.rest)
        self._device_slab = Slab(
            "weights on the device",
            resting("device") + rest_bytes + 2 * buffers.device_slot_bytes + buffers.decoded_bytes,
            device=device,
        )
        self._host_slab = Slab(
            "weights on the host",
            resting("host") + 2 * buffers.host_slot_bytes,
            device=torch.device("cpu"),
            pinned=pinned,
        )
        self._ring = [self._device_slab.take(buffers.device_slot_bytes) for _ in range(2)]
        self._staging = [self._host_slab.take(buffers.host_slot_bytes) for _ in range(2)]
        self._decoded = self._device_slab.take(buffers.decoded_bytes)
        self._staged: list[torch.cuda.Event | None] = [None, None]
        self._homes: dict[str, Tensor] = {}
        self._visits = 0
        self._arriving: tuple[int, Ticket, int] | None = None
        self.rest: dict[str, Tensor] = {}

    @property
    def device_bytes(self) -> int:
        """Device memory in use."""
        return self._device_slab.size_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory in use."""
        return self._host_slab.size_bytes

    # --- loading -----------------------------------------------------------------------------------------

    def load(self) -> Iterator[int]:
        """Bring every tensor to its place; yields the checkpoint bytes done after each tensor."""
        self.rest = self._load_rest()
        done = 0
        for tensor in self._inventory.placeable.values():
            tier = self._tiers[tensor.name]
            if tier != "disk":
                slab = self._device_slab if tier == "device" else self._host_slab
                self._homes[tensor.name] = slab.take(tensor.stored_bytes)
                for start, payload in self._encoded_runs(tensor):
                    self._homes[tensor.name][start : start + payload.numel()].copy_(payload)
            elif not tensor.is_as_in_checkpoint:
                assert self._disk is not None, "the planner reserves scratch space for encoded weights"
                self._disk_offsets[tensor.name] = offset = self._disk.take(tensor.stored_bytes)
                for start, payload in self._encoded_runs(tensor):
                    self._disk.write(offset + start, payload.cpu())
            done += tensor.spec.num_elements * tensor.dtype.itemsize
            yield done

    def _load_rest(self) -> dict[str, Tensor]:
        rest = {}
        for tensor in self._inventory.rest:
            stored = torch.empty(tensor.spec.num_elements * tensor.dtype.itemsize, dtype=torch.uint8)
            for piece in self._sources[tensor.name]:
                self._read_piece(tensor, piece, stored)
            home = _typed(self._device_slab.take(tensor.computed_bytes), tensor)
            home.copy_(stored.view(tensor.dtype).view(tensor.spec.shape))
            rest[tensor.name] = home
        return rest

    def _read_piece(self, tensor: StoredTensor, piece: Piece, target: Tensor) -> None:
        start = piece.start * tensor.dtype.itemsize
        size = self._checkpoint.tensors[piece.source].size_bytes
        self._checkpoint.read(piece.source, target[start : start + size])

    def _encoded_runs(self, tensor: StoredTensor) -> Iterator[tuple[int, Tensor]]:
        """The tensor's payload in runs of whole rows: where each run starts, and its bytes."""
        width = tensor.spec.shape[-1] if tensor.spec.shape else 1
        row_bytes = width * tensor.dtype.itemsize
        encoded_row_bytes = tensor.codec.encoded_bytes((1, width), tensor.dtype)
        rows_at_once = max(1, LOADING_BYTES // row_bytes)
        for piece in self._sources[tensor.name]:
            num_rows = prod(self._checkpoint.tensors[piece.source].shape) // width
            first_row = piece.start // width
            for row in range(0, num_rows, rows_at_once):
                count = min(rows_at_once, num_rows - row)
                raw = torch.empty(count * row_bytes, dtype=torch.uint8)
                self._checkpoint.read(piece.source, raw, start=row * row_bytes)
                values = raw.view(tensor.dtype).view(count, width)
                if not tensor.is_as_in_checkpoint:
                    values = values.to(self._device)
                yield (first_row + row) * encoded_row_bytes, tensor.codec.encode(values).payload

    # --- streaming ---------------------------------------------------------------------------------------

    def prefetch(self, unit: int) -> None:
        """Start bringing a unit's tensors to the device, into the buffer that the unit before last used."""
        if self._arriving is not None and self._arriving[0] == unit:
            return
        slot = self._visits % 2
        self._visits += 1
        away = [each for each in self._inventory.units[unit] if self._tiers[each.name] != "device"]
        ticket = self._lane.submit(lambda: self._bring(away, slot))
        self._arriving = (unit, ticket, slot)

    def take(self, unit: int) -> dict[str, Tensor]:
        """The unit's tensors on the device, ready to compute with, until the next `take`."""
        self.prefetch(unit)
        assert self._arriving is not None
        _, ticket, slot = self._arriving
        self._arriving = None
        ticket.wait()
        tensors: dict[str, Tensor] = {}
        arrived = decoded = 0
        for tensor in self._inventory.units[unit]:
            if self._tiers[tensor.name] == "device":
                payload = self._homes[tensor.name]
            else:
                payload = self._ring[slot][arrived : arrived + tensor.stored_bytes]
                arrived += aligned(tensor.stored_bytes)
            if tensor.is_plain:
                tensors[tensor.name] = _typed(payload, tensor)
            else:
                target = _typed(self._decoded[decoded : decoded + tensor.decoded_bytes], tensor)
                tensor.codec.decode_into(payload, tensor.spec.shape, tensor.dtype, target)
                tensors[tensor.name] = target
                decoded += aligned(tensor.decoded_bytes)
        return tensors

    def _bring(self, tensors: list[StoredTensor], slot: int) -> None:
        arrived = staged = 0
        staging_is_free = self._staged[slot]
        if staging_is_free is not None:
            staging_is_free.synchronize()
        for tensor in tensors:
            size = tensor.stored_bytes
            if self._tiers[tensor.name] == "host":
                source = self._homes[tensor.name]
            else:
                source = self._staging[slot][staged : staged + size]
                staged += aligned(size)
                with self._lane.booking(DISK_TO_HOST, "weights", size):
                    self._read_stored(tensor, source)
            target = self._ring[slot][arrived : arrived + size]
            self._lane.copy(target, source, link=HOST_TO_DEVICE, content="weights")
            arrived += aligned(size)
        self._staged[slot] = self._lane.fence()

    def _read_stored(self, tensor: StoredTensor, target: Tensor) -> None:
        if tensor.is_as_in_checkpoint:
            for piece in self._sources[tensor.name]:
                self._read_piece(tensor, piece, target)
        else:
            assert self._disk is not None
            self._disk.read(self._disk_offsets[tensor.name], target)

    def rows(self, tokens: Tensor, ledger: Ledger) -> Tensor:
        """The input embedding's rows of `tokens` (on the host), on the device: `[tokens, width]`.

        Only these rows move; the table stays where it is.
        """
        table, tier = self._inventory.table, self._tiers[self._inventory.table.name]
        row_bytes, width = self._inventory.row_bytes, table.spec.shape[1]
        if tier == "device":
            gathered = self._homes[table.name].view(-1, row_bytes)[tokens.to(self._device)]
        else:
            gathered = self._rows_on_host(tokens, tier, ledger).to(self._device)
            ledger.count(HOST_TO_DEVICE, "weights", gathered.numel())
        if table.is_plain:
            return gathered.view(table.spec.dtype)
        rows = torch.empty(len(tokens), width, dtype=table.spec.dtype, device=self._device)
        table.codec.decode_into(gathered.flatten(), tuple(rows.shape), table.dtype, rows)
        return rows

    def _rows_on_host(self, tokens: Tensor, tier: Tier, ledger: Ledger) -> Tensor:
        table, row_bytes = self._inventory.table, self._inventory.row_bytes
        if tier == "host":
            return self._homes[table.name].view(-1, row_bytes)[tokens]
        rows = torch.empty(len(tokens), row_bytes, dtype=torch.uint8)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if table.is_as_in_checkpoint:
                source = self._sources[table.name][0].source
                self._checkpoint.read(source, row, start=token * row_bytes)
            else:
                assert self._disk is not None
                self._disk.read(self._disk_offsets[table.name] + token * row_bytes, row)
        ledger.count(DISK_TO_HOST, "weights", rows.numel())
        return rows

    def settle(self) -> None:
        """Wait for what is arriving, and book its time."""
        self._lane.drain()
        self._lane.stopwatch.settle()

    def close(self) -> None:
        """Give the memory back."""
        self._lane.close()
        self._homes, self.rest, self._ring, self._staging = {}, {}, [], []
        self._device_slab.close()
        self._host_slab.close()


def _typed(payload: Tensor, tensor: StoredTensor) -> Tensor:
    return payload.view(tensor.spec.dtype).view(tensor.spec.shape)
