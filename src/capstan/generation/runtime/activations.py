"""Hidden states between two layers, batch by batch: on the device, on the host or on disk.

During a sweep, batch k's hidden states are one run `[tokens of k, hidden]`. On the device all runs lie in
one slab. Elsewhere they rest in a slab or scratch file and pass through two buffers on the device.
"""

import torch
from torch import Tensor

from capstan.generation.planning.activation_buffers import activation_buffers
from capstan.generation.planning.placement import Tier
from capstan.generation.planning.resources import DEVICE_TO_HOST, DISK_TO_HOST, HOST_TO_DEVICE, HOST_TO_DISK
from capstan.storage import DiskSlab, Slab
from capstan.transport import Lane, Ticket


class Activations:
    """The hidden states of one sweep at a time."""

    def __init__(
        self,
        tier: Tier,
        *,
        width: int,
        dtype: torch.dtype,
        sweep_tokens: int,
        batch_tokens: int,
        device: torch.device,
        disk: DiskSlab | None,
        lane_in: Lane,
        lane_out: Lane,
    ) -> None:
        self._tier, self._width, self._dtype = tier, width, dtype
        self._lane_in, self._lane_out, self._disk = lane_in, lane_out, disk
        self._token_bytes = width * dtype.itemsize
        self._batch_bytes = batch_tokens * self._token_bytes
        sizes = activation_buffers(
            tier, sweep_bytes=sweep_tokens * self._token_bytes, batch_bytes=self._batch_bytes
        )
        self._device_slab = Slab("activations on the device", sizes.device_bytes, device=device)
        self._host_slab = Slab(
            "activations on the host",
            sizes.host_bytes,
            device=torch.device("cpu"),
            pinned=device.type == "cuda",
        )
        self._disk_start = disk.take(sizes.disk_bytes) if disk is not None and tier == "disk" else 0
        self._runs: dict[int, tuple[int, int]] = {}
        self._stored: dict[int, Ticket] = {}
        self._arriving: dict[int, tuple[Ticket, int]] = {}
        self._visits = 0
        self._seats: dict[int, int] = {}
        self._sent: list[Ticket | None] = [None, None]  # when each device buffer's last guest has left

    @property
    def rests_on_device(self) -> bool:
        return self._tier == "device"

    @property
    def device_bytes(self) -> int:
        return self._device_slab.size_bytes

    @property
    def host_bytes(self) -> int:
        return self._host_slab.size_bytes

    def begin(self, tokens: dict[int, int]) -> None:
        """Start a sweep in which batch k has `tokens[k]` tokens."""
        self._lane_out.drain()
        self._stored, self._arriving, start = {}, {}, 0
        for batch, count in tokens.items():
            self._runs[batch] = (start * self._token_bytes, count * self._token_bytes)
            start += count

    def blank(self, batch: int) -> Tensor:
        """Device memory for a batch's first hidden states, `[tokens, hidden]`; `put` it when filled."""
        start, size = self._runs[batch]
        if self._tier == "device":
            return self._view(self._device_slab.bytes[start : start + size])
        slot = self._next_slot()
        self._arriving[batch] = (self._lane_in.submit(_nothing, after=_tickets(self._sent[slot])), slot)
        return self.take(batch)

    def prefetch(self, batch: int) -> None:
        """Start bringing a batch's hidden states to the device.

        Batches must be prefetched in the order in which they are taken: the buffer they go to is the one
        that the batch before last has left.
        """
        if self._tier == "device" or batch in self._arriving:
            return
        slot = self._next_slot()
        before = _tickets(self._stored.get(batch), self._sent[slot])
        ticket = self._lane_in.submit(lambda: self._bring(batch, slot), after=before)
        self._arriving[batch] = (ticket, slot)

    def take(self, batch: int) -> Tensor:
        """A batch's hidden states on the device, `[tokens, hidden]`; change them in place, then `put`."""
        start, size = self._runs[batch]
        if self._tier == "device":
            return self._view(self._device_slab.bytes[start : start + size])
        self.prefetch(batch)
        ticket, slot = self._arriving.pop(batch)
        ticket.wait()
        self._seats[batch] = slot
        return self._view(self._slot(slot, size))

    def put(self, batch: int, hidden: Tensor) -> None:
        """Send a batch's changed hidden states back to where they rest."""
        if self._tier != "device":
            ticket = self._lane_out.submit(lambda: self._send(batch, hidden))
            self._stored[batch] = self._sent[self._seats[batch]] = ticket

    def _next_slot(self) -> int:
        self._visits += 1
        return self._visits % 2

    def _slot(self, slot: int, size: int) -> Tensor:
        return self._device_slab.bytes[slot * self._batch_bytes :][:size]

    def _staging(self, slot: int, size: int) -> Tensor:
        return self._host_slab.bytes[slot * self._batch_bytes :][:size]

    def _view(self, run: Tensor) -> Tensor:
        return run.view(self._dtype).view(-1, self._width)

    def _bring(self, batch: int, slot: int) -> None:
        start, size = self._runs[batch]
        if self._tier == "host":
            source = self._host_slab.bytes[start : start + size]
        else:
            assert self._disk is not None
            source = self._staging(0, size)
            with self._lane_in.booking(DISK_TO_HOST, "activations", size):
                self._disk.read(self._disk_start + start, source)
        self._lane_in.copy(self._slot(slot, size), source, link=HOST_TO_DEVICE, content="activations")
        self._lane_in.synchronize()

    def _send(self, batch: int, hidden: Tensor) -> None:
        start, size = self._runs[batch]
        run = hidden.view(-1).view(torch.uint8)
        if self._tier == "host":
            target = self._host_slab.bytes[start : start + size]
            self._lane_out.copy(target, run, link=DEVICE_TO_HOST, content="activations")
            return
        assert self._disk is not None
        staging = self._staging(1, size)
        self._lane_out.copy(staging, run, link=DEVICE_TO_HOST, content="activations")
        self._lane_out.synchronize()
        with self._lane_out.booking(HOST_TO_DISK, "activations", size):
            self._disk.write(self._disk_start + start, staging)

    def close(self) -> None:
        """Give the memory back; the lanes must be idle."""
        self._device_slab.close()
        self._host_slab.close()


def _tickets(*tickets: Ticket | None) -> list[Ticket]:
    return [ticket for ticket in tickets if ticket is not None]


def _nothing() -> None:
    """Takes a turn in the lane, so that the buffer is free when it is over."""
