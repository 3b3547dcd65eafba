"""A model that trains together with its copies on other ranks."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer

from capstan.codecs import Compressor, Identity
from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.buckets import BUCKET_BYTES, Bucket, buckets_of
from capstan.data_parallel.exchange import exchange_bucket
from capstan.data_parallel.gradients import Gradients
from capstan.data_parallel.loss_scale import LossScale
from capstan.data_parallel.names import algorithm_from_name
from capstan.data_parallel.refusals import require_trainable
from capstan.errors import InputError, UsageError
from capstan.transport import Communicator, Conversation, Group, Ledger, Operation, Pending, Shape
from capstan.transport.collectives import average, broadcast
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
) -> "Replica":
    """Train `model` together with the other ranks that torchrun started.

    Use the result in place of the model, and the optimizer as before, made before or after:

        model = wrap(model, optimizer, "bytegrad")

    Args:
        optimizer: what moves the weights. Algorithms that exchange gradients can do without it, as DDP does.
        algorithm: a name (`ALGORITHMS`), or an algorithm with settings of its own; default: what the
            environment variable CAPSTAN_ALGORITHM names, or plain averages.
        group: the ranks; default: all, through NCCL if the model is on a GPU, else through gloo.
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
    chosen = algorithm or os.environ.get(ALGORITHM_VARIABLE, DEFAULT_ALGORITHM)
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


class Replica(nn.Module):
    """One rank's copy of a model. Made by `wrap`; `module` is the model itself.

    All ranks begin with the first rank's weights and buffers. Where gradients are exchanged buffers go on to
    be the first rank's, unless `broadcast_buffers` is off; else they are each rank's own afterwards.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        algorithm: Algorithm,
        *,
        group: Group,
        bucket_bytes: int = BUCKET_BYTES,
        broadcast_buffers: bool = True,
        gradient_as_bucket_view: bool = False,
        shape: Shape | None = None,
        loss_scale: Callable[[], float] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.optimizer, self.algorithm, self.group = optimizer, algorithm, group
        self._bucket_bytes, self._as_views = bucket_bytes, gradient_as_bucket_view
        self._broadcasts_buffers = broadcast_buffers and algorithm.exchanges_gradients
        self._trained = [each for each in module.parameters() if each.requires_grad]
        self._require_agreement()
        self._communicator = Communicator(group, shape=shape, device=self._trained[0].device)
        self._share("the first rank's weights", (*module.parameters(), *module.buffers()))
        self._is_in_step = False
        self.is_in_optimizer = False
        self._loss_scale = LossScale(loss_scale)
        self._gradients = self._collect() if algorithm.exchanges_gradients else None
        algorithm.start(self)
        self._step_hooks = []
        if optimizer is not None:
            self._step_hooks = [
                optimizer.register_step_pre_hook(lambda *_: self._before_step()),
                optimizer.register_step_post_hook(lambda *_: self._after_step()),
            ]

    @property
    def ledger(self) -> Ledger:
        """The bytes that went to and came from every rank, by phase."""
        return self._communicator.ledger

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass."""
        if self.training and torch.is_grad_enabled():
            self._communicator.check()
            if self._gradients is not None:
                self._gradients.recover()
            if not self._is_in_step:
                self._is_in_step = self.optimizer is not None
                self.algorithm.before_forward()
            if self._broadcasts_buffers and self._gradients is not None and self._gradients.is_on:
                self._share("the first rank's buffers", self.module.buffers())
            outputs = self.module(*args, **kwargs)
            if self._gradients is not None:
                self._gradients.watch(outputs)
            return outputs
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add up gradients and exchange nothing; the next one outside exchanges
        the sum.
        """
        if self._gradients is None:
            yield
            return
        before, self._gradients.is_on = self._gradients.is_on, False
        try:
            yield
        finally:
            self._gradients.is_on = before

    def average_weights(self) -> None:
        """Give every rank the mean of all ranks' weights; all must call it. For algorithms whose ranks
        differ.
        """
        exact = Compressor(Identity())
        with self.algorithm.paused():
            self._average_weights(exact)

    def _average_weights(self, exact: Compressor) -> None:
        for bucket in self.weight_buckets():
            values = bucket.take_weights()
            self.submit(
                partial(average, values=values, compressor=exact, key="weights"), about="weights"
            ).wait()
            bucket.put_weights(values)

    def close(self) -> None:
        """End what runs in the background; the model can be used on."""
        try:
            self.algorithm.close()
        finally:
            for hook in self._step_hooks:
                hook.remove()
            if self._gradients is not None:
                self._gradients.close()
            self._communicator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for algorithms ----------------------------------------------------------------------------------

    def submit(self, begin: Callable[[Conversation], Operation], *, about: str) -> Pending:
        """Run an operation in the communication thread, after those before; the same on all ranks."""
        return self._communicator.submit(begin, about=about)

    def weight_buckets(self) -> list[Bucket]:
        """The weights in buckets, last ones first; new memory each time."""
        return buckets_of(self._trained[::-1], bucket_bytes=self._bucket_bytes)

    def gradient_buckets(self) -> list[Bucket]:
        """The buckets of gradients; none before the first backward pass."""
        return self._gradients.buckets if self._gradients else []

    # --- state -------------------------------------------------------------------------------------------

    def algorithm_state(self) -> dict[str, Any]:
        """What the next steps depend on besides model and optimizer, of this rank."""
        return {
            "algorithm": self.algorithm.description,
            "ranks": [self.group.rank, self.group.size],
            "order": self._gradients.order if self._gradients else None,
            "state": self.algorithm.state_dict(),
            "loss_scale": self._loss_scale.last,
        }

    def load_algorithm_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `algorithm_state` was taken: same algorithm, same rank of as many.

        The model's and the optimizer's own states are loaded as ever, before.
        """
        wanted = (self.algorithm.description, [self.group.rank, self.group.size])
        if (state["algorithm"], list(state["ranks"])) != wanted:
            raise InputError(
                f"The state is of {state['algorithm']}, rank {state['ranks'][0]} of {state['ranks'][1]}; "
                f"this is {wanted[0]}, rank {wanted[1][0]} of {wanted[1][1]}. Start it the same way again."
            )
        if self._gradients is not None and state["order"] is not None:
            self._gradients.lay_out(state["order"])
        self.algorithm.load_state_dict(state["state"])
        self._loss_scale.last = state.get("loss_scale")

    # --- moments -----------------------------------------------------------------------------------------

    def _collect(self) -> Gradients:
        def exchange(bucket: Bucket) -> Pending:
            return self.submit(
                partial(exchange_bucket, algorithm=self.algorithm, bucket=bucket), about=bucket.key
            )

        return Gradients(
            self._trained,
            bucket_bytes=self._bucket_bytes,
            as_views=self._as_views,
            begins=lambda: self.algorithm.rescale(self._loss_scale.change()),
            exchange=exchange,
            holds=lambda: self.algorithm.holds_gradients,
            agree=lambda order: [int(at) for at in self.group.share(order)],
            done=self.algorithm.after_gradients,
        )

    def _before_step(self) -> None:
        self._communicator.check()
        self._loss_scale.notice_scaler()
        self.is_in_optimizer = True
        self.algorithm.before_step()

    def _after_step(self) -> None:
        self.is_in_optimizer = False
        self.algorithm.after_step()
        self._is_in_step = False

    # --- the beginning -----------------------------------------------------------------------------------

    def _require_agreement(self) -> None:
        trained = [(tuple(each.shape), str(each.dtype)) for each in self._trained]
        others = [
            (tuple(each.shape), str(each.dtype))
            for each in (*self.module.parameters(), *self.module.buffers())
        ]
        own = {
            "another algorithm": self.algorithm.description,
            "another bucket_bytes": self._bucket_bytes,
            "another broadcast_buffers": self._broadcasts_buffers,
            "parameters of other shapes or types": _digest(trained),
            "parameters or buffers that are not trained, of other shapes or types": _digest(others),
        }
        for rank, other in enumerate(self.group.gather(own)):
            for what, value in own.items():
                if other[what] != value:
                    raise UsageError(
                        f"Rank {rank} has {what} ({other[what]}) than rank {self.group.rank} ({value}). "
                        "Start all ranks with the same model and settings."
                    )

    def _share(self, about: str, values: Iterable[torch.Tensor]) -> None:
        """Give all ranks the first one's values."""
        tensors = [each.detach() for each in values]
        tensors = [torch.view_as_real(each) if each.is_complex() else each for each in tensors]
        for kind in dict.fromkeys((each.dtype, each.device) for each in tensors):
            alike = [each for each in tensors if (each.dtype, each.device) == kind and each.numel()]
            if not alike:
                continue
            flat = torch.cat([each.reshape(-1) for each in alike])
            self.submit(partial(broadcast, values=flat), about=about).wait()
            for target, part in zip(alike, flat.split([each.numel() for each in alike]), strict=True):
                target.copy_(part.view(target.shape))


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
