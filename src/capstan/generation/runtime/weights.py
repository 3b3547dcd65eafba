"""Weights: where they rest, and how they arrive.

Tensors rest on the device, in one slab of host memory, or on disk: there as byte ranges of the checkpoint
itself, or, when they are stored in fewer bits, in a scratch file. What does not rest on the device is
streamed: while one unit (a layer, or the output matrix) computes, the next ones arrive in the other slots of
a ring, in the order in which sweeps need them and across the end of a sweep. Encoded tensors are decoded
once for each visit of a unit, whatever the number of batches.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from capstan.generation.planning.placement import Tier
from capstan.generation.planning.resources import DISK_TO_HOST, HOST_TO_DEVICE
from capstan.generation.planning.weight_buffers import STAGING_SLOTS, buffers_for
from capstan.models.checkpoint_map import Piece, Sources
from capstan.models.decoded_checkpoint import records_of
from capstan.models.weight_manifest import StoredTensor, WeightManifest
from capstan.storage import Checkpoint, DiskSlab, Slab
from capstan.storage.slab import aligned
from capstan.transport import Lane, Ledger, Ticket

# Weights are read and encoded in runs of about this many checkpoint bytes while loading.
LOADING_BYTES = 16 << 20

# Streamed weights cross in pieces of this size, so that rows of the cache can cross between them.
_PIECE_BYTES = 64 << 20


class WeightStore:
    """All weights of a model at their places, and the stream that brings them to the device."""

    def __init__(
        self,
        manifest: WeightManifest,
        tiers: Mapping[str, Tier],
        *,
        ring_slots: int,
        checkpoint: Checkpoint,
        sources: Sources,
        device: torch.device,
        disk: DiskSlab | None,
        ledger: Ledger,
    ) -> None:
        self._manifest, self._tiers = manifest, tiers
        self._checkpoint, self._sources = checkpoint, sources
        self._device, self._disk, self._ledger = device, disk, ledger
        self._disk_offsets: dict[str, int] = {}
        pinned = device.type == "cuda"
        placed = manifest.placeable.values()

        def resting(tier: Tier) -> int:
            return sum(aligned(each.stored_bytes) for each in placed if tiers[each.name] == tier)

        buffers = buffers_for(manifest, tiers, ring_slots=ring_slots)
        rest_bytes = sum(aligned(each.computed_bytes) for each in manifest.rest)
        self._device_slab = Slab(
            "weights on the device",
            resting("device")
            + rest_bytes
            + ring_slots * buffers.device_slot_bytes
            + buffers.num_decoded * buffers.decoded_bytes,
            device=device,
        )
        self._host_slab = Slab(
            "weights on the host",
            resting("host") + buffers.host_bytes,
            device=torch.device("cpu"),
            pinned=pinned,
        )
        self._ring = [self._device_slab.take(buffers.device_slot_bytes) for _ in range(ring_slots)]
        self._staging = [self._host_slab.take(buffers.host_slot_bytes) for _ in range(STAGING_SLOTS)]
        self._decoded = [self._device_slab.take(buffers.decoded_bytes) for _ in range(buffers.num_decoded)]
        self._homes: dict[str, Tensor] = {}
        self._known_seats: dict[tuple[int, int, int], _Seats] = {}
        self._away = [[each for each in unit if tiers[each.name] != "device"] for unit in manifest.units]
        self._expected: deque[int] = deque()
        self._arriving: deque[_Arrival] = deque()
        self._taken: deque[_Arrival] = deque()
        self._num_fetched = self._num_read = self._num_taken = 0
        self._read: deque[Ticket] = deque()  # when the copies out of each staging slot have been made
        self._reader = Lane("weights from disk", device=device, ledger=ledger)
        self._lane = Lane("weights", device=device, ledger=ledger)
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
        for tensor in self._manifest.placeable.values():
            tier = self._tiers[tensor.name]
            if tier != "disk":
                slab = self._device_slab if tier == "device" else self._host_slab
                home = self._homes[tensor.name] = slab.take(tensor.stored_bytes)
                if tier == "host" and tensor.is_as_in_checkpoint:
                    self._read_stored(tensor, home)
                else:
                    for start, payload in self._encoded_runs(tensor):
                        home[start : start + payload.numel()].copy_(payload)
            elif not tensor.is_as_in_checkpoint:
                assert self._disk is not None, "the planner reserves scratch space for encoded weights"
                self._disk_offsets[tensor.name] = offset = self._disk.take(tensor.stored_bytes)
                for start, payload in self._encoded_runs(tensor):
                    self._disk.write(offset + start, payload.cpu())
            done += tensor.spec.num_elements * tensor.dtype.itemsize
            yield done

    def _load_rest(self) -> dict[str, Tensor]:
        rest = {}
        for tensor in self._manifest.rest:
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
        # Memory that is used again is read into several times faster than new memory.
        buffer = Slab("loading", rows_at_once * row_bytes, device=torch.device("cpu")).bytes
        for piece in self._sources[tensor.name]:
            num_rows = prod(self._checkpoint.tensors[piece.source].shape) // width
            first_row = piece.start // width
            for row in range(0, num_rows, rows_at_once):
                count = min(rows_at_once, num_rows - row)
                raw = buffer[: count * row_bytes]
                if tensor.keeps_grid:
                    raw = records_of(self._checkpoint, piece.source, row, count)
                else:
                    self._checkpoint.read(piece.source, raw, start=row * row_bytes)
                if not (tensor.is_as_in_checkpoint or tensor.keeps_grid):
                    values = raw.view(tensor.dtype).view(count, width).to(self._device)
                    raw = tensor.codec.encode(values).payload
                yield (first_row + row) * encoded_row_bytes, raw

    # --- streaming ---------------------------------------------------------------------------------------

    def expect(self, *, sweeps: int) -> None:
        """Units will be taken in order, `sweeps` times more: those that fit the ring start to arrive."""
        num_units, known = len(self._manifest.units), len(self._expected)
        wanted = sweeps * num_units - len(self._arriving)
        for index in range(known, wanted):
            self._expected.append((len(self._arriving) + index) % num_units)
        self._fetch()

    @property
    def must_be_alone(self) -> bool:
        """Whether a unit's decoded tensors take the place of the unit's before it."""
        return len(self._decoded) == 1 and bool(len(self._decoded[0]))

    def has_arrived(self) -> bool:
        """Whether the unit that will be taken next is there already."""
        return not self._arriving or all(ticket.is_done for ticket in self._arriving[0].tickets)

    def arrive(self) -> None:
        """Wait for the unit that will be taken next, without computing anything."""
        for ticket in self._arriving[0].tickets:
            ticket.wait()

    def take(self, unit: int) -> Mapping[str, Tensor]:
        """The unit's tensors on the device, ready to compute with until it is released. The same mapping
        whenever they lie at the same places."""
        self.arrive()
        arrival = self._arriving.popleft()
        assert arrival.unit == unit, "units are taken in the order in which they were expected"
        self._taken.append(arrival)
        self._book(arrival)
        buffer = self._num_taken % len(self._decoded)
        self._num_taken += 1
        seats = self._seats(unit, arrival.slot, buffer)
        for tensor, payload, target in seats.encoded:
            tensor.codec.decode_into(payload, tensor.spec.shape, tensor.dtype, target)
        return seats.values

    def _seats(self, unit: int, slot: int, buffer: int) -> "_Seats":
        """A unit's tensors in a slot of the ring and a decoding buffer; the same at every visit."""
        if (unit, slot, buffer) not in self._known_seats:
            encoded, values, arrived, decoded = [], {}, 0, 0
            for tensor in self._manifest.units[unit]:
                if self._tiers[tensor.name] == "device":
                    payload = self._homes[tensor.name]
                else:
                    payload = self._ring[slot][arrived : arrived + tensor.stored_bytes]
                    arrived += aligned(tensor.stored_bytes)
                if tensor.is_plain:
                    values[tensor.name] = _typed(payload, tensor)
                else:
                    target = self._decoded[buffer][decoded : decoded + tensor.decoded_bytes]
                    decoded += aligned(tensor.decoded_bytes)
                    values[tensor.name] = _typed(target, tensor)
                    encoded.append((tensor, payload, values[tensor.name]))
            self._known_seats[unit, slot, buffer] = _Seats(encoded, values)
        return self._known_seats[unit, slot, buffer]

    def release(self) -> None:
        """The unit that was taken first is no longer computed with: its slot is for the next to come."""
        self._taken.popleft()
        self._fetch()

    def _fetch(self) -> None:
        """Start bringing expected units while there are free slots; those with nothing away need none."""
        while self._expected and len(self._arriving) + len(self._taken) < len(self._ring):
            unit = self._expected.popleft()
            slot = self._num_fetched % len(self._ring)
            self._num_fetched += 1
            self._arriving.append(_Arrival(unit, slot, self._bring(self._away[unit], slot)))

    def _bring(self, tensors: list[StoredTensor], slot: int) -> list[Ticket]:
        """Read what is on disk into a staging slot, then copy everything; two lanes, so that a disk reads
        the next unit while this one crosses."""
        staged: dict[str, Tensor] = {}
        read: list[Ticket] = []
        from_disk = [each for each in tensors if self._tiers[each.name] == "disk"]
        if from_disk:
            buffer, start = self._staging[self._num_read % len(self._staging)], 0
            for tensor in from_disk:
                staged[tensor.name] = buffer[start : start + tensor.stored_bytes]
                start += aligned(tensor.stored_bytes)
            free = [self._read.popleft()] if len(self._read) == len(self._staging) else []
            read = [self._reader.submit(lambda: self._read_all(from_disk, staged, free))]
            self._num_read += 1
        if not tensors:
            return []
        copied = self._lane.submit(lambda: self._copy_all(tensors, staged, slot), after=read)
        if from_disk:
            self._read.append(copied)
        return [copied]

    def _read_all(self, tensors: list[StoredTensor], staged: dict[str, Tensor], free: list[Ticket]) -> None:
        for ticket in free:
            ticket.wait_on_host()
        for tensor in tensors:
            started_s = time.perf_counter()
            self._read_stored(tensor, staged[tensor.name])
            self._ledger.spend(DISK_TO_HOST, time.perf_counter() - started_s)

    def _copy_all(self, tensors: list[StoredTensor], staged: dict[str, Tensor], slot: int) -> None:
        arrived = 0
        with self._lane.stopwatch.time(HOST_TO_DEVICE):
            for tensor in tensors:
                source = staged.get(tensor.name)
                source = self._homes[tensor.name] if source is None else source
                target = self._ring[slot][arrived : arrived + tensor.stored_bytes]
                for start in range(0, tensor.stored_bytes, _PIECE_BYTES):
                    piece = slice(start, start + _PIECE_BYTES)
                    target[piece].copy_(source[piece], non_blocking=True)
                arrived += aligned(tensor.stored_bytes)

    def _book(self, arrival: "_Arrival") -> None:
        """Count a unit's bytes when it is used, which may be a sweep after it began to arrive."""
        for tensor in self._away[arrival.unit]:
            if self._tiers[tensor.name] == "disk":
                self._ledger.count(DISK_TO_HOST, "weights", tensor.stored_bytes)
            self._ledger.count(HOST_TO_DEVICE, "weights", tensor.stored_bytes)

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
        table, tier = self._manifest.table, self._tiers[self._manifest.table.name]
        row_bytes, width = self._manifest.row_bytes, table.spec.shape[1]
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
        table, row_bytes = self._manifest.table, self._manifest.row_bytes
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
        """Book the time of the copies that have been made; raise what went wrong with any."""
        for lane in (self._reader, self._lane):
            lane.check()
            lane.stopwatch.settle(waits=False)

    def forget(self) -> None:
        """No unit will be taken for now: wait for those on their way, and count what they moved."""
        self._expected.clear()
        try:
            with ExitStack() as both:  # also if one raises
                both.callback(self._lane.drain)
                both.callback(self._reader.drain)
            self._lane.stopwatch.settle()
            for arrival in self._arriving:
                self._book(arrival)
        finally:
            for tickets in (self._arriving, self._taken, self._read):
                tickets.clear()

    def close(self) -> None:
        """Give the memory back."""
        self._lane.close()
        self._reader.close()
        self._homes, self.rest, self._known_seats = {}, {}, {}
        self._ring, self._staging, self._decoded = [], [], []
        self._device_slab.close()
        self._host_slab.close()


class _Seats(NamedTuple):
    """A unit's tensors by name, ready to compute with, and how those that are stored in fewer bits get there:
    tensor, its bytes as they are stored, its values."""

    encoded: list[tuple[StoredTensor, Tensor, Tensor]]
    values: dict[str, Tensor]


class _Arrival(NamedTuple):
    """A unit in a slot of the ring, and what says that it is there."""

    unit: int
    slot: int
    tickets: list[Ticket]


def _typed(payload: Tensor, tensor: StoredTensor) -> Tensor:
    return payload.view(tensor.spec.dtype).view(tensor.spec.shape)
