"""What the hidden states of a sweep take on each tier, and on their way to the next rank."""

from typing import NamedTuple

from capstan.generation.planning.placement import Tier
from capstan.generation.planning.stage import Stage


class ActivationBuffers(NamedTuple):
    """Bytes that a sweep's hidden states take on each tier."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int


def activation_buffers(tier: Tier, *, sweep_bytes: int, batch_bytes: int) -> ActivationBuffers:
    """For hidden states of `sweep_bytes` in a sweep and at most `batch_bytes` in one batch of it."""
    if tier == "device":
        return ActivationBuffers(sweep_bytes, 0, 0)
    if tier == "host":
        return ActivationBuffers(2 * batch_bytes, sweep_bytes, 0)
    return ActivationBuffers(2 * batch_bytes, 2 * batch_bytes, sweep_bytes)


def outbox_bytes(stage: Stage | None, *, sweep_bytes: int) -> int:
    """Device memory for hidden states on their way to the next rank, if there is one."""
    return 0 if stage is None or stage.group.is_last else sweep_bytes
