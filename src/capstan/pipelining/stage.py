"""A stage for the schedules of `torch.distributed.pipelining` whose messages are compressed.

Imported when a pipeline is built and not with the room: what it stands on takes longer to import than torch.

What is overridden is what the schedules call, of torch 2.13 (tests notice where another version differs).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage

from capstan.pipelining.boundary import BoundaryEnd, Visit
from capstan.plans import rank_link
from capstan.transport import Group, Ledger


class CompressedStage(PipelineStage):
    """One stage, whose sends and receives pass through the ends of its two boundaries.

    Args:
        module: the stage's layers.
        group: the ranks, one for each stage.
        wire: torch's group through which the schedule sends.
        inputs, outputs: tensors like those of a micro-batch, on any device.
        before, after: this rank's ends of the boundaries to the stages before and after it.
        ledger: books what is sent.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        group: Group,
        wire: dist.ProcessGroup,
        device: torch.device,
        inputs: Tensor,
        outputs: Tensor,
        before: BoundaryEnd | None,
        after: BoundaryEnd | None,
        ledger: Ledger,
    ) -> None:
        super().__init__(
            module,
            group.rank,
            group.size,
            device,
            input_args=_like(inputs, device, is_root=before is None),
            output_args=_like(outputs, device, is_root=False),
            group=wire,
        )
        self._ranks, self._ledger = group, ledger
        self._before, self._after = before, after
        self._visits_before: list[list[Visit]] = []
        self._visits_after: list[list[Visit]] = []
        self._messages: dict[tuple[str, int], Tensor] = {}
        self._waiting = ExitStack()
        self.is_computing = False
        self.peer = self._neighbour(-1 if before is not None else 1)
        self.waiting_since_s = time.monotonic()

    def begin(self, sample_ids: Sequence[Sequence[int]]) -> None:
        """The sample ids of each micro-batch of the step that follows."""
        self._messages.clear()
        if self._before is not None:
            self._visits_before = [self._before.plan(each) for each in sample_ids]
        if self._after is not None:
            self._visits_after = [self._after.plan(each) for each in sample_ids]

    # --- activations -------------------------------------------------------------------------------------

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        for operation in operations:
            if self._after is not None and self._compresses_forward:
                visits = self._visits_after[fwd_chunk_id]
                operation.tensor = self._after.encode(visits, operation.tensor)
                # Kept until the step is over: gloo reads it when the other rank asks for it.
                self._messages["send activations", fwd_chunk_id] = operation.tensor
            self._book(1, "activations", operation.tensor)
        return operations

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_fwd_recv_ops(fwd_chunk_id)
        if operations:
            self._wait_for(-1)
        for operation in operations:
            if self._before is not None and self._compresses_forward:
                size = self._before.message_bytes(self._visits_before[fwd_chunk_id], operation.tensor)
                operation.tensor = operation.tensor.new_empty(size, dtype=torch.uint8)
                self._messages["activations", fwd_chunk_id] = operation.tensor
        return operations

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        with self.computing():
            message = self._messages.pop(("activations", fwd_chunk_id), None)
            if message is not None and self._before is not None:
                buffer = self.args_recv_info[fwd_chunk_id][0].buffer
                assert buffer is not None
                self._before.decode(self._visits_before[fwd_chunk_id], message, buffer)
            return super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)

    @property
    def _compresses_forward(self) -> bool:
        end = self._before or self._after
        return self.has_backward and end is not None and end.compression.forward is not None

    # --- gradients ---------------------------------------------------------------------------------------

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        for operation in operations:
            if self._before is not None and self._compresses_backward:
                operation.tensor = self._before.encode_gradients(operation.tensor)
                self._messages["send gradients", bwd_chunk_id] = operation.tensor
            self._book(-1, "gradients", operation.tensor)
        return operations

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_bwd_recv_ops(bwd_chunk_id)
        if operations:
            self._wait_for(1)
        for operation in operations:
            if self._after is not None and self._compresses_backward:
                size = self._after.gradient_bytes(operation.tensor)
                operation.tensor = operation.tensor.new_empty(size, dtype=torch.uint8)
                self._messages["gradients", bwd_chunk_id] = operation.tensor
        return operations

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        with self.computing():
            message = self._messages.pop(("gradients", bwd_chunk_id), None)
            if message is not None and self._after is not None:
                buffer = self.grad_recv_info[bwd_chunk_id][0].buffer
                self._after.decode_gradients(message, buffer)
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    @property
    def _compresses_backward(self) -> bool:
        end = self._before or self._after
        return end is not None and end.compression.backward is not None

    # --- who is waited for -------------------------------------------------------------------------------

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While this lasts, an error is the model's and not the network's."""
        self._waiting.close()
        self.is_computing, start_s = True, time.monotonic()
        yield
        self.is_computing, self.waiting_since_s = False, time.monotonic()
        self._ledger.spend("compute", self.waiting_since_s - start_s)

    def stop_waiting(self) -> None:
        """The step is over, or has failed."""
        self._waiting.close()

    def _wait_for(self, way: int) -> None:
        self._waiting.close()
        self.peer = self._neighbour(way)
        self._waiting.enter_context(self._ranks.liveness.waiting_for(self.peer))
        self.waiting_since_s = time.monotonic()

    def _neighbour(self, way: int) -> int:
        return (self._ranks.rank + way) % self._ranks.size

    def _book(self, way: int, content: str, message: Tensor) -> None:
        link = rank_link(self._ranks.rank, self._neighbour(way))
        self._ledger.count(link, content, message.nbytes)


def _like(values: Tensor, device: torch.device, *, is_root: bool) -> Tensor:
    """An example for torch, which reads shape, dtype and whether gradients will come back."""
    example = torch.empty_like(values, device=device)
    return example if is_root else example.requires_grad_()
