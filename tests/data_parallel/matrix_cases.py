"""Training loops as people write them, for test_loop_matrix.py; training_faces.py says who trains there."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from capstan.transport import Group
from training_faces import AVERAGES_GRADIENTS, Face

STEPS = 6


# --- models ----------------------------------------------------------------------------------------------


def inputs_of(rank: int, step: int, width: int = 8) -> torch.Tensor:
    return torch.randn(16, width, generator=torch.Generator().manual_seed(100 * step + rank))


def small(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *more, nn.Tanh(), nn.Linear(16, 2))


class Parts(nn.Module):
    """A trunk, and named parts that `forward` puts together."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.put_together = nn.ModuleDict(parts), forward

    def forward(self, *inputs: Any) -> Any:
        return self.put_together(self.parts, *inputs)


def layers(count: int, width: int = 8) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {f"layer{at}": nn.Linear(width, width) for at in range(count)}


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    return (outputs.float() - 0.3).pow(2).mean()


def train(
    rank: int,
    face: Face,
    model: nn.Module,
    *,
    step_of: Callable[[Any, Any, int], None] | None = None,
    inputs: Callable[[int, int], Any] = inputs_of,
    **ddp: Any,
) -> list[nn.Module]:
    """Six steps; `step_of` makes gradients in place of one forward and backward pass."""
    optimizer = face.optimizer(model.parameters())
    trained = face.wrap(model, optimizer, **ddp)
    for step in range(STEPS):
        optimizer.zero_grad()
        if step_of is None:
            loss_of(trained(inputs(rank, step))).backward()
        else:
            step_of(trained, optimizer, step)
        optimizer.step()
    return [model]


# --- loops -----------------------------------------------------------------------------------------------


def plain(rank: int, face: Face) -> Any:
    return train(rank, face, small())


def accumulated(rank: int, face: Face) -> Any:
    def step_of(trained: Any, _: Any, step: int) -> None:
        for part in range(3):
            loss_of(trained(inputs_of(rank, 10 * step + part))).backward()

    return train(rank, face, small(), step_of=step_of)


def accumulated_without_sync(rank: int, face: Face) -> Any:
    def step_of(trained: Any, _: Any, step: int) -> None:
        for part in range(3):
            with trained.no_sync() if part < 2 else nullcontext():
                loss_of(trained(inputs_of(rank, 10 * step + part))).backward()

    return train(rank, face, small(), step_of=step_of)


def clipped_by_norm(rank: int, face: Face) -> Any:
    def step_of(trained: Any, _: Any, step: int) -> None:
        loss_of(trained(inputs_of(rank, step))).backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 0.1)

    return train(rank, face, small(), step_of=step_of)


def clipped_by_value(rank: int, face: Face) -> Any:
    def step_of(trained: Any, _: Any, step: int) -> None:
        loss_of(trained(inputs_of(rank, step))).backward()
        nn.utils.clip_grad_value_(trained.parameters(), 0.01)

    return train(rank, face, small(), step_of=step_of)


def autocast(rank: int, face: Face) -> Any:
    def step_of(trained: Any, _: Any, step: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(trained(inputs_of(rank, step)))
        loss.backward()

    return train(rank, face, small(), step_of=step_of)


def scaled(rank: int, face: Face) -> Any:
    """A GradScaler whose scale doubles at every step, clipping between."""
    model = small()
    optimizer = face.optimizer(model.parameters())
    trained = face.wrap(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(trained(inputs_of(rank, step)))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    return [model]


def tied(rank: int, face: Face) -> Any:
    parts = layers(2)
    parts["layer1"].weight = parts["layer0"].weight  # type: ignore[assignment]
    return train(rank, face, Parts(lambda p, x: p["layer1"](torch.tanh(p["layer0"](x))), **parts))


def frozen(rank: int, face: Face) -> Any:
    model = small()
    model[0].requires_grad_(False)
    return train(rank, face, model)


def frozen_later(rank: int, face: Face) -> Any:
    model = small()

    def step_of(trained: Any, _: Any, step: int) -> None:
        if step == 3:
            model[0].requires_grad_(False)
        loss_of(trained(inputs_of(rank, step))).backward()

    return train(rank, face, model, step_of=step_of, find_unused_parameters=True)


def unused(rank: int, face: Face) -> Any:
    parts = layers(3)
    model = Parts(lambda p, x, at: p[f"layer{at}"](torch.tanh(p["layer0"](x))), **parts)

    def step_of(trained: Any, _: Any, step: int) -> None:
        loss_of(trained(inputs_of(rank, step), 1 + (step // 3))).backward()

    return train(rank, face, model, step_of=step_of, find_unused_parameters=True)


def unused_on_one_rank(rank: int, face: Face) -> Any:
    model = Parts(lambda p, x, at: p[f"layer{at}"](torch.tanh(p["layer0"](x))), **layers(3))

    def step_of(trained: Any, _: Any, step: int) -> None:
        loss_of(trained(inputs_of(rank, step), 1 + (step + rank) % 2)).backward()

    return train(rank, face, model, step_of=step_of, find_unused_parameters=True)


def called_twice(rank: int, face: Face) -> Any:
    return train(rank, face, Parts(lambda p, x: p["layer0"](torch.tanh(p["layer0"](x))), **layers(1)))


def forward_twice(rank: int, face: Face) -> Any:
    """Two forward passes before one backward pass, as contrastive losses have them."""

    def step_of(trained: Any, _: Any, step: int) -> None:
        one, other = trained(inputs_of(rank, step)), trained(inputs_of(rank, 50 + step))
        loss_of(one - other).backward()

    return train(rank, face, small(), step_of=step_of)


def checkpointed(rank: int, face: Face) -> Any:
    def forward(parts: Any, inputs: torch.Tensor) -> torch.Tensor:
        for part in parts.values():
            inputs = checkpoint(part, inputs, use_reentrant=False)
        return inputs

    return train(rank, face, Parts(forward, **layers(3)))


def checkpointed_reentrant(rank: int, face: Face) -> Any:
    uses_reentrant = not face.is_definition  # DDP refuses it

    def forward(parts: Any, inputs: torch.Tensor) -> torch.Tensor:
        inputs = inputs.requires_grad_()
        for part in parts.values():
            inputs = checkpoint(part, inputs, use_reentrant=uses_reentrant)
        return inputs

    return train(rank, face, Parts(forward, **layers(3)))


def compiled(rank: int, face: Face) -> Any:
    return train(rank, face, torch.compile(small(), backend="eager"))


def compiled_outside(rank: int, face: Face) -> Any:
    model = small()
    optimizer = face.optimizer(model.parameters())
    trained = torch.compile(face.wrap(model, optimizer), backend="eager")
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(trained(inputs_of(rank, step))).backward()
        optimizer.step()
    return [model]


def two_optimizers(rank: int, face: Face) -> Any:
    model = small()
    first = face.optimizer(model[0].parameters())
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    trained = face.wrap(model, first)
    for step in range(STEPS):
        model.zero_grad()
        loss_of(trained(inputs_of(rank, step))).backward()
        second.step()
        first.step()
    return [model]


def parameter_groups(rank: int, face: Face) -> Any:
    model = small()
    groups = [{"params": model[0].parameters(), "lr": 0.02, "weight_decay": 0.1}]
    optimizer = face.optimizer([*groups, {"params": model[2].parameters()}])
    trained = face.wrap(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(trained(inputs_of(rank, step))).backward()
        optimizer.step()
    return [model]


def group_added_later(rank: int, face: Face) -> Any:
    model = small()
    optimizer = face.optimizer(model[0].parameters())
    trained = face.wrap(model, optimizer)
    for step in range(STEPS):
        if step == 2:
            optimizer.add_param_group({"params": list(model[2].parameters())})
        model.zero_grad()
        loss_of(trained(inputs_of(rank, step))).backward()
        optimizer.step()
    return [model]


def closure(rank: int, face: Face) -> Any:
    """LBFGS, which calls its closure as often as it likes, with a fixed number of iterations."""
    model = small()
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=0.05, max_iter=3, tolerance_grad=0, tolerance_change=0
    )
    trained = face.wrap(model, optimizer)
    for step in range(3):

        def calculated(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(trained(inputs_of(rank, step)))
            loss.backward()
            return loss

        optimizer.step(calculated)
    return [model]


def scheduled(rank: int, face: Face) -> Any:
    model = small()
    optimizer = face.optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 1)
    trained = face.wrap(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(trained(inputs_of(rank, step))).backward()
        optimizer.step()
        schedule.step()
    return [model]


def moving_average(rank: int, face: Face) -> Any:
    model = small()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    optimizer = face.optimizer(model.parameters())
    trained = face.wrap(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(trained(inputs_of(rank, step))).backward()
        optimizer.step()
        average.update_parameters(model)
    return [model, average.module]


def adversaries(rank: int, face: Face) -> Any:
    """A GAN's loop: the generator's step freezes the critic, whose own step sees detached samples."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    moves = [face.optimizer(each.parameters()) for each in (generator, critic)]
    making, judging = (face.wrap(each, move) for each, move in zip((generator, critic), moves, strict=True))
    for step in range(STEPS):
        made = making(inputs_of(rank, step))
        critic.requires_grad_(True)
        moves[1].zero_grad()
        (judging(made.detach()).mean() - judging(inputs_of(rank, 70 + step)).mean()).backward()
        moves[1].step()
        critic.requires_grad_(False)
        moves[0].zero_grad()
        (critic(made).pow(2).mean() + made.pow(2).mean()).backward()
        moves[0].step()
    return [generator, critic]


def penalised(rank: int, face: Face) -> Any:
    """A gradient penalty: `torch.autograd.grad` through the model before the backward pass."""

    def step_of(trained: Any, _: Any, step: int) -> None:
        inputs = inputs_of(rank, step).requires_grad_()
        outputs = trained(inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        (loss_of(outputs) + slope.pow(2).mean()).backward()

    return train(rank, face, small(), step_of=step_of)


def measured(rank: int, face: Face) -> Any:
    """`torch.autograd.grad` of a parameter, for a report, before the backward pass."""
    model = small()

    def step_of(trained: Any, _: Any, step: int) -> None:
        loss = loss_of(trained(inputs_of(rank, step)))
        torch.autograd.grad(loss, model[0].weight, retain_graph=True)
        loss.backward()

    return train(rank, face, model, step_of=step_of)


def kept(rank: int, face: Face) -> Any:
    """Gradients that a program keeps do not change."""
    model, found = small(), []

    def step_of(trained: Any, _: Any, step: int) -> None:
        loss_of(trained(inputs_of(rank, step))).backward()
        found.append(model[0].weight.grad)

    train(rank, face, model, step_of=step_of)
    return [model, torch.stack(found)]


def zeroed_in_place(rank: int, face: Face) -> Any:
    model = small()
    optimizer = face.optimizer(model.parameters())
    trained = face.wrap(model, optimizer)
    for step in range(STEPS):
        loss_of(trained(inputs_of(rank, step))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return [model]


def zeroed_between(rank: int, face: Face) -> Any:
    def step_of(trained: Any, optimizer: Any, step: int) -> None:
        loss = loss_of(trained(inputs_of(rank, step)))
        optimizer.zero_grad()
        loss.backward()

    return train(rank, face, small(), step_of=step_of)


def loaded_after(rank: int, face: Face) -> Any:
    torch.manual_seed(5)
    other = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).state_dict()
    model = small()

    def step_of(trained: Any, _: Any, step: int) -> None:
        if step == 2:
            model.load_state_dict(other)
        loss_of(trained(inputs_of(rank, step))).backward()

    return train(rank, face, model, step_of=step_of)


def saved_and_loaded(rank: int, face: Face) -> Any:
    """States of the wrapped model and the optimizer, taken and loaded; their names are DDP's."""

    def step_of(trained: Any, optimizer: Any, step: int) -> None:
        state = copy.deepcopy(trained.state_dict())
        assert all(name.startswith("module.") for name in state)
        trained.load_state_dict(state)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loss_of(trained(inputs_of(rank, step))).backward()

    return train(rank, face, small(), step_of=step_of)


def evaluated_between(rank: int, face: Face) -> Any:
    """Unequally often, with gradients off, and on."""

    def step_of(trained: Any, _: Any, step: int) -> None:
        trained.eval()
        with torch.no_grad():
            for _ in range(rank + 1):
                trained(inputs_of(rank, 90))
        trained.module(inputs_of(rank, 91))
        trained.train()
        loss_of(trained(inputs_of(rank, step))).backward()

    return train(rank, face, small(nn.Dropout(0.0)), step_of=step_of)


def thrown_away(rank: int, face: Face) -> Any:
    """An exception between forward and backward, caught."""

    def step_of(trained: Any, _: Any, step: int) -> None:
        try:
            trained(inputs_of(rank, 60 + step))
            raise MemoryError("pretended")
        except MemoryError:
            loss_of(trained(inputs_of(rank, step))).backward()

    return train(rank, face, small(), step_of=step_of)


class Boom(torch.autograd.Function):
    """Raises in backward when told to."""

    is_on = False

    @staticmethod
    def forward(_: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        if Boom.is_on:
            raise MemoryError("pretended")
        return gradient


def raised_in_backward(rank: int, face: Face) -> Any:
    """Half way through a backward pass, on all ranks; caught, and gone on with the next batch."""
    model = Parts(lambda p, x: p["layer1"](Boom.apply(torch.tanh(p["layer0"](x)))), **layers(2))
    optimizer = face.optimizer(model.parameters())
    trained = face.wrap(model, optimizer)
    for step in range(STEPS):
        Boom.is_on = step == 3
        if Boom.is_on and face.is_definition:
            continue  # DDP does not survive it
        optimizer.zero_grad()
        try:
            loss_of(trained(inputs_of(rank, step))).backward()
        except MemoryError:
            continue
        optimizer.step()
    return [model]


def skipped(rank: int, face: Face) -> Any:
    """A backward pass without a step, on all ranks."""
    model = small()
    optimizer = face.optimizer(model.parameters())
    trained = face.wrap(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(trained(inputs_of(rank, step))).backward()
        if step != 3:
            optimizer.step()
    return [model]


def normed(rank: int, face: Face) -> Any:
    """A batch norm behind a biased layer, statistics and all."""
    return train(rank, face, small(nn.BatchNorm1d(16)))


def wrapped_first(rank: int, face: Face) -> Any:
    """DDP's usual order."""
    model = small()
    if face.is_definition and face.algorithm not in AVERAGES_GRADIENTS:
        return [model]
    trained = face.wrap(model)
    optimizer = face.optimizer(trained.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(trained(inputs_of(rank, step))).backward()
        optimizer.step()
    return [model]


def dropped_out(rank: int, face: Face) -> Any:
    """Each rank's own random numbers; wrapping draws none."""

    def step_of(trained: Any, _: Any, step: int) -> None:
        if step == 0:
            torch.manual_seed(rank)
        loss_of(trained(inputs_of(rank, step))).backward()

    return train(rank, face, small(nn.Dropout(0.5)), step_of=step_of)


def in_bfloat16(rank: int, face: Face) -> Any:
    return train(rank, face, small().bfloat16(), inputs=lambda rank, step: inputs_of(rank, step).bfloat16())


def in_float64(rank: int, face: Face) -> Any:
    return train(rank, face, small().double(), inputs=lambda rank, step: inputs_of(rank, step).double())


def in_two_types(rank: int, face: Face) -> Any:
    parts = layers(2)
    parts["layer1"].double()
    return train(rank, face, Parts(lambda p, x: p["layer1"](p["layer0"](x).double()), **parts))


def channels_last(rank: int, face: Face) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 2))

    def images(rank: int, step: int) -> torch.Tensor:
        return inputs_of(rank, step, 48).view(16, 3, 4, 4).contiguous(memory_format=torch.channels_last)

    return train(rank, face, model.to(memory_format=torch.channels_last), inputs=images)


def empty_batch(rank: int, face: Face) -> Any:
    """On one rank, whose loss is then a sum over nothing."""

    def step_of(trained: Any, _: Any, step: int) -> None:
        inputs = inputs_of(rank, step)
        trained(inputs[: 0 if (step + rank) % 2 else 16]).pow(2).sum().mul(0.01).backward()

    return train(rank, face, small(), step_of=step_of)


def several_outputs(rank: int, face: Face) -> Any:
    """A dictionary of outputs, of which the loss takes one."""
    model = Parts(lambda p, x: {"a": p["layer0"](x), "b": [p["layer1"](x), 3]}, **layers(2))

    def step_of(trained: Any, _: Any, step: int) -> None:
        loss_of(trained(inputs_of(rank, step))["b"][0]).backward()

    return train(rank, face, model, step_of=step_of, find_unused_parameters=True)


def hooked(rank: int, face: Face) -> Any:
    """A hook of the program's on a gradient."""
    model = small()
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    return train(rank, face, model)


def scalar_and_empty(rank: int, face: Face) -> Any:
    """Parameters of no dimension and of no elements."""
    model = Parts(lambda p, x: p["layer0"](x) * p["more"].scale + p["more"].nothing.sum(), **layers(1))
    model.parts["more"] = nn.Module()
    model.parts["more"].scale = nn.Parameter(torch.tensor(0.5))
    model.parts["more"].nothing = nn.Parameter(torch.zeros(0, 3))
    return train(rank, face, model)


def flat_loss(rank: int, face: Face) -> Any:
    """Gradients that are all 0."""

    def step_of(trained: Any, _: Any, step: int) -> None:
        trained(inputs_of(rank, step)).mul(0.0).sum().backward()

    return train(rank, face, small(), step_of=step_of)


LOOPS: dict[str, Callable[[int, Face], Any]] = {
    each.__name__: each
    for each in (
        plain, accumulated, accumulated_without_sync, clipped_by_norm, clipped_by_value, autocast, scaled,
        tied, frozen, frozen_later, unused, unused_on_one_rank, called_twice, forward_twice, checkpointed,
        checkpointed_reentrant, compiled, compiled_outside, two_optimizers, parameter_groups,
        group_added_later, closure, scheduled, moving_average, adversaries, penalised, measured, kept,
        zeroed_in_place, zeroed_between, loaded_after, saved_and_loaded, evaluated_between, thrown_away,
        raised_in_backward, skipped, normed, wrapped_first, dropped_out, in_bfloat16, in_float64,
        in_two_types, channels_last, empty_batch, several_outputs, hooked, scalar_and_empty, flat_loss,
    )
}  # fmt: skip


# --- a run -----------------------------------------------------------------------------------------------


def values_of(found: list[Any]) -> torch.Tensor:
    tensors: list[torch.Tensor] = []
    for each in found:
        tensors += list(each.state_dict().values()) if isinstance(each, nn.Module) else [each]
    return torch.cat([each.detach().double().reshape(-1) for each in tensors])


def one(rank: int, loop: str, kind: str, algorithm: str, group: Group) -> Any:
    """What training ends with, or what it was refused with."""
    face = Face(kind, algorithm, group)
    Boom.is_on = False
    torch.manual_seed(0)
    try:
        return values_of(LOOPS[loop](rank, face))
    except Exception as error:  # all runs are to be seen
        return f"{type(error).__name__}: {error}"
    finally:
        face.close()


def runs(rank: int, size: int, chosen: list[list[str]]) -> dict[str, Any]:
    """By loop and algorithm: what it is defined to be, without loss, and as it is by default."""
    group = Group(patience_s=20)
    found: dict[str, Any] = {}
    for loop, algorithm in chosen:
        kinds = ("exact", "algorithm") if algorithm == "async" else ("definition", "exact", "algorithm")
        found[f"{loop} {algorithm}"] = {kind: one(rank, loop, kind, algorithm, group) for kind in kinds}
    return found
