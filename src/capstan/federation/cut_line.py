"""The two ends of a device's line across the cut, and the messages that go through it."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capstan.errors import InputError
from capstan.federation.index_codes import Positions
from capstan.federation.packets import DENSE, SUPPORT, CutPacket, read_packet, write_packet
from capstan.federation.sparsifiers import ErrorFeedback, Floats, RandomTopK, TopK
from capstan.federation.value_codes import label_type, read_values, write_values
from capstan.federation.wire import Wire


class CutSender:
    """The end that sends tensors (samples, width) and gets their gradients."""

    def __init__(self, wire: Wire, device: int, seed: int) -> None:
        self._wire, self._device, self._seed = wire, device, seed
        self._shape = (0, 0)
        self._support: Positions | None = None

    def send(self, values: Tensor, step: int) -> bytes:
        """The message of what is kept of `values`."""
        array = values.detach().cpu().numpy()
        rng = np.random.default_rng([self._seed, 5, self._device, step])
        self._support = None if self._wire.sparsifier is None else self._wire.sparsifier.choose(array, rng)
        self._shape = array.shape
        return _write(self._wire, self._wire.forward_index(), array, self._support, self._device, step)

    def gradient(self, message: bytes, step: int) -> Tensor:
        """The gradient (samples, width) of what was sent: mask * dL/dy where the downlink is the support.

        Raises:
            InputError: the message does not answer what was sent.
        """
        index = self._wire.backward_index()
        kept = None if self._support is None else len(self._support)
        packet = _read(message, self._device, step, *self._shape, index, self._wire.value_type, kept)
        return torch.from_numpy(_spread(packet, self._support))


class CutReceiver:
    """The other end: gets tensors y = mask * a, and sends their gradients."""

    def __init__(self, wire: Wire, device: int) -> None:
        self._wire, self._device = wire, device
        self._feedback = ErrorFeedback()
        self._support: Positions | None = None

    @property
    def rests(self) -> dict[object, Floats]:
        """What of gradients was not sent yet, where error is fed back."""
        return self._feedback.rests

    def receive(self, message: bytes, step: int, *, rows: int, width: int) -> Tensor:
        """The tensor (rows, width) of a message, float32.

        Raises:
            InputError: it is not of this device, step, shape and wire.
        """
        index, value_type = self._wire.forward_index(), self._wire.value_type
        packet = _read(message, self._device, step, rows, width, index, value_type)
        self._support = packet.positions
        return torch.from_numpy(_spread(packet, packet.positions))

    def answer(self, gradient: Tensor, step: int) -> bytes:
        """The message of the gradient of what was received last."""
        array, index = gradient.detach().cpu().numpy(), self._wire.backward_index()
        positions = self._support
        if index == DENSE:
            positions = None
        elif index != SUPPORT and self._wire.sparsifier is not None:
            if self._wire.has_error_feedback:
                array = self._feedback.add_rest("gradient", array)
            positions = self._wire.sparsifier.choose(array, np.random.default_rng(0))
        message = _write(self._wire, index, array, positions, self._device, step)
        if self._wire.has_error_feedback:
            kept = None if positions is None else len(positions)
            packet = read_packet(message, width=array.shape[1], max_rows=len(array), kept=kept)
            self._feedback.keep_rest("gradient", array, _spread(packet, positions))
        return message


def write_labels(labels: Tensor, num_classes: int, device: int, step: int) -> bytes:
    """A batch's labels as a message."""
    return _write_dense(labels.cpu().numpy()[:, None], label_type(num_classes), device, step)


def read_labels(message: bytes, num_classes: int, device: int, step: int, *, rows: int) -> Tensor:
    """The inverse: (rows,) int64, each below `num_classes`."""
    packet = _read(message, device, step, rows, 1, DENSE, label_type(num_classes))
    if rows and packet.values.max() >= num_classes:
        raise InputError(f"Labels are from 0 to {num_classes - 1}, found {packet.values.max()}.")
    return torch.from_numpy(packet.values)


def write_weights(weights: Tensor, device: int, step: int) -> bytes:
    """Flat weights as a message, float32."""
    return _write_dense(weights.cpu().numpy()[None], "float32", device, step)


def read_weights(message: bytes, size: int, device: int, step: int) -> Tensor:
    """The inverse: (size,) float32."""
    return torch.from_numpy(_read(message, device, step, 1, size, DENSE, "float32").values)


def masked(wire: Wire, values: Tensor) -> Tensor:
    """What a trained network sees of `values` (samples, width): largest ones kept, rounded as on the wire."""
    sparsifier = wire.sparsifier
    if isinstance(sparsifier, RandomTopK):
        sparsifier = TopK(keep=sparsifier.keep)
    array = values.detach().cpu().numpy().reshape(-1)
    if sparsifier is not None:
        chosen = sparsifier.choose(array.reshape(values.shape), np.random.default_rng(0))
        kept = np.zeros_like(array)
        kept[chosen] = array[chosen]
        array = kept
    rounded = read_values(wire.value_type, *write_values(wire.value_type, array))
    return torch.from_numpy(rounded.reshape(values.shape)).to(values)


def _write(
    wire: Wire, index: str, array: Floats, positions: Positions | None, device: int, step: int
) -> bytes:
    rows, width = array.shape
    space = wire.space(rows, width)
    flat = array.reshape(-1)
    return write_packet(
        CutPacket(
            device=device,
            step=step,
            rows=rows,
            width=width,
            index=index,
            value_type=wire.value_type,
            values=flat if positions is None else flat[positions],
            positions=None if index == SUPPORT else positions,
            is_even=index not in (DENSE, SUPPORT) and space is not None and space.is_even,
        )
    )[0]


def _write_dense(array: NDArray[np.generic], value_type: str, device: int, step: int) -> bytes:
    rows, width = array.shape
    return write_packet(
        CutPacket(
            device=device,
            step=step,
            rows=rows,
            width=width,
            index=DENSE,
            value_type=value_type,
            values=array.reshape(-1),
        )
    )[0]


def _read(
    message: bytes,
    device: int,
    step: int,
    rows: int,
    width: int,
    index: str,
    value_type: str,
    kept: int | None = None,
) -> CutPacket:
    packet = read_packet(message, width=width, max_rows=rows, kept=kept)
    wanted = (device, step, rows, index, value_type)
    found = (packet.device, packet.step, packet.rows, packet.index, packet.value_type)
    if found != wanted:
        names = ("device", "step", "samples", "index", "values")
        told = [f"{name} {a}, found {b}" for name, a, b in zip(names, wanted, found, strict=True) if a != b]
        raise InputError(f"Wanted a packet of {'; '.join(told)}: it was sent for something else, or twice.")
    return packet


def _spread(packet: CutPacket, support: Positions | None) -> Floats:
    """A packet's (rows, width) elements, those that were not sent being 0."""
    where = support if packet.index == SUPPORT else packet.positions
    if where is None:
        return packet.values.reshape(packet.rows, packet.width)
    spread = np.zeros(packet.rows * packet.width, np.float32)
    spread[where] = packet.values
    return spread.reshape(packet.rows, packet.width)
