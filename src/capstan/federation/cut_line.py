"""One device's way across the cut, in process: tensors become messages, are counted, and are read again."""

import numpy as np
import torch
from torch import Tensor

from capstan.federation.index_codes import Positions
from capstan.federation.packets import DENSE, SUPPORT, CutPacket, Sizes, read_packet, write_packet
from capstan.federation.sparsifiers import ErrorFeedback, Floats, RandomTopK, TopK
from capstan.federation.value_codes import label_type, read_values, write_values
from capstan.federation.wire import Wire
from capstan.transport.ledger import Ledger


class CutLine:
    """What of (samples, width) tensors gets across in one direction, and what of their gradients comes back.

    `forward` gives y = mask * a as the receiver has it, `backward` the gradient that the sender goes on with:
    mask * dL/dy where the downlink is the support, which is that of the masked network.
    """

    def __init__(self, wire: Wire, ledger: Ledger, links: tuple[str, str], device: int, seed: int) -> None:
        self._wire, self._ledger, self._device, self._seed = wire, ledger, device, seed
        self._forth, self._back = links
        self._feedback = ErrorFeedback()
        self._support: Positions | None = None

    @property
    def rests(self) -> dict[object, Floats]:
        """What of gradients was not sent yet, where error is fed back."""
        return self._feedback.rests

    def forward(self, values: Tensor, step: int) -> Tensor:
        """`values` (samples, width) as the receiver gets them."""
        array = values.detach().cpu().numpy()
        rng = np.random.default_rng([self._seed, 5, self._device, step])
        self._support = None if self._wire.sparsifier is None else self._wire.sparsifier.choose(array, rng)
        received, _ = self._cross(self._forth, self._wire.forward_index(), array, self._support, step)
        return torch.from_numpy(received).to(values)

    def backward(self, gradient: Tensor, step: int) -> Tensor:
        """The gradient of what `forward` gave, as the sender of that gets it."""
        array, index = gradient.detach().cpu().numpy(), self._wire.backward_index()
        positions = self._support
        if index == DENSE:
            positions = None
        elif index != SUPPORT and self._wire.sparsifier is not None:
            if self._wire.has_error_feedback:
                array = self._feedback.add_rest(self._back, array)
            positions = self._wire.sparsifier.choose(array, np.random.default_rng(0))
        received, _ = self._cross(self._back, index, array, positions, step)
        if self._wire.has_error_feedback:
            self._feedback.keep_rest(self._back, array, received)
        return torch.from_numpy(received).to(gradient)

    def _cross(
        self, link: str, index: str, array: "np.ndarray", positions: Positions | None, step: int
    ) -> tuple["np.ndarray", Sizes]:
        rows, width = array.shape
        flat = array.reshape(-1)
        packet = CutPacket(
            device=self._device,
            step=step,
            rows=rows,
            width=width,
            index=index,
            value_type=self._wire.value_type,
            values=flat if positions is None else flat[positions],
            positions=None if index == SUPPORT else positions,
            is_even=index not in (DENSE, SUPPORT) and self._is_even(rows, width),
        )
        message, sizes = write_packet(packet)
        count(self._ledger, link, sizes)
        kept = None if positions is None else len(positions)
        got = read_packet(message, width=width, max_rows=rows, kept=kept)
        where = positions if got.index == SUPPORT else got.positions
        if where is None:
            return got.values.reshape(rows, width), sizes
        spread = np.zeros(rows * width, np.float32)
        spread[where] = got.values
        return spread.reshape(rows, width), sizes

    def _is_even(self, rows: int, width: int) -> bool:
        space = self._wire.space(rows, width)
        return space is not None and space.is_even


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


def count(ledger: Ledger, link: str, sizes: Sizes, content: str = "values") -> None:
    """Note a message in the ledger by what its bytes are."""
    ledger.count(link, content, sizes.values)
    ledger.count(link, "index", sizes.index)
    ledger.count(link, "framing", sizes.framing)


def send_labels(
    ledger: Ledger, link: str, labels: Tensor, num_classes: int, device: int, step: int
) -> Tensor:
    """`labels` as the server gets them."""
    packet = CutPacket(
        device=device,
        step=step,
        rows=len(labels),
        width=1,
        index=DENSE,
        value_type=label_type(num_classes),
        values=labels.cpu().numpy(),
    )
    message, sizes = write_packet(packet)
    count(ledger, link, sizes, "labels")
    return torch.from_numpy(read_packet(message, width=1, max_rows=len(labels)).values).to(labels.device)


def send_weights(ledger: Ledger, link: str, weights: Tensor, device: int, step: int) -> Tensor:
    """Flat `weights` as the other side gets them, float32."""
    packet = CutPacket(
        device=device,
        step=step,
        rows=1,
        width=len(weights),
        index=DENSE,
        value_type="float32",
        values=weights.cpu().numpy(),
    )
    message, sizes = write_packet(packet)
    count(ledger, link, sizes, "weights")
    return torch.from_numpy(read_packet(message, width=len(weights), max_rows=1).values).to(weights)
