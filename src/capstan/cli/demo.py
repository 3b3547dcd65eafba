"""`capstan demo`: train a small model, then run it in far less memory than it needs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from capstan.cli.evaluate import run as evaluate
from capstan.cli.evaluation_table import comparison_table
from capstan.cli.generate import generate, quieten_transformers
from capstan.cli.progress import show_progress
from capstan.errors import require_extra

if TYPE_CHECKING:
    from capstan.generation import Score

NUM_PROMPTS = 64
# Little memory, and a placement by hand, so that every tier is used whatever this machine computes in.
DEVICE_MEMORY, HOST_MEMORY = "9MiB", "6MiB"
PLACE = ["weights=device:0.4,host:0.3,disk:0.3", "cache=host", "attention=host"]

FolderOption = Annotated[
    Path, typer.Option("--folder", help="Where the demo keeps its model and files; used again next time.")
]


def demo(folder: FolderOption = Path("demo")) -> None:
    """Show the main job on this machine: no GPU, no network and no data needed.

    Trains a small Llama-shaped model on CPython's own documentation, then answers 64 prompts with it under
    budgets so small that its weights lie on the device, the host and the disk and its KV cache on the host,
    at 16 and at 4 bits, and compares what the bits cost in perplexity and, instance by instance, in a small
    evaluation.
    """
    require_extra("generation", "torch", "transformers", "tokenizers")
    from capstan.cli import demo_model

    quieten_transformers()
    output = Console(highlight=False)
    folder.mkdir(parents=True, exist_ok=True)
    texts = demo_model.corpus()
    model = folder / "model"
    output.rule("1. a model, trained here")
    _trained(model, texts.training, output)
    prompts = folder / "prompts.jsonl"
    demo_model.write_prompts(prompts, texts.held_out, NUM_PROMPTS)
    for bits in (16, 4):
        output.rule(f"{2 if bits == 16 else 3}. {NUM_PROMPTS} prompts, weights in {bits} bits")
        _answered(model, prompts, folder, bits)
    _show_completions(prompts, folder, output)
    output.rule("4. what the bits cost: perplexity of documentation that the model has not seen")
    _show_perplexities(model, folder, texts.held_out, output)
    output.rule("5. the same instance by instance: a small evaluation at 16 and at 4 bits")
    _show_evaluation(model, folder, texts.held_out, output)


def _trained(model: Path, texts: Sequence[str], output: Console) -> None:
    from capstan.cli import demo_model

    if model.exists():
        output.print(f"{model} is there already; remove the folder to train it again.")
        return
    with show_progress("training", Console(stderr=True)) as report:
        loss = demo_model.train(
            model,
            list(texts),
            lambda step, steps, loss: report(step / steps, f"step {step}, loss {loss:.2f}"),
        )
    chance = math.log(demo_model.VOCABULARY)
    output.print(f"{model}: loss {loss:.2f} nats a token, where a model that knows nothing has {chance:.2f}.")


def _answered(model: Path, prompts: Path, folder: Path, bits: int) -> None:
    generate(
        model=model,
        input_file=prompts,
        output=folder / f"answers-{bits}.jsonl",
        device="auto",
        device_memory=DEVICE_MEMORY,
        host_memory=HOST_MEMORY,
        disk=folder / "scratch",
        weight_bits=bits,
        place=PLACE,
        overwrite=True,
    )


def _show_completions(prompts: Path, folder: Path, output: Console) -> None:
    asked = {line["custom_id"]: line["body"]["prompt"] for line in _lines(prompts)}
    table = Table("prompt", "16 bits", "4 bits", show_lines=True)
    answers = [
        {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in _lines(path)}
        for path in (folder / "answers-16.jsonl", folder / "answers-4.jsonl")
    ]
    for custom_id in list(asked)[:3]:
        table.add_row(
            *(text.strip()[:240] for text in (asked[custom_id], *(each[custom_id] for each in answers)))
        )
    output.print(table)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _show_perplexities(model: Path, folder: Path, texts: Sequence[str], output: Console) -> None:
    exact, quantised = (_perplexity(model, folder, texts, bits) for bits in (16, 4))
    table = Table("weights", "perplexity", "against 16 bits")
    table.add_row("16 bits", f"{exact:.3f}", "")
    table.add_row("4 bits", f"{quantised:.3f}", f"{quantised / exact - 1:+.2%}")
    output.print(table)


def _perplexity(model: Path, folder: Path, texts: Sequence[str], bits: int) -> float:
    """exp of the mean negative log-probability of a token given up to a window of tokens before it."""
    from capstan.cli.demo_model import CONTEXT
    from capstan.generation import Engine
    from capstan.generation.planning.batching import Length

    window = [Length(CONTEXT // 2, 1)]
    with Engine.open(model, disk=folder / "scratch", weight_bits=bits, lengths=window) as engine:
        tokens = [token for text in texts for token in engine.model.tokenizer(text)["input_ids"]]
        windows = [tokens[start : start + CONTEXT // 2] for start in range(0, len(tokens), CONTEXT // 2)]
        scores: list[Score] = engine.score(window for window in windows if len(window) > 1)
    logprobs = [logprob for score in scores for logprob in score.logprobs]
    return math.exp(-sum(logprobs) / len(logprobs))


def _show_evaluation(model: Path, folder: Path, texts: Sequence[str], output: Console) -> None:
    """Generated problems, and of the held-out texts their probability and which continuation belongs to a
    beginning, paired."""
    from capstan.cli.demo_model import write_choices, write_scenario
    from capstan.evaluation import compare_folders
    from capstan.evaluation.comparison import run_key

    own = [str(write(folder, texts)) for write in (write_scenario, write_choices)]
    outputs = [folder / f"evaluation-{bits}" for bits in (16, 4)]
    for bits, where in zip((16, 4), outputs, strict=True):
        evaluate(
            model=str(model), output=where, run_entry=own, suite="smoke", weight_bits=bits,
            disk=folder / "scratch",
        )  # fmt: skip
    reports = [path for where in outputs for path in where.rglob("capstan.json")]
    metrics = {run_key(path.parent.name): json.loads(path.read_text())["main_metric"] for path in reports}
    output.print("A is 16 bits, B is 4 bits; * marks an interval that leaves 0 out.")
    output.print(comparison_table(compare_folders(*outputs, metrics=metrics)))
