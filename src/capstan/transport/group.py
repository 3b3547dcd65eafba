"""A group of ranks: processes, on one machine or many, that work on one job together.

Small values pass as JSON, tensors as they are: through gloo from host memory, through NCCL from a GPU.
Every wait is bounded, and its error names the rank that did not answer.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from capstan.errors import DeviceError, TimeoutExpired
from capstan.transport.liveness import GRACE_S, Liveness, Loss

PATIENCE_S = 600.0
_WORDS, _TENSORS = 1, 2  # tags: values and tensors do not meet each other on their way
_FIRST_NUMBER = 16  # tags from here on number exchanges
_POLL_S = 5e-5
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Parcel(NamedTuple):
    """A tensor and the rank that it goes to or comes from."""

    peer: int
    tensor: Tensor


class Transfer:
    """A tensor on its way to or from another rank; it must be left alone until `wait` has returned."""

    def __init__(self, group: "Group", work: Any, peer: int, tensor: Tensor, about: str = "") -> None:
        self._group, self._work, self._peer, self._tensor = group, work, peer, tensor
        self._about, self._start_s = about, time.monotonic()

    def wait(self) -> None:
        """Block until the tensor has been taken over, or is there.

        Raises:
            DeviceError: the other rank is gone.
            TimeoutExpired: it did not answer within the group's patience.
        """
        try:
            with self._group.liveness.waiting_for(self._peer):
                if self._tensor.is_cuda:
                    self._wait_for_device()
                else:
                    self._work.wait(timedelta(seconds=self._group.patience_s))
        except RuntimeError as error:
            # Every wait ends with patience at the latest; one that ends before has lost its connection.
            has_expired = time.monotonic() - self._start_s >= self._group.patience_s
            raise self._group.loss_of(self._peer, self._about, has_expired=has_expired) from error

    def _wait_for_device(self) -> None:
        """NCCL's own waits hold the device, not the host, and end the process when they expire."""
        until_s = time.monotonic() + self._group.patience_s
        while not self._work.is_completed():
            if time.monotonic() > until_s:
                raise RuntimeError("Timed out")
            time.sleep(_POLL_S)
        self._work.wait()


class Group:
    """This process among others: it is number `rank` of `size`.

    Args:
        process_group: torch's group whose members these are; None for torch's default group.
        device_type: "cuda" if tensors of GPUs will pass.
        patience_s: how long one wait for another rank may take.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        device_type: str = "cpu",
        patience_s: float = PATIENCE_S,
    ) -> None:
        members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        self.rank, self.size = members.index(dist.get_rank()), len(members)
        self.patience_s = patience_s

        # Groups of our own: what else the program sends through its group never meets what passes here.
        def own(backend: str) -> Any:
            patience = timedelta(seconds=patience_s)
            return dist.new_group(members, backend=backend, timeout=patience, use_local_synchronization=True)

        self._host = own("gloo")
        self._given_up: set[int] = set()  # ranks for which a wait has expired
        self.liveness = Liveness(self._host.get_group_store(), self.rank)
        self._device = own("nccl") if device_type == "cuda" else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def longest_wait_s(self) -> float:
        """Within this time one wait has ended, or its loss is known and named."""
        return 2 * (self.patience_s + GRACE_S)

    @property
    def others(self) -> list[int]:
        """The other ranks."""
        return [rank for rank in range(self.size) if rank != self.rank]

    # --- tensors -----------------------------------------------------------------------------------------

    @property
    def wire_device_type(self) -> str:
        """Where tensors must lie to pass: "cuda" through NCCL, "cpu" through gloo."""
        return "cpu" if self._device is None else "cuda"

    def send(self, tensor: Tensor, target: int) -> Transfer:
        """Start to send a tensor, which the other rank must `receive`; returns at once."""
        return self._start(dist.isend, tensor, "group_dst", target, _TENSORS)

    def receive(self, tensor: Tensor, source: int) -> Transfer:
        """Start to receive a tensor of known shape and dtype into `tensor`; returns at once."""
        return self._start(dist.irecv, tensor, "group_src", source, _TENSORS)

    def exchange(
        self, sends: Sequence[Parcel], receives: Sequence[Parcel], *, number: int, about: str
    ) -> list[Transfer]:
        """Start to receive and to send many tensors, all beside each other; returns at once.

        `number`, from 0 to 2**30 - 1, tells exchanges apart that are under way together: both ends use
        the same. NCCL knows no such numbers: there exchanges must be started in the same order
        everywhere. `about` says in errors what it was for.
        """
        if self._device is None:
            tag = _FIRST_NUMBER + number
            started = [
                self._start(dist.irecv, each.tensor, "group_src", each.peer, tag, about) for each in receives
            ]
            return started + [
                self._start(dist.isend, each.tensor, "group_dst", each.peer, tag, about) for each in sends
            ]
        parcels = [*((dist.irecv, each) for each in receives), *((dist.isend, each) for each in sends)]
        if not parcels:
            return []
        operations = [
            dist.P2POp(way, each.tensor, group=self._device, group_peer=each.peer) for way, each in parcels
        ]
        works = dist.batch_isend_irecv(operations)
        # NCCL gives one work for the whole batch.
        ends = [each for _, each in parcels][-len(works) :]
        return [
            Transfer(self, work, each.peer, each.tensor, about)
            for work, each in zip(works, ends, strict=True)
        ]

    def sum(self, tensor: Tensor, *, about: str) -> Transfer:
        """Start PyTorch's own all-reduce of a tensor, in place; all must call it, in the same order."""
        group = self._device if tensor.is_cuda else self._host
        before = (self.rank - 1) % self.size
        try:
            work = dist.all_reduce(tensor, group=group, async_op=True)
            return Transfer(self, work, before, tensor, about)
        except RuntimeError as error:
            raise self.loss_of(before, about) from error

    def _start(
        self, start: Callable[..., Any], tensor: Tensor, end: str, peer: int, tag: int, about: str = ""
    ) -> Transfer:
        group = self._device if tensor.is_cuda else self._host
        try:
            return Transfer(self, start(tensor, group=group, tag=tag, **{end: peer}), peer, tensor, about)
        except RuntimeError as error:
            raise self.loss_of(peer, about) from error

    # --- values ------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave, in their order, on every rank, if JSON can hold it. All must call it."""
        if not self.is_first:
            self._tell(value, 0)
            return list(self._hear(0))
        values = [value, *(self._hear(rank) for rank in self.others)]
        return list(self.share(values))

    def share(self, value: Any) -> Any:
        """What rank 0 gave, on every rank. All must call it; only rank 0's value matters."""
        if not self.is_first:
            return self._hear(0)
        for rank in self.others:
            self._tell(value, rank)
        return value

    def _tell(self, value: Any, target: int) -> None:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        for part in (torch.tensor([data.numel()]), data):
            self._start(dist.isend, part, "group_dst", target, _WORDS).wait()

    def _hear(self, source: int) -> Any:
        size = torch.zeros(1, dtype=torch.long)
        self._start(dist.irecv, size, "group_src", source, _WORDS).wait()
        data = torch.empty(int(size), dtype=torch.uint8)
        self._start(dist.irecv, data, "group_src", source, _WORDS).wait()
        return json.loads(bytes(data.numpy()))

    # --- losses ------------------------------------------------------------------------------------------

    def loss_of(
        self, peer: int, about: str = "", *, has_expired: bool = False
    ) -> DeviceError | TimeoutExpired:
        """What to raise when a connection to `peer`, `about` something, was closed, or a wait for it has
        expired: names the ranks that are gone or silent, and only those.

        After a loss the group is of no further use: a receive that was given up closes its connection.
        """
        loss = self._loss(peer, has_expired=has_expired)
        about = f" ({about})" if about else ""
        names = _names(loss.ranks)
        if loss.kind == "silent":
            return TimeoutExpired(
                f"{names} of {self.size} did not answer rank {loss.reporter} within {self.patience_s:.0f} s"
                f"{about}. See what was printed there last, and start all ranks again."
            )
        verb = "is" if len(loss.ranks) == 1 else "are"
        return DeviceError(
            f"{names} {verb} gone, of {self.size}: the connection to rank {loss.reporter} was closed{about}. "
            "See what was printed there last, and start all ranks again."
        )

    def _loss(self, peer: int, *, has_expired: bool) -> Loss:
        """Who is to blame, which is not always the rank that was waited for."""
        if has_expired:
            self._given_up.add(peer)
        own = Loss("silent" if has_expired else "gone", [peer], self.rank)
        try:
            stopped = self.liveness.stopped(self.others)
            if peer in self._given_up:
                # Gloo closes a connection when one wait for it expires, under all others that wait for it.
                own = own._replace(kind="silent")
                return self.liveness.agree(own._replace(ranks=stopped or [self.liveness.end_of_chain(peer)]))
            if peer in stopped:
                return self.liveness.agree(own._replace(ranks=stopped))
            # The one that closed its connection is alive: it has itself found a loss, and will say so.
            return self.liveness.awaited() or self.liveness.agree(own._replace(ranks=stopped or [peer]))
        except RuntimeError:
            # Without torchrun the store is rank 0's, and gone with it.
            is_hosted_by_first = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            return own._replace(kind="gone", ranks=[0]) if is_hosted_by_first and not self.is_first else own


def _names(ranks: list[int]) -> str:
    return f"Rank {ranks[0]}" if len(ranks) == 1 else f"Ranks {', '.join(map(str, ranks))}"


def join(device_type: str, *, patience_s: float = PATIENCE_S) -> Group | None:
    """The group that this process was started in: torch's default group, or else the one that torchrun names
    in the environment; None for a process that is alone."""
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        if not all(os.environ.get(name) for name in _ENVIRONMENT) or os.environ["WORLD_SIZE"] == "1":
            return None
        if device_type == "cuda":
            _take_own_device()
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=patience_s))
    return _default_group(device_type, patience_s) if dist.get_world_size() > 1 else None


def _take_own_device() -> None:
    """Of this machine's GPUs, the one for this rank."""
    own, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if own >= count:
        raise DeviceError(f"Rank {own} of this machine has no GPU of its own: there are {count}.")
    torch.cuda.set_device(own)


@cache
def _default_group(device_type: str, patience_s: float) -> Group:
    return Group(device_type=device_type, patience_s=patience_s)
