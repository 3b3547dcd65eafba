"""What one operation says to the other ranks, exchange by exchange.

An operation is a generator: it fills a `Round` with what it sends, says what it expects, and yields it;
it goes on when all of it has arrived. Meanwhile the communication thread runs other operations, so that
the latency of one is hidden behind the bytes of the next.
"""

from collections.abc import Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from capstan.errors import UsageError
from capstan.plans import rank_link
from capstan.transport.group import Group, Parcel, Transfer
from capstan.transport.ledger import Ledger
from capstan.transport.message import HEADER_BYTES, Header, check_header, write_header
from capstan.transport.shaping import ShapedLink

MAX_STEPS = 64
"""Exchanges in one operation."""

_SEQUENCES = 2**24  # exchange numbers repeat after so many operations


class Exchange(Protocol):
    """Something with other ranks that takes time."""

    def start(self) -> None:
        """Begin it; returns at once."""

    def finish(self) -> None:
        """Block until it is done; bounded, and errors name peer and bucket."""


Operation = Generator[Exchange, None, None]


class Conversation:
    """One operation's way to the others.

    Args:
        group: the ranks.
        sequence: the operation's number, the same on every rank.
        about: what it is for, such as "bucket 3".
    """

    def __init__(
        self, group: Group, ledger: Ledger, link: ShapedLink | None, sequence: int, about: str
    ) -> None:
        self.group, self.ledger, self.link = group, ledger, link
        self.sequence, self.about = sequence, about
        self.rank, self.size = group.rank, group.size
        # Bits in the header of everything that is sent from now on; those of all that was received are added,
        # so what passes on what it has heard passes on its flags.
        self.flags = 0
        self._steps = 0

    @property
    def device(self) -> torch.device:
        """Where messages lie."""
        return torch.device(self.group.wire_device_type)

    def round(self, phase: str) -> "Round":
        """A new exchange of messages; `phase` names it in ledger and errors."""
        return Round(self, phase, self._next_step())

    def ring(self, tensor: Tensor) -> "Ring":
        """PyTorch's own all-reduce of a tensor, in place, as the only exchange of this operation."""
        if self._next_step():
            raise UsageError(
                "PyTorch's all-reduce must be an operation's only exchange: ranks could differ in order."
            )
        if self.link is not None:
            raise UsageError("PyTorch's all-reduce does not pass a shaped link. Use the direct route.")
        return Ring(self, tensor)

    def _next_step(self) -> int:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise UsageError(f"An operation has at most {MAX_STEPS} exchanges.")
        return self._steps - 1

    def number(self, step: int) -> int:
        """What tells an exchange apart from all others that can be under way."""
        return (self.sequence % _SEQUENCES) * MAX_STEPS + step

    def count(self, source: int, target: int, phase: str, payload_bytes: int) -> None:
        """Book a message."""
        link = rank_link(source, target)
        self.ledger.count(link, phase, payload_bytes)
        self.ledger.count(link, "headers", HEADER_BYTES)


class Round:
    """Messages to some ranks and from some ranks, all beside each other."""

    def __init__(self, talk: Conversation, phase: str, step: int) -> None:
        self._talk, self._phase, self._step = talk, phase, step
        self._sends: list[Parcel] = []
        self._receives: list[Parcel] = []
        self._transfers: list[Transfer] = []
        self._is_listening = False

    def to(self, peers: int | Sequence[int], size_bytes: int) -> Tensor:
        """Memory for a payload that goes to one peer or, the same to each, to several; fill it, then
        yield.
        """
        message = self._message(size_bytes)
        self._sends += [Parcel(peer, message) for peer in ([peers] if isinstance(peers, int) else peers)]
        return message[HEADER_BYTES:]

    def take(self, peer: int, size_bytes: int) -> Tensor:
        """Memory where a peer's payload will be, after the yield."""
        message = self._message(size_bytes)
        self._receives.append(Parcel(peer, message))
        return message[HEADER_BYTES:]

    def listen(self) -> None:
        """Receive from now on, before the round itself starts.

        Gloo sends nothing before it knows that somebody receives; told early, that costs no latency later.
        """
        if self._talk.group.wire_device_type == "cpu":
            self._transfers = self._exchange([], self._receives)
            self._is_listening = True

    def start(self) -> None:
        """Send and receive."""
        talk, headers = self._talk, {}
        for peer, message in self._sends:
            size = message.numel() - HEADER_BYTES
            talk.count(talk.rank, peer, self._phase, size)
            due_ns = talk.link.due_ns(message.numel()) if talk.link else 0
            headers[id(message)] = (
                message,
                Header(talk.rank, talk.sequence, self._step, size, due_ns, talk.flags),
            )
        for message, header in headers.values():
            write_header(message, header)
        self._transfers += self._exchange(self._sends, [] if self._is_listening else self._receives)

    def finish(self) -> None:
        """Wait for all of it, bounded by the group's patience, and check what came."""
        for transfer in self._transfers:
            transfer.wait()
        talk = self._talk
        for peer, message in self._receives:
            size = message.numel() - HEADER_BYTES
            wanted = Header(peer, talk.sequence, self._step, size)
            found = check_header(message, wanted, about=self._about)
            talk.flags |= found.flags
            talk.count(peer, talk.rank, self._phase, size)
            if talk.link:
                talk.link.await_arrival(found.due_ns, message.numel())

    def _exchange(self, sends: list[Parcel], receives: list[Parcel]) -> list[Transfer]:
        number = self._talk.number(self._step)
        return self._talk.group.exchange(sends, receives, number=number, about=self._about)

    @property
    def _about(self) -> str:
        return f"{self._talk.about}, {self._phase}"

    def _message(self, size_bytes: int) -> Tensor:
        return torch.empty(HEADER_BYTES + size_bytes, dtype=torch.uint8, device=self._talk.device)


class Ring:
    """PyTorch's all-reduce. Its bytes are booked by the formula of a ring: nobody can count them here."""

    def __init__(self, talk: Conversation, tensor: Tensor) -> None:
        self._talk, self._tensor = talk, tensor
        self._transfer: Transfer | None = None

    def start(self) -> None:
        """Begin to sum."""
        talk = self._talk
        size = 2 * (talk.size - 1) * self._tensor.nbytes // talk.size
        talk.ledger.count(rank_link(talk.rank, (talk.rank + 1) % talk.size), "ring", size)
        self._transfer = talk.group.sum(self._tensor, about=f"{talk.about}, ring")

    def finish(self) -> None:
        """Wait for the sum."""
        assert self._transfer is not None
        self._transfer.wait()
