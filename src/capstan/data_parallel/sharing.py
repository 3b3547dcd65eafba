"""What one rank has, given to all."""

import io
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from capstan.transport import Conversation, Group, Operation, Pending
from capstan.transport.collectives import broadcast

Submit = Callable[[Callable[[Conversation], Operation], str], Pending]


def messages_of(values: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors that cross together: those of one type and device; complex numbers as pairs, empty ones not."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for each in values:
        real = torch.view_as_real(each.detach()) if each.is_complex() else each.detach()
        if real.numel():
            alike.setdefault((real.dtype, real.device), []).append(real)
    return list(alike.values())


def share_tensors(submit: Submit, values: Iterable[Tensor], *, source: int, about: str) -> None:
    """Replace tensors, of the same shapes on all ranks, by those of one rank."""
    for alike in messages_of(values):
        flat = torch.cat([each.reshape(-1) for each in alike])
        submit(partial(broadcast, values=flat, source=source), about).wait()
        for target, part in zip(alike, flat.split([each.numel() for each in alike]), strict=True):
            target.copy_(part.view(target.shape))


def share_optimizer(submit: Submit, group: Group, optimizer: Optimizer, *, source: int) -> None:
    """Give all ranks' optimizers the state of one rank's."""
    kept = io.BytesIO()
    torch.save(optimizer.state_dict(), kept)
    data = torch.frombuffer(bytearray(kept.getvalue()), dtype=torch.uint8)
    size_bytes = group.gather(data.numel())[source]
    if group.rank != source:
        data = torch.zeros(size_bytes, dtype=torch.uint8)
    share_tensors(submit, [data], source=source, about="an optimizer's state")
    if group.rank != source:
        state = torch.load(io.BytesIO(bytes(data.numpy())), map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
