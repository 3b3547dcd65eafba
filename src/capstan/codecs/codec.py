"""The one interface of this room: a tensor into an exact number of bytes, and back."""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from capstan.codecs.dtypes import dtype_name
from capstan.codecs.packet import Packet
from capstan.errors import InputError


class Codec(ABC):
    """Turns tensors into packets whose size is known before encoding, and packets back into tensors.

    Implementations are frozen keyword-only dataclasses, so that equal settings are equal codecs and a codec
    can be part of a plan. They hold no state between calls and read no global random generator.

    `encode` and `decode` speak packets. `encode_into` and `decode_into` are the raw forms for callers that
    own the memory, such as a slab; there the caller keeps codec, shape and type.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The canonical name; `codec_from_name` inverts it."""

    @classmethod
    @abstractmethod
    def from_name(cls, name: str) -> Self:
        """The codec of this family that `name` describes; a name that cannot be read raises `UsageError`."""

    @abstractmethod
    def encoded_bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The exact size of the payload; a shape or type that cannot be encoded raises `InputError`."""

    @abstractmethod
    def scratch_bytes(self, shape: tuple[int, ...], dtype: torch.dtype, *, device_type: str = "cuda") -> int:
        """An upper bound of the temporary memory that `decode_into` holds at any time on such a device.

        Accelerators get larger blocks than processors, because each operation on a block costs a launch.
        """

    @abstractmethod
    def _write(self, values: Tensor, payload: Tensor, seed: int | None) -> None:
        """Encode into a payload that is known to have the right size, type and device."""

    @abstractmethod
    def _read(self, payload: Tensor, dtype: torch.dtype, out: Tensor) -> None:
        """Decode into `out`, whose shape is the packet's, from a payload known to have the right size."""

    def encode(self, values: Tensor, *, out: Tensor | None = None, seed: int | None = None) -> Packet:
        """Encode `values`, of any strides, on their device.

        `out` is flat uint8 memory of exactly `encoded_bytes`, which the packet then refers to. `seed` is
        needed by codecs that round stochastically and ignored by the others.
        """
        shape = tuple(values.shape)
        size = self.encoded_bytes(shape, values.dtype)
        payload = torch.empty(size, dtype=torch.uint8, device=values.device) if out is None else out
        self.encode_into(values, payload, seed=seed)
        return Packet(codec=self.name, shape=shape, dtype=values.dtype, payload=payload)

    def decode(self, packet: Packet, *, out: Tensor | None = None) -> Tensor:
        """Decode a packet of this codec, into `out` if given, and return the tensor.

        `out` has the packet's shape and any strides. Its type may differ from the packet's when both are
        floating point: the conversion then happens on the way, with no tensor of the packet's type between.
        """
        if packet.codec != self.name:
            raise InputError(f"{self.name} was asked to decode a packet of {packet.codec}.")
        # Before allocating: a packet from outside may announce any shape.
        self._check_payload(packet.payload, packet.shape, packet.dtype)
        if out is None:
            out = torch.empty(packet.shape, dtype=packet.dtype, device=packet.payload.device)
        self.decode_into(packet.payload, packet.shape, packet.dtype, out)
        return out

    @torch.no_grad()
    def encode_into(self, values: Tensor, payload: Tensor, *, seed: int | None = None) -> None:
        """Encode into a flat uint8 tensor of exactly `encoded_bytes`, which may start anywhere in a slab."""
        self._check_payload(payload, tuple(values.shape), values.dtype)
        _check_device("values", values, payload)
        self._write(values, payload, seed)

    @torch.no_grad()
    def decode_into(self, payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor) -> None:
        """Decode values of `shape` and `dtype` into `out`; every element is written."""
        self._check_payload(payload, shape, dtype)
        _check_device("out", out, payload)
        if tuple(out.shape) != tuple(shape):
            raise InputError(
                f"Wanted memory of shape {tuple(shape)} to decode into, found {tuple(out.shape)}."
            )
        if out.dtype != dtype and not (out.is_floating_point() and dtype.is_floating_point):
            raise InputError(
                f"{dtype_name(dtype)} cannot be decoded into {dtype_name(out.dtype)}: only floating-point "
                "types are converted on the way. Decode into the same type."
            )
        self._read(payload, dtype, out)

    def _check_payload(self, payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = self.encoded_bytes(shape, dtype)
        if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() != size:
            raise InputError(
                f"{self.name} puts {dtype_name(dtype)} of shape {tuple(shape)} into a flat uint8 tensor of "
                f"{size} bytes; found {dtype_name(payload.dtype)} of shape {tuple(payload.shape)}."
            )
        if not payload.is_contiguous():
            raise InputError(f"A payload must be contiguous, found stride {payload.stride()}. Copy it first.")


def _check_device(role: str, tensor: Tensor, payload: Tensor) -> None:
    if tensor.device != payload.device:
        raise InputError(
            f"The payload is on {payload.device}, {role} on {tensor.device}. Move the payload: it is smaller."
        )
