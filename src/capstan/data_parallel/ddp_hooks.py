"""The other face: a communication hook for PyTorch's DistributedDataParallel.

    state = HookState("bytegrad")
    ddp.register_comm_hook(state, hook)

For algorithms that exchange gradients; the others need `wrap`.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.exchange import exchange_finite
from capstan.data_parallel.loss_scale import LossScale
from capstan.data_parallel.names import algorithm_from_name
from capstan.data_parallel.qadam import QAdamMomenta
from capstan.errors import UsageError
from capstan.transport import Communicator, Group, Ledger
from capstan.transport.group import PATIENCE_S


class HookState:
    """What a hook keeps from step to step: the algorithm and the communication thread.

    Args:
        algorithm: one that exchanges gradients, or its name.
        process_group: the group that DDP was given; default all ranks.
        device_type: "cuda" if gradients lie on GPUs and NCCL carries them.
        patience_s: how long one wait for another rank may take.
        loss_scale: what the loss is multiplied by, such as `GradScaler.get_scale`; an algorithm with error
            feedback must be told, since a hook sees no optimizer.
    """

    def __init__(
        self,
        algorithm: str | Algorithm,
        process_group: dist.ProcessGroup | None = None,
        *,
        device_type: str = "cpu",
        patience_s: float = PATIENCE_S,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        self.algorithm = algorithm_from_name(algorithm) if isinstance(algorithm, str) else algorithm
        if not self.algorithm.exchanges_gradients or isinstance(self.algorithm, QAdamMomenta):
            raise UsageError(f"{self.algorithm.name} does more than a DDP hook can. Use wrap().")
        group = Group(process_group, device_type=device_type, patience_s=patience_s)
        device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else None
        self.algorithm.join(group)
        self.communicator = Communicator(group, device=device)
        self.loss_scale = LossScale(loss_scale)

    @property
    def ledger(self) -> Ledger:
        """The bytes that went to and came from every rank, by phase."""
        return self.communicator.ledger

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on. DDP cuts its buckets anew in its second step: take it after that."""
        return self.algorithm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.algorithm.load_state_dict(state)

    def close(self) -> None:
        """End the communication thread."""
        self.communicator.close()


def hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of DDP's by the algorithm of `state`."""
    if bucket.index() == 0:  # the first of a pass: nothing is under way
        state.algorithm.rescale(state.loss_scale.change())
    values = bucket.buffer()
    shapes = [tuple(each.shape) for each in bucket.parameters()]
    # DDP cuts its buckets anew after the first step: what is kept under one key is of one layout.
    key = f"bucket {bucket.index()} of layout {zlib.crc32(repr(shapes).encode()):08x}"
    devices = [values.device] if values.is_cuda else None
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
    pending = state.communicator.submit(
        partial(exchange_finite, algorithm=state.algorithm, values=values, shapes=shapes, key=key),
        about=f"bucket {bucket.index()}",
    )

    def settle(error: Any) -> None:
        if error is None:
            future.set_result(values)
        else:
            future.set_exception(error)

    pending.when_done(settle)
    return future
