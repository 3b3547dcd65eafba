"""Gradients into buckets as backward makes them ready, and each bucket on its way while backward goes on."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from capstan.data_parallel.buckets import Bucket, buckets_of
from capstan.errors import UsageError
from capstan.transport import Pending


class Gradients:
    """The buckets of a model's gradients.

    In the first backward pass the order is learned in which gradients become ready; the first rank's
    order holds for all, and all is exchanged at the end. From then on a bucket goes out as soon as it,
    and all before it, are complete: so every rank sends in the same order.

    A parameter that has no gradient by the end of a pass counts as 0 where other ranks have one. Where no
    rank has one, its `.grad` stays None, and so it does where it no longer wants one: an optimizer must not
    move it.

    Args:
        parameters: those that are trained.
        as_views: whether `.grad` becomes a view of its bucket, which saves a copy of all gradients; then the
            next pass overwrites it.
        begins: called when a backward pass begins whose gradients are exchanged; nothing is under way then.
        exchange: starts to replace a bucket's gradients.
        holds: whether nothing is exchanged for now.
        agree: the first rank's value, on every rank.
        done: called when all are replaced, at the end of every backward pass.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        *,
        bucket_bytes: int,
        as_views: bool,
        begins: Callable[[], None],
        exchange: Callable[[Bucket], Pending],
        holds: Callable[[], bool],
        agree: Callable[[list[int]], list[int]],
        done: Callable[[], None],
    ) -> None:
        self._parameters = list(parameters)
        self._bucket_bytes, self._as_views = bucket_bytes, as_views
        self._begins, self._exchange, self._holds, self._agree, self._done = (
            begins,
            exchange,
            holds,
            agree,
            done,
        )
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
            id(parameter): (bucket, at)
            for bucket in self.buckets
            for at, parameter in enumerate(bucket.parameters)
        }

    def watch(self, outputs: Any) -> None:
        """Know when the backward pass of these outputs begins, so as to know when it ends: inside, re-entrant
        checkpoints make passes of their own. `torch.autograd.grad`, which adds to no `.grad`, is none."""
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(partial(self._run_if_accumulating, _leaf_of(output)))

    def recover(self) -> None:
        """Give up a backward pass that has ended with an error. Every rank must have seen it: what some have
        sent, all have."""
        if self._is_running and torch._C._current_graph_task_id() == -1:
            pending = self._pending
            self._begin_pass()
            for each in pending:
                each.wait()

    @torch.no_grad()
    def take_part(self) -> None:
        """In the other ranks' pass, with 0 for every gradient; `.grad` is left alone, unless it is a view."""
        if self.order is None:
            self.lay_out(self._agree(list(range(len(self._parameters)))[::-1]))
        pending = []
        for bucket in self.buckets:
            bucket.present = [False] * len(bucket.parameters)
            bucket.flat.zero_()
            pending.append(self._exchange(bucket))
        for each, bucket in zip(pending, self.buckets, strict=True):
            each.wait()
            bucket.flat.zero_()

    def close(self) -> None:
        """Look at gradients no more."""
        for hook in self._hooks:
            hook.remove()

    def _begin_pass(self) -> None:
        self._is_running = False
        self._ready: set[int] = set()
        self._next = 0
        self._pending: list[Pending] = []

    def _run(self) -> None:
        if self.is_on and not self._is_running:
            self._is_running = True
            self._begins()
            # Runs when this backward pass ends, before backward() returns: then gradients may be clipped.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)

    def _run_if_accumulating(self, leaf: Node | None, _: Tensor) -> None:
        if leaf is not None:
            try:
                if not torch._C._will_engine_execute_node(leaf):
                    return
            except RuntimeError:  # what `torch.autograd.grad` was asked for is this leaf
                return
        self._run()

    def _noticing(self, at: int) -> Callable[[Tensor], None]:
        def notice(parameter: Tensor) -> None:
            if not self.is_on:
                return
            self._run()
            if self._holds():
                return
            if self.order is None:
                self._seen.append(at)
                return
            bucket, _ = self._place[id(parameter)]
            if id(parameter) in self._ready and bucket.index < self._next:
                raise UsageError(
                    "A parameter got its gradient twice in one backward pass, and the first was sent: a "
                    "layer that is used twice under re-entrant checkpointing does that. Use "
                    "use_reentrant=False."
                )
            self._take(parameter)
            self._ready.add(id(parameter))
            self._send_what_is_complete()

        return notice

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        """Copy a gradient to its place."""
        bucket, at = self._place[id(parameter)]
        view, gradient = bucket.views[at], parameter.grad
        bucket.present[at] = gradient is not None and parameter.requires_grad
        if not bucket.present[at]:
            view.zero_()
        elif gradient is not None and gradient.data_ptr() != view.data_ptr():
            if gradient.is_sparse:
                raise UsageError("Sparse gradients are not exchanged. Make the embedding with sparse=False.")
            view.copy_(gradient)

    def _send_what_is_complete(self) -> None:
        while self._next < len(self.buckets):
            bucket = self.buckets[self._next]
            if any(id(each) not in self._ready for each in bucket.parameters):
                return
            self._pending.append(self._exchange(bucket))
            self._next += 1

    def _end_pass(self) -> None:
        if self._holds():
            self._begin_pass()
            self._done()
            return
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
        self._hand_back()
        self._done()

    @torch.no_grad()
    def _hand_back(self) -> None:
        """Give parameters what was made of their gradients."""
        for bucket in self.buckets:
            for parameter, view, is_used in zip(bucket.parameters, bucket.views, bucket.used, strict=True):
                if not is_used or not parameter.requires_grad:
                    continue
                if self._as_views:
                    parameter.grad = view
                elif parameter.grad is None:
                    parameter.grad = view.clone()
                else:
                    parameter.grad.copy_(view)


def _leaf_of(output: Tensor) -> Node | None:
    """Where some path of a backward pass ends in a `.grad`; None where there is none."""
    paths, seen = [output.grad_fn], set[Node | None]()
    while paths:
        node = paths.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            return node
        paths += [before for before, _ in node.next_functions]
    return None
