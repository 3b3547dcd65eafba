"""Gradients into buckets as backward makes them ready, and each bucket on its way while backward goes on."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from capstan.data_parallel.buckets import Bucket, buckets_of
from capstan.transport import Pending


class Gradients:
    """The buckets of a model's gradients.

    In the first backward pass the order is learned in which gradients become ready; the first rank's
    order holds for all, and all is exchanged at the end. From then on a bucket goes out as soon as it,
    and all before it, are complete: so every rank sends in the same order. What has no gradient by the
    end of a pass counts as 0.

    Args:
        parameters: those that are trained.
        exchange: starts to replace a bucket's gradients.
        agree: the first rank's value, on every rank.
        done: called when all are replaced, at the end of every backward pass.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        *,
        bucket_bytes: int,
        exchange: Callable[[Bucket], Pending],
        agree: Callable[[list[int]], list[int]],
        done: Callable[[], None],
    ) -> None:
        self._parameters = list(parameters)
        self._bucket_bytes, self._exchange, self._agree, self._done = bucket_bytes, exchange, agree, done
        self.is_on = True
        self.order: list[int] | None = None
        self.buckets: list[Bucket] = []
        self._seen: list[int] = []
        self._begin_pass()
        self._hooks = [
            each.register_post_accumulate_grad_hook(self._noticing(at)) for at, each in enumerate(parameters)
        ]

    def lay_out(self, order: Sequence[int]) -> None:
        """Cut the buckets, in this order of the parameters."""
        self.order = list(order)
        self.buckets = buckets_of([self._parameters[at] for at in order], bucket_bytes=self._bucket_bytes)
        self._place = {
            id(parameter): (bucket, view)
            for bucket in self.buckets
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True)
        }

    def close(self) -> None:
        """Look at gradients no more."""
        for hook in self._hooks:
            hook.remove()

    def _begin_pass(self) -> None:
        self._is_running = False
        self._ready: set[int] = set()
        self._next = 0
        self._pending: list[Pending] = []

    def _noticing(self, at: int) -> Callable[[Tensor], None]:
        def notice(parameter: Tensor) -> None:
            if not self.is_on:
                return
            if not self._is_running:
                self._is_running = True
                # Runs when this backward pass ends, before backward() returns: then gradients may be clipped.
                torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)
            if self.order is None:
                self._seen.append(at)
                return
            self._take(parameter)
            self._ready.add(id(parameter))
            self._send_what_is_complete()

        return notice

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        """Copy a gradient to its place, which it then is."""
        _, view = self._place[id(parameter)]
        if parameter.grad is None:
            view.zero_()
        elif parameter.grad.data_ptr() != view.data_ptr():
            view.copy_(parameter.grad)
        parameter.grad = view

    def _send_what_is_complete(self) -> None:
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if any(id(each) not in self._ready for each in bucket.parameters):
                return
            self._pending.append(self._exchange(bucket))
            self._next += 1

    def _end_pass(self) -> None:
        if self.order is None:
            unseen = [at for at in range(len(self._parameters)) if at not in set(self._seen)]
            self.lay_out(self._agree([*dict.fromkeys(self._seen), *unseen]))
        for bucket in self.buckets[self._next :]:
            for parameter in bucket.parameters:
                if id(parameter) not in self._ready:
                    self._take(parameter)
                    self._ready.add(id(parameter))
        self._send_what_is_complete()
        pending = self._pending
        self._begin_pass()
        for each in pending:
            each.wait()
        self._done()
