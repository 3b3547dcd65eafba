"""One call that makes a model train together with its copies on other ranks."""

import os
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.buckets import BUCKET_BYTES
from capstan.data_parallel.names import algorithm_from_name
from capstan.data_parallel.refusals import require_trainable
from capstan.data_parallel.replica import Replica
from capstan.errors import UsageError
from capstan.transport import Group, Shape
from capstan.transport.group import PATIENCE_S, join

DEFAULT_ALGORITHM = "gradient_allreduce"
ALGORITHM_VARIABLE = "CAPSTAN_ALGORITHM"


def wrap(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    algorithm: str | Algorithm | type[Algorithm] | None = None,
    *,
    group: Group | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    patience_s: float = PATIENCE_S,
    broadcast_buffers: bool = True,
    gradient_as_bucket_view: bool = False,
    shape: Shape | None = None,
    loss_scale: Callable[[], float] | None = None,
) -> Replica:
    """Train `model` together with the other ranks that torchrun started.

    Use the result in place of the model, and the optimizer as before, made before or after:

        model = wrap(model, optimizer, "bytegrad")

    Args:
        optimizer: what moves the weights. Algorithms that exchange gradients can do without it, as DDP does.
        algorithm: a name (`ALGORITHMS`), or an algorithm with settings of its own; default: what the
            environment variable CAPSTAN_ALGORITHM names, or plain averages.
        group: the ranks, of one open model at a time; default: all, through NCCL if the model is on a GPU,
            else through gloo.
        bucket_bytes: how many bytes of gradients are exchanged together.
        patience_s: how long one wait for another rank may take; only where `group` is not given.
        broadcast_buffers: as in DDP: where gradients are exchanged, all ranks take the first one's buffers,
            such as a batch norm's statistics, before each forward pass in training.
        gradient_as_bucket_view: as in DDP: saves a copy of all gradients; a gradient that is kept is then
            overwritten by the next backward pass.
        shape: a slower link to pretend, for tests.
        loss_scale: what the loss is multiplied by before backward: an algorithm with error feedback keeps
            what it owes in that unit. A GradScaler that steps `optimizer` is found without.

    Raises:
        UsageError: the model, the optimizer and the algorithm do not fit each other, or ranks differ.
    """
    chosen = os.environ.get(ALGORITHM_VARIABLE, DEFAULT_ALGORITHM) if algorithm is None else algorithm
    made = algorithm_from_name(chosen) if isinstance(chosen, str) else chosen
    if isinstance(made, type):
        made = made()
    require_trainable(model, optimizer, made, bucket_bytes=bucket_bytes, patience_s=patience_s)
    return Replica(
        model,
        optimizer,
        made,
        group=group or group_of(model, patience_s=patience_s),
        bucket_bytes=bucket_bytes,
        broadcast_buffers=broadcast_buffers,
        gradient_as_bucket_view=gradient_as_bucket_view,
        shape=shape,
        loss_scale=loss_scale,
    )


def group_of(model: nn.Module, *, patience_s: float) -> Group:
    """All ranks, speaking from where the model is; joins them as torchrun says if nobody has."""
    device = next(model.parameters()).device
    if not torch.distributed.is_initialized() and join(device.type, patience_s=patience_s) is None:
        raise UsageError(
            "This process is alone. Start it with torchrun, or with `capstan train dp`, or make a process "
            "group with torch.distributed.init_process_group first."
        )
    has_nccl = device.type == "cuda" and torch.distributed.get_backend() != "gloo"
    return Group(device_type="cuda" if has_nccl else "cpu", patience_s=patience_s)
