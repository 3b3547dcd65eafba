"""A model that trains together with its copies on other ranks."""

import hashlib
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
from capstan.data_parallel.planner import Network
from capstan.data_parallel.recording import Recorder, record_at_the_end
from capstan.data_parallel.sharing import share_optimizer, share_tensors
from capstan.data_parallel.uneven import Exchange, UnevenInputs
from capstan.errors import InputError, UsageError
from capstan.plans import Plan, Trace
from capstan.transport import Communicator, Conversation, Group, Ledger, Operation, Pending, Shape
from capstan.transport.collectives import average


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
        self._recorder = Recorder(self)
        self._share("the first rank's weights", (*module.parameters(), *module.buffers()))
        self._recorder.has_started()
        record_at_the_end(self._recorder)
        self._is_in_step = False
        self._loss_scale = LossScale(loss_scale)
        self._uneven: UnevenInputs | None = None
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
                if self._uneven is not None and self._gradients is None:
                    self._uneven.announce("step")
                self.algorithm.before_forward()
            if self._broadcasts_buffers and self._gradients is not None and self._gradients.is_on:
                source = 0 if self._uneven is None else self._uneven.announce("buffers").source
                self._share("the first rank's buffers", self.module.buffers(), source=source)
                self._recorder.count(forwards=1)
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

    @contextmanager
    def join(self) -> Iterator[None]:
        """Ranks may take unequally many steps inside; it ends when the last one is through.

        As under DDP's `join`, a rank that is through takes part in the others' exchanges with gradients of 0,
        and means are over all ranks. Then it takes over weights, buffers, and the state of optimizer and
        GradScaler of a rank that went on longest; a schedule of learning rates is the program's: step it
        outside. Where weights are exchanged it lends its own, which no step moves.

        Raises:
            UsageError: the algorithm cannot; or ranks do different things inside.
        """
        if not self.algorithm.can_spare_inputs:
            raise UsageError(
                f"{self.algorithm.name} needs every rank's step: give all ranks equally many inputs, or take "
                "another algorithm, such as bytegrad."
            )
        if not self.algorithm.steps_wait:
            yield
            return
        uneven = self._uneven = UnevenInputs(self.group, self._take_part)
        try:
            yield
            self._end_early_step()
            source = uneven.see_out()
        finally:
            self._uneven = None
        if source is not None and self._gradients is not None:
            self._take_over(source, was_even=uneven.was_even)

    def _end_early_step(self) -> None:
        """A forward pass without a step, as the last thing of a rank: the others will step."""
        if self._gradients is None and self._is_in_step:
            self._before_step()
            self._after_step()

    def _take_part(self, exchange: Exchange) -> None:
        if exchange.moment == "buffers":
            self._share("another rank's buffers", self.module.buffers(), source=exchange.source)
        elif self._gradients is not None:
            self._loss_scale.follow(exchange.factor)
            self.algorithm.rescale(exchange.factor)
            self._gradients.take_part()
        else:
            self.algorithm.before_forward()
            self.algorithm.before_step()
            self.algorithm.after_step()

    def _take_over(self, source: int, *, was_even: bool) -> None:
        """Be as the rank that went on longest. After equally many steps only buffers differ."""
        self._share(
            "the last rank's weights", (*self.module.parameters(), *self.module.buffers()), source=source
        )
        if was_even:
            return
        if self.optimizer is not None:
            share_optimizer(self._submit, self.group, self.optimizer, source=source)
        self._loss_scale.take_over(self.group, source)

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

    # --- accounts ----------------------------------------------------------------------------------------

    def plan(
        self,
        steps: int,
        *,
        network: Network,
        compute_s: float,
        passes: int | None = None,
        forwards: int | None = None,
    ) -> Plan:
        """What so many steps will cost this rank, and the way to equal weights before them.

        Bytes are exact, once the first backward pass has shown the order of the gradients, wherever all ranks
        have all gradients and equally many steps; `async`, which sends by the clock, is planned without.

        Args:
            network, compute_s: what seconds are predicted from, see `planner.predict`.
            passes: backward passes that exchange; default one a step.
            forwards: forward passes in training outside `no_sync`; default one for each of those.
        """
        return self._recorder.plan(
            steps, network=network, compute_s=compute_s, passes=passes, forwards=forwards
        )

    def trace(self) -> Trace:
        """What was sent and how long it took until now: the plan's phases, by ledger and clock."""
        return self._recorder.trace()

    def shared_buffers(self) -> list[torch.Tensor]:
        """What all ranks take over from the first one before each forward pass."""
        return list(self.module.buffers()) if self._broadcasts_buffers else []

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
            "steps": self._recorder.steps_before + self._recorder.steps,
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
        self._recorder.steps_before = state.get("steps", 0) - self._recorder.steps

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
            begins=self._begin_backward,
            exchange=exchange,
            holds=lambda: self.algorithm.holds_gradients,
            agree=lambda order: [int(at) for at in self.group.share(order)],
            done=self._after_gradients,
        )

    def _begin_backward(self) -> None:
        factor = self._loss_scale.change()
        self.algorithm.rescale(factor)
        if self._uneven is not None:
            self._uneven.announce("gradients", factor)

    def _after_gradients(self) -> None:
        self.algorithm.after_gradients()
        self._recorder.count(passes=1)

    def _before_step(self) -> None:
        self._communicator.check()
        self._loss_scale.notice_scaler()
        self.algorithm.before_step()

    def _after_step(self) -> None:
        self.algorithm.after_step()
        self._is_in_step = False
        self._recorder.count(steps=1)

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

    def _share(self, about: str, values: Iterable[torch.Tensor], *, source: int = 0) -> None:
        share_tensors(self._submit, values, source=source, about=about)

    def _submit(self, begin: Callable[[Conversation], Operation], about: str) -> Pending:
        return self.submit(begin, about=about)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
