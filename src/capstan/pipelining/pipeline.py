"""A model in stages, one a rank, trained by the schedules of `torch.distributed.pipelining`."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from capstan.errors import InputError, UnsupportedModel, UsageError, unknown_name
from capstan.models import Stage, StageCut
from capstan.pipelining.boundary import BoundaryEnd
from capstan.pipelining.compression import Compression
from capstan.pipelining.cutting import ChainShapes, StageShapes, cut
from capstan.pipelining.dropout import dropout_rates
from capstan.pipelining.tied import gradients_summed
from capstan.pipelining.traffic import micro_batches
from capstan.transport import Group, Ledger

if TYPE_CHECKING:
    from capstan.pipelining.stage import CompressedStage

SCHEDULES = ("1f1b", "gpipe")
PATIENCE_S = 600.0
Loss = Callable[[Tensor, Tensor], Tensor]


class Pipeline:
    """This rank's stage of a model, and its neighbours.

        pipeline = Pipeline(model, loss, compression=Compression.of_bits(forward_bits=3, backward_bits=6))
        optimizer = torch.optim.AdamW(pipeline.parameters())
        loss = pipeline.step(inputs, targets, sample_ids=ids)        # on every rank, with the same batch
        optimizer.step()

    Args:
        model: a chain of layers, the same on every rank; or this rank's stage of a causal language model, as
            `capstan.models.load_stage` gives it.
        loss: the mean loss of a micro-batch: (outputs, targets) to a number.
        num_micro_batches: into how many parts a batch is cut. A batch that cannot be cut into so many equal
            parts goes in fewer, by GPipe where they are fewer than stages.
        schedule: "1f1b" or "gpipe"; both compute the same.
        compression: in how many bits boundaries are crossed; off by default.
        process_group: torch's group, a stage for each of its ranks; None for the default group.
        device: where this stage computes.
        patience_s: how long one wait for a neighbour may take.

    Raises:
        UsageError: no such schedule, more stages than layers, no group of ranks, or another rank's stage.
        UnsupportedModel: the model cannot be cut.
    """

    def __init__(
        self,
        model: nn.Sequential | Stage,
        loss: Loss,
        *,
        num_micro_batches: int = 4,
        schedule: str = "1f1b",
        compression: Compression | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        patience_s: float = PATIENCE_S,
    ) -> None:
        if schedule not in SCHEDULES:
            raise unknown_name("schedule", schedule, SCHEDULES)
        if num_micro_batches < 1:
            raise UsageError(f"A batch goes in 1 micro-batch or more, found {num_micro_batches}.")
        if not dist.is_initialized():
            raise UsageError(
                "A pipeline needs a rank for each stage. Start the script by torchrun, and call "
                "torch.distributed.init_process_group first."
            )
        self._device = torch.device(device)
        self._loss, self._schedule, self._num_micro_batches = loss, schedule, num_micro_batches
        self.compression = compression or Compression()
        self.group = Group(process_group, patience_s=patience_s)
        self._shapes: ChainShapes | StageShapes
        module: nn.Module = model
        if isinstance(model, Stage):
            self._shapes = StageShapes(model, self.group)
        else:
            stages = cut(model, self.group.size)
            self._shapes, module = ChainShapes(stages), stages[self.group.rank]
        _warn_of_dropout(model, self.compression)
        self.module = module.to(self._device)
        self._tied = model.tied_weight if isinstance(model, Stage) else None
        self._wire = dist.new_group(
            dist.get_process_group_ranks(process_group or dist.group.WORLD),
            backend="nccl" if self._device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=patience_s),
            use_local_synchronization=True,
        )
        rank = self.group.rank
        self.before = None if self.group.is_first else BoundaryEnd(self.compression, salt=2 * rank - 1)
        self.after = None if self.group.is_last else BoundaryEnd(self.compression, salt=2 * rank)
        self.ledger = Ledger()
        self._schedules: dict[tuple[Any, ...], tuple[CompressedStage, Any]] = {}

    def parameters(self) -> Iterator[nn.Parameter]:
        """This stage's parameters, for its optimizer."""
        return self.module.parameters()

    # --- steps -------------------------------------------------------------------------------------------

    def step(
        self, inputs: Tensor, targets: Tensor, *, sample_ids: Sequence[int] | Tensor | None = None
    ) -> float | None:
        """Forward and backward of one batch; gradients add up as `backward` does. Every rank must call it
        with the same batch.

        Args:
            inputs: (samples, …), of which the first stage's are used.
            targets: (samples, …), of which the last stage's are used.
            sample_ids: a number for each sample, the same whenever it is visited; needed for changes.

        Returns:
            The batch's mean loss on the last rank, None on others.

        Raises:
            DeviceError: a rank is gone.
            TimeoutExpired: a rank did not answer within the patience.
        """
        ids = self._checked_ids(inputs, targets, sample_ids)
        parts = micro_batches(len(inputs), self._num_micro_batches)
        stage, schedule = self._schedule_for(inputs, parts, trains=True)
        self.module.train()
        size = len(ids) // parts
        stage.begin([ids[start : start + size] for start in range(0, len(ids), size)])
        with self._added_to_gradients(), gradients_summed(self._tied, self.group, self.ledger):
            return self._run(stage, schedule.step, inputs, targets)

    def evaluate(self, inputs: Tensor, targets: Tensor) -> float | None:
        """The mean loss of a batch in full precision, on the last rank; nothing is remembered."""
        self._checked_ids(inputs, targets, range(len(inputs)))
        parts = micro_batches(len(inputs), self._num_micro_batches)
        stage, schedule = self._schedule_for(inputs, parts, trains=False)
        self.module.eval()
        with torch.no_grad():
            return self._run(stage, schedule.eval, inputs, targets)

    def clip_gradients(self, max_norm: float) -> float:
        """Scale all stages' gradients so that their common norm is at most `max_norm`; returns what it was.
        All ranks must call it.

        Differs: the original clips each stage by its own norm, which trains another model for each number
        of stages.
        """
        gradients = [each.grad for each in self.parameters() if each.grad is not None]
        counted = [each for each in gradients if self._tied is None or each is not self._tied.grad]
        if self._tied is not None and self._tied.grad is not None and self.group.is_first:
            counted.append(self._tied.grad)  # both copies have it; it counts once
        own = sum(float(each.double().square().sum()) for each in counted)
        norm = float(sum(self.group.gather(own)) ** 0.5)
        if norm > max_norm:
            for each in gradients:
                each.mul_(max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        return norm

    def _run(
        self, stage: "CompressedStage", run: Callable[..., Any], inputs: Tensor, targets: Tensor
    ) -> float | None:
        losses: list[Tensor] | None = [] if self.group.is_last else None
        own = (inputs.to(self._device),) if self.group.is_first else ()
        target = targets.to(self._device) if self.group.is_last else None
        with self._losses_named(stage):
            run(*own, target=target, losses=losses, return_outputs=False)
        return None if losses is None else float(torch.stack(losses).detach().mean())

    @contextmanager
    def _added_to_gradients(self) -> Iterator[None]:
        """Gradients of earlier steps stay aside meanwhile: torch's schedules divide by the number of
        micro-batches whatever is there at their end."""
        earlier = [(each, each.grad) for each in self.parameters() if each.grad is not None]
        for parameter, _ in earlier:
            parameter.grad = None
        yield
        for parameter, gradient in earlier:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    @contextmanager
    def _losses_named(self, stage: "CompressedStage") -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if stage.is_computing:  # the model's own
                raise
            has_expired = time.monotonic() - stage.waiting_since_s >= self.group.patience_s
            raise self.group.loss_of(stage.peer, "pipeline step", has_expired=has_expired) from error
        finally:
            stage.stop_waiting()

    def _schedule_for(self, inputs: Tensor, parts: int, *, trains: bool) -> "tuple[CompressedStage, Any]":
        key = (*inputs.shape, inputs.dtype, parts, trains)
        if key not in self._schedules:
            self._schedules[key] = self._new_schedule(inputs[: len(inputs) // parts], parts)
        return self._schedules[key]

    def _new_schedule(self, inputs: Tensor, parts: int) -> "tuple[CompressedStage, Any]":
        from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

        from capstan.pipelining.stage import CompressedStage

        passed = [inputs, *self._shapes.outputs(inputs)]
        stage = CompressedStage(
            self.module,
            group=self.group,
            wire=self._wire,
            device=self._device,
            inputs=passed[self.group.rank],
            outputs=passed[self.group.rank + 1],
            before=self.before,
            after=self.after,
            ledger=self.ledger,
        )

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            with stage.computing():
                return self._loss(outputs, targets)

        is_1f1b = self._schedule == "1f1b" and parts >= self.group.size
        return stage, (Schedule1F1B if is_1f1b else ScheduleGPipe)(stage, parts, loss_fn=loss)

    def _checked_ids(
        self, inputs: Tensor, targets: Tensor, sample_ids: Sequence[int] | Tensor | None
    ) -> list[int]:
        self._refuse_other_precision()
        if isinstance(self.module, Stage):
            _check_tokens(inputs, self.module.cut)
        if len(inputs) != len(targets) or len(inputs) == 0:
            raise InputError(f"A batch has a target for each sample, found {len(targets)} for {len(inputs)}.")
        if sample_ids is None:
            if self.compression.sends_changes:
                raise UsageError(
                    "Changes are sent by sample: give sample_ids, a number for each sample that is the same "
                    "whenever it is visited, or switch changes off."
                )
            return [0] * len(inputs)
        ids = [int(each) for each in sample_ids]
        if len(ids) != len(inputs):
            raise InputError(f"There are {len(inputs)} samples and {len(ids)} sample ids. Give one for each.")
        return ids

    def _refuse_other_precision(self) -> None:
        """What would train something else, in silence or with an error that names nothing."""
        if torch.is_autocast_enabled(self._device.type):
            raise UsageError(
                "A pipeline is not run under autocast: what passes between stages would have another dtype "
                "than was agreed. Leave autocast off."
            )
        if any(getattr(each, "gradient_checkpointing", False) for each in self.module.modules()):
            raise UnsupportedModel(
                "transformers' gradient checkpointing would compute a stage again without what came into it. "
                "Call the model's gradient_checkpointing_disable()."
            )

    # --- what boundaries hold ----------------------------------------------------------------------------

    def repair(self) -> list[int]:
        """Compare what the ends of every boundary hold, by a checksum. All ranks must call it.

        Returns:
            The boundaries (0 is between stages 0 and 1) that differed. Both ends have forgotten what they
            held, so that every sample's next visit is in full.
        """
        own = [None if end is None else [end.num_held, end.digest()] for end in (self.before, self.after)]
        ends = self.group.gather(own)
        broken = [index for index in range(self.group.size - 1) if ends[index][1] != ends[index + 1][0]]
        if self.after is not None and self.group.rank in broken:
            self.after.forget()
        if self.before is not None and self.group.rank - 1 in broken:
            self.before.forget()
        return broken

    def state_dict(self) -> dict[str, Any]:
        """This stage's weights and what its boundaries hold."""
        ends = {"before": self.before, "after": self.after}
        return {
            "module": self.module.state_dict(),
            **{name: end.state_dict() for name, end in ends.items() if end is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; all ranks must, from the same step."""
        self.module.load_state_dict(state["module"])
        for name, end in {"before": self.before, "after": self.after}.items():
            if end is not None:
                end.load_state_dict(state[name])


def _check_tokens(inputs: Tensor, cut: StageCut) -> None:
    """On every rank alike, so that none waits for one that has stopped."""
    if inputs.dim() != 2 or inputs.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"A language model takes token ids [samples, tokens], found {inputs.dtype} of shape "
            f"{list(inputs.shape)}."
        )
    if cut.max_positions is not None and inputs.shape[1] > cut.max_positions:
        raise InputError(
            f"The model has positions for {cut.max_positions} tokens, found {inputs.shape[1]}. Give shorter "
            "samples."
        )
    outside = inputs[(inputs < 0) | (inputs >= cut.table_shape[0])]
    if len(outside):
        raise InputError(
            f"{int(outside[0])} is no token of the model, whose ids are 0 to {cut.table_shape[0] - 1}. Use "
            "the model's own tokenizer."
        )


def _warn_of_dropout(model: nn.Module, compression: Compression) -> None:
    rates = dropout_rates(model) if compression.sends_changes else {}
    if rates:
        warnings.warn(
            f"Dropout ({', '.join(rates)}) makes a sample's activations differ at every visit, so that their "
            "changes never become small. Set its p to 0, or send activations directly (changes=False).",
            stacklevel=3,
        )
