"""What each rank does in the tests of pipelines."""

import json
import runpy
from pathlib import Path
from typing import Any

import torch
from torch import nn

import capstan.pipelining.stage  # noqa: F401  # imported late by a pipeline, here once for all ranks
import world
from capstan.errors import CapstanError
from capstan.pipelining import Compression, Pipeline, training
from capstan.pipelining.decoder import decoder, token_loss
from capstan.pipelining.settings import Settings
from capstan.pipelining.training import train

VOCABULARY, SEQUENCE, SAMPLES = 16, 8, 16
_FEW = {"forward_bits": 2, "backward_bits": 4}


def script(path: str) -> None:
    """A Python script, as `python path` runs it."""
    runpy.run_path(path, run_name="__main__")


def data(samples: int = SAMPLES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(VOCABULARY, (samples, SEQUENCE + 1), generator=generator)


def model() -> nn.Sequential:
    return decoder(vocabulary=VOCABULARY, sequence=SEQUENCE, dim=16, num_layers=4)


def batches(steps: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(SAMPLES, generator=generator)[:size] for _ in range(steps)]


def alone(steps: int, size: int, clip: float | None = None) -> tuple[list[float], list[torch.Tensor]]:
    """Training in one process: losses and weights."""
    whole, texts = model(), data()
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for ids in batches(steps, size):
        optimizer.zero_grad()
        loss = token_loss(whole(texts[ids, :-1]), texts[ids, 1:])
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(whole.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, [each.detach() for each in whole.parameters()]


def added_up() -> list[torch.Tensor]:
    """What three backwards leave in one process."""
    whole, texts = model(), data()
    for ids in batches(3, 8):
        token_loss(whole(texts[ids, :-1]), texts[ids, 1:]).backward()
    return [each.grad for each in whole.parameters() if each.grad is not None]


def exact(rank: int, size: int, arguments: dict[str, Any]) -> dict[str, Any]:
    texts = data()
    pipeline = Pipeline(
        model(), token_loss, num_micro_batches=4, schedule=arguments["schedule"], patience_s=60
    )
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for ids in batches(arguments["steps"], arguments["batch"]):
        optimizer.zero_grad()
        losses.append(pipeline.step(texts[ids, :-1], texts[ids, 1:]))
        if arguments.get("clip") is not None:
            pipeline.clip_gradients(arguments["clip"])
        optimizer.step()
    held_out = pipeline.evaluate(texts[:, :-1], texts[:, 1:])
    return {
        "losses": losses,
        "held out": held_out,
        "weights": [each.detach() for each in pipeline.parameters()],
        "bytes": {" ".join(key): size for key, size in pipeline.ledger.traffic.size_bytes.items()},
    }


def adding_up(rank: int, size: int, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Gradients of three steps without an optimizer's between them."""
    texts, pipeline = (
        data(),
        Pipeline(model(), token_loss, num_micro_batches=arguments["parts"], patience_s=60),
    )
    for ids in batches(3, 8):
        pipeline.step(texts[ids, :-1], texts[ids, 1:])
    return [each.grad for each in pipeline.parameters() if each.grad is not None]


def compressed(rank: int, size: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Some steps, then a restart of the buffers from what was saved, then some more."""
    texts = data()
    compression = Compression.of_bits(**arguments["compression"])

    def build() -> tuple[Pipeline, torch.optim.Optimizer]:
        pipeline = Pipeline(
            model(), token_loss, schedule=arguments["schedule"], compression=compression, patience_s=60
        )
        return pipeline, torch.optim.AdamW(pipeline.parameters(), lr=2e-3)

    pipeline, optimizer = build()
    losses, wire, digests = [], [], []
    for index, ids in enumerate(batches(arguments["steps"], arguments["batch"])):
        if index == arguments.get("restart_at"):
            states = pipeline.state_dict(), optimizer.state_dict()
            pipeline, optimizer = build()
            pipeline.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        before = pipeline.ledger.traffic
        optimizer.zero_grad()
        losses.append(pipeline.step(texts[ids, :-1], texts[ids, 1:], sample_ids=ids))
        optimizer.step()
        sent = pipeline.ledger.traffic - before
        wire.append({" ".join(key): size for key, size in sent.size_bytes.items()})
        digests.append([None if end is None else end.digest() for end in (pipeline.before, pipeline.after)])
    repaired = [pipeline.repair()]
    if arguments.get("spoil") and rank == 1:
        assert pipeline.before is not None
        pipeline.before.held(int(ids[0])).view(-1)[0] += 1
    repaired.append(pipeline.repair())
    repaired.append(pipeline.repair())
    return {"losses": losses, "wire": wire, "digests": digests, "repaired": repaired}


def losing(rank: int, size: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """The last rank is lost in the third step."""
    texts, ids = data(), torch.arange(SAMPLES)
    # Of a rank that is gone its neighbours know after 3 s; the others must not run out of patience before.
    patience_s = 6 if arguments["fate"] == "killed" else 3
    bits = Compression.of_bits(forward_bits=3, backward_bits=6)
    pipeline = Pipeline(model(), token_loss, compression=bits, patience_s=patience_s)
    step = 0
    try:
        for step in range(5):
            if step == 2 and rank == arguments["lost"]:
                if arguments["fate"] == "killed":
                    raise SystemExit(1)
                world.stop() if arguments["fate"] == "stopped" else world.stay()
            pipeline.step(texts[ids, :-1], texts[ids, 1:], sample_ids=ids)
    except CapstanError as error:
        return {"step": step, "error": f"{type(error).__name__}: {error}"}
    return {"step": step, "error": ""}


def wrong(rank: int, size: int, arguments: Any) -> list[str]:
    """What is refused, with its message."""
    tied = nn.Linear(4, 4)
    texts, found = data(), []

    def steps(pipeline: Pipeline, **more: Any) -> None:
        pipeline.step(texts[:4, :-1], texts[:4, 1:], **more)

    bits = Compression.of_bits(forward_bits=2, backward_bits=4)
    attempts = [
        lambda: Pipeline(nn.Sequential(nn.Linear(4, 4)), token_loss),
        lambda: Pipeline(nn.Sequential(tied, nn.Tanh(), nn.Linear(4, 4), tied), token_loss),
        lambda: Pipeline(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)), token_loss),
        lambda: Pipeline(nn.ModuleList([nn.Linear(4, 4)]), token_loss),  # type: ignore[arg-type]
        lambda: Pipeline(model(), token_loss, schedule="1f1c"),
        lambda: Pipeline(model(), token_loss, num_micro_batches=0),
        lambda: steps(Pipeline(model(), token_loss, compression=bits)),
        lambda: steps(Pipeline(model(), token_loss, compression=bits), sample_ids=[1]),
        lambda: steps(Pipeline(nn.Sequential(nn.Identity(), decoder(vocabulary=16, sequence=8)), token_loss)),
    ]
    for attempt in attempts:
        try:
            attempt()
            found.append("")
        except CapstanError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def trained(rank: int, size: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """The verb's run on this rank."""
    folder = Path(arguments["folder"]) if arguments["folder"] else None
    if arguments.get("spoil") and rank == 1:
        _spoil_after_second_epoch()
    found = train(Settings(**arguments["settings"]), folder)
    return found | {"trace": json.dumps(found["trace"])}


def _spoil_after_second_epoch() -> None:
    whole = training._epoch

    def spoilt(pipeline: Pipeline, optimizer: Any, settings: Settings, samples: Any, epoch: int) -> Any:
        found = whole(pipeline, optimizer, settings, samples, epoch)
        if epoch == 1:
            assert pipeline.before is not None
            pipeline.before.held(0).view(-1)[0] += 1
        return found

    training._epoch = spoilt


def converging(rank: int, size: int, arguments: dict[str, Any]) -> dict[str, float]:
    """Last losses on a noisy second-order Markov chain in full precision, as changes and directly."""
    vocabulary, dim, samples = (64, 64, 128) if arguments.get("large") else (8, 32, 32)
    sequence, epochs = (32 if arguments.get("large") else 16), arguments["epochs"]
    generator = torch.Generator().manual_seed(1234)
    table = torch.randint(vocabulary, (vocabulary, vocabulary), generator=generator)
    rows = torch.randint(vocabulary, (samples, sequence + 1), generator=generator)
    follows = torch.rand(samples, sequence + 1, generator=generator) < 0.9
    for at in range(2, sequence + 1):
        rows[:, at] = torch.where(follows[:, at], table[rows[:, at - 1], rows[:, at - 2]], rows[:, at])
    bits = {"forward_bits": 3, "backward_bits": 6} if arguments.get("large") else _FEW
    found = {}
    for name, compression in {
        "full": Compression(),
        "changes": Compression.of_bits(**bits),
        "direct": Compression.of_bits(**bits, changes=False),
    }.items():
        layers = 4 if arguments.get("large") else 2
        whole = decoder(vocabulary=vocabulary, sequence=sequence, dim=dim, num_layers=layers)
        pipeline = Pipeline(whole, token_loss, compression=compression, patience_s=60)
        optimizer = torch.optim.AdamW(pipeline.parameters(), lr=2e-3 if arguments.get("large") else 1e-2)
        shuffled = torch.Generator().manual_seed(1)
        losses: list[float] = []
        for _ in range(epochs):
            total = 0.0
            for ids in torch.randperm(samples, generator=shuffled).split(16):
                optimizer.zero_grad()
                total += (pipeline.step(rows[ids, :-1], rows[ids, 1:], sample_ids=ids) or 0.0) * len(ids)
                pipeline.clip_gradients(1.0)
                optimizer.step()
            losses.append(total / samples)
        found[name] = losses[-1]
        found.setdefault("at first", losses[0])
    return found
