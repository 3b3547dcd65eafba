"""What each rank does in the tests of pipelines over causal language models in Hugging Face format."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

# Imported late by a pipeline or by transformers, here once for all ranks.
import transformers.models.gemma2.modeling_gemma2
import transformers.models.llama.modeling_llama
import transformers.models.llama.tokenization_llama  # noqa: F401
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import capstan.cli
import capstan.pipelining.stage
from capstan.errors import CapstanError
from capstan.models import cut_causal_lm, load_stage
from capstan.pipelining import Compression, Pipeline
from capstan.pipelining.decoder import token_loss
from capstan.pipelining.settings import Settings
from capstan.pipelining.training import train

VOCABULARY, SEQUENCE, SAMPLES, HIDDEN = 48, 8, 16, 16


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1234)
    return torch.randint(VOCABULARY, (SAMPLES, SEQUENCE + 1), generator=generator)


def batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(SAMPLES, generator=generator)[:8] for _ in range(steps)]


def optimizer_of(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def script(path: str) -> None:
    """A Python script, as `python path` runs it."""
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")


def verb(*words: str) -> None:
    """The command line."""
    sys.exit(capstan.cli.main(list(words)))


def alone(
    folder: Path, steps: int, clip: float, visits: int = 1, rate: float = 0.1
) -> tuple[list[float], dict[str, Tensor]]:
    """Training in one process: losses and weights. Gradients of `visits` batches add up before a step."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    texts, losses, optimizer = data(), [], optimizer_of(whole.parameters(), rate)
    for at, ids in enumerate(batches(steps)):
        loss = token_loss(whole(texts[ids, :-1], use_cache=False).logits, texts[ids, 1:])
        loss.backward()
        losses.append(loss.item())
        if (at + 1) % visits == 0:
            nn.utils.clip_grad_norm_(whole.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses, {name: each.detach() for name, each in whole.named_parameters()}


def staged(rank: int, size: int, arguments: dict[str, Any]) -> dict[str, Any]:
    folder, texts, losses = Path(arguments["folder"]), data(), []
    compression = Compression.of_bits(**arguments["bits"], group_size=8) if "bits" in arguments else None
    stage = load_stage(folder, cut_causal_lm(folder, size)[rank])
    pipeline = Pipeline(
        stage,
        token_loss,
        num_micro_batches=arguments.get("parts", 2),
        schedule=arguments.get("schedule", "1f1b"),
        compression=compression,
        patience_s=60,
    )
    optimizer = optimizer_of(pipeline.parameters(), arguments.get("rate", 0.1))
    visits = arguments.get("visits", 1)
    for at, ids in enumerate(batches(arguments["steps"])):
        losses.append(pipeline.step(texts[ids, :-1], texts[ids, 1:], sample_ids=ids))
        if (at + 1) % visits == 0:
            pipeline.clip_gradients(arguments["clip"])
            optimizer.step()
            optimizer.zero_grad()
    return {
        "losses": losses,
        "weights": stage.tensors(),
        "tied": None if stage.tied_weight is None else stage.tied_weight.detach(),
        "bytes": {" ".join(key): size for key, size in pipeline.ledger.traffic.size_bytes.items()},
        "digests": [None if end is None else end.digest() for end in (pipeline.before, pipeline.after)],
    }


def trained(rank: int, size: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """The verb's run on this rank."""
    output = Path(arguments["output"]) if "output" in arguments else None
    found = train(Settings(**arguments["settings"]), None, output)
    return found | {"trace": json.dumps(found["trace"])}


def refused(rank: int, size: int, arguments: dict[str, Any]) -> list[str]:
    """What a pipeline over a language model is not run with, and a step after it."""
    folder, found = Path(arguments["folder"]), []
    stage = load_stage(folder, cut_causal_lm(folder, size)[rank])
    pipeline, texts = Pipeline(stage, token_loss, patience_s=60), data()[:4]

    def step(inputs: Tensor) -> None:
        pipeline.step(inputs, inputs)

    def under_autocast() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step(texts)

    def checkpointed() -> None:
        stage.model.gradient_checkpointing_enable()
        step(texts)

    for attempt in (
        lambda: step(texts.clamp(min=VOCABULARY)),
        lambda: step(texts - VOCABULARY),
        lambda: step(texts.float()),
        lambda: step(texts[0]),
        lambda: step(texts.repeat(1, 3)),
        under_autocast,
        checkpointed,
    ):
        try:
            attempt()
            found.append("")
        except CapstanError as error:
            found.append(f"{type(error).__name__}: {error}")
    stage.model.gradient_checkpointing_disable()
    step(texts)
    return found


def confused(rank: int, size: int, arguments: dict[str, Any]) -> list[str]:
    """Stages that do not belong to their ranks."""
    folder, found = Path(arguments["folder"]), []
    cuts, more = cut_causal_lm(folder, size), cut_causal_lm(folder, size + 1)
    for cut in (cuts[0], cuts[size - 1 - rank], more[rank]):
        try:
            Pipeline(load_stage(folder, cut), token_loss, patience_s=60)
            found.append("")
        except CapstanError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found
