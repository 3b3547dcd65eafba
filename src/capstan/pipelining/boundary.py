"""One end of the boundary between two stages: what a micro-batch's message holds, and what is remembered."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capstan.codecs import Compressor, Delta
from capstan.errors import InputError
from capstan.pipelining.compression import Compression


class Visit(NamedTuple):
    """A sample in a micro-batch, and whether both ends see it for the first time."""

    sample_id: int
    is_first: bool


class BoundaryEnd:
    """The sender or the receiver of one boundary.

    Both are told the same micro-batches in the same order, so both know without a word which samples are
    new. A new sample is sent in full, a known one as the change of what both hold; what the receiver
    computes on is what both then hold, bit for bit the same.

        first visit   m <- a                           4 bytes a value
        later         m <- m + Q(a - m)                the codec's bytes of one sample
        gradients     Q(g)                             the codec's bytes of the micro-batch

    Args:
        compression: in how many bits.
        salt: tells boundaries with stochastic rounding apart.

    Source: AC-SGD, arXiv 2206.01299, section 3.
    Differs: a visit is counted for each sample. The original counts epochs, so that a sample that its first
    epoch left out is later compressed against zeros.
    """

    def __init__(self, compression: Compression, *, salt: int) -> None:
        self.compression = compression
        self._changes = (
            Delta(compression.forward, salt=salt)
            if compression.forward is not None and compression.changes
            else None
        )
        self._direct = (
            Compressor(compression.forward, salt=salt)
            if compression.forward is not None and not compression.changes
            else None
        )
        self._gradients = (
            Compressor(compression.backward, salt=salt) if compression.backward is not None else None
        )
        self._seen: set[int] = set()

    # --- activations -------------------------------------------------------------------------------------

    def plan(self, sample_ids: Sequence[int]) -> list[Visit]:
        """The visits of the next micro-batch, in order; to be called once for each, on both ends."""
        visits = []
        for sample_id in sample_ids:
            visits.append(Visit(sample_id, sample_id not in self._seen))
            if self._changes is not None:
                self._seen.add(sample_id)
        return visits

    def message_bytes(self, visits: Sequence[Visit], values: Tensor) -> int:
        """The size of the message that carries activations like `values`, one row a visit."""
        if self._changes is not None:
            return sum(self._row_bytes(visit, values[0]) for visit in visits)
        return self._direct.size(values) if self._direct is not None else values.nbytes

    @torch.no_grad()
    def encode(self, visits: Sequence[Visit], values: Tensor) -> Tensor:
        """The message that carries `values`; what is held changes with it."""
        message = values.new_empty(self.message_bytes(visits, values), dtype=torch.uint8)
        if self._changes is None:
            assert self._direct is not None
            self._direct.encode(values, message, key="activations")
            return message
        start = 0
        for visit, row in zip(visits, values, strict=True):
            key, end = str(visit.sample_id), start + self._row_bytes(visit, row)
            if visit.is_first:
                message[start:end].copy_(row.contiguous().flatten().view(torch.uint8))
                self._changes.start(key, row)
            else:
                self._changes.encode(row, message[start:end], key=key)
            start = end
        return message

    @torch.no_grad()
    def decode(self, visits: Sequence[Visit], message: Tensor, out: Tensor) -> None:
        """Fill `out` with what both ends hold after the message."""
        if self._changes is None:
            assert self._direct is not None
            self._direct.decode(message, out)
            return
        start = 0
        for visit, row in zip(visits, out, strict=True):
            key, end = str(visit.sample_id), start + self._row_bytes(visit, row)
            part = message[start:end]
            if visit.is_first:
                # Cloned, because a part of a message may begin anywhere and float32 may not.
                row.copy_(part.clone().view(row.dtype).view(row.shape))
                self._changes.start(key, row)
            else:
                row.copy_(self._changes.decode(part, key=key))
            start = end

    def _row_bytes(self, visit: Visit, row: Tensor) -> int:
        assert self._changes is not None
        return row.nbytes if visit.is_first else self._changes.size(row)

    # --- gradients ---------------------------------------------------------------------------------------

    def gradient_bytes(self, gradients: Tensor) -> int:
        """The size of the message that carries gradients like these."""
        return self._gradients.size(gradients) if self._gradients is not None else gradients.nbytes

    def encode_gradients(self, gradients: Tensor) -> Tensor:
        """The message that carries gradients."""
        assert self._gradients is not None
        message = gradients.new_empty(self.gradient_bytes(gradients), dtype=torch.uint8)
        self._gradients.encode(gradients, message, key="gradients")
        return message

    def decode_gradients(self, message: Tensor, out: Tensor) -> None:
        """Fill `out` with the gradients of a message."""
        assert self._gradients is not None
        self._gradients.decode(message, out)

    # --- what is remembered ------------------------------------------------------------------------------

    @property
    def num_held(self) -> int:
        """Samples that both ends hold."""
        return len(self._seen)

    def held(self, sample_id: int) -> Tensor:
        """What both ends hold of a sample's activations.

        Raises:
            InputError: the sample has not crossed this boundary.
        """
        if self._changes is None or sample_id not in self._seen:
            raise InputError(f"Sample {sample_id} has not crossed this boundary, so nothing is held of it.")
        return self._changes.held(str(sample_id))

    def digest(self) -> int:
        """A checksum of all that is held: equal on both ends, or something is broken."""
        found = 0
        for sample_id in sorted(self._seen):
            found = zlib.crc32(str(sample_id).encode(), found)
            found = zlib.crc32(self.held(sample_id).cpu().numpy().tobytes(), found)
        return found

    def forget(self) -> None:
        """Hold nothing: the next visit of each sample is its first. Both ends must do so together."""
        for sample_id in self._seen:
            if self._changes is not None:
                self._changes.forget(str(sample_id))
        self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that this end needs in order to go on: copies."""
        encoders = {"changes": self._changes, "direct": self._direct, "gradients": self._gradients}
        states = {name: each.state_dict() for name, each in encoders.items() if each is not None}
        return {"seen": sorted(self._seen), **states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same compression."""
        self._seen = set(state["seen"])
        encoders = {"changes": self._changes, "direct": self._direct, "gradients": self._gradients}
        for name, encoder in encoders.items():
            if (encoder is None) != (name not in state):
                raise InputError(
                    f"What was saved has {'no ' if name not in state else ''}{name!r}, and this compression "
                    "is another. Go on with the same bits, or begin anew."
                )
            if encoder is not None:
                encoder.load_state_dict(state[name])
