"""What does a file of many short lines cost, beside a plain batched loop of transformers, and is memory flat?

    python benchmarks/generation/many_lines.py --lines 20000 --record generation-many-lines

Expected before the run (2 AVX2 cores, one thread each, a Llama of some ten thousand parameters, prompts of 8
to 39 tokens, 16 new ones): the arithmetic is nothing, so what is measured is Python, with start and journal.
The loop sorts all prompts by length and pads to the left, 256 at a time, which needs no slots, plan, text or
journal: at most 3 times its seconds. Memory holds what is asked and what is answered, some KB a line: at most
5 KB for each line more.

Both get the same model and lines, each in a process of its own, one after the other. Answers are compared:
greedy ones of padded and of packed prompts may differ where two tokens are nearly as likely.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.hardware import this_machine
from record import write_record

VOCABULARY, NEW, AT_ONCE = 300, 16, 256
GOALS = {"times the loop's seconds": 3.0, "KB for each line more": 5.0, "share of equal answers": 0.999}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--record", default=None)
    parser.add_argument("--loop", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop is not None:
        loop(options.loop)
        return
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_model(folder / "model", options)
        few = write_lines(folder, options.lines // 4)
        few_run, _ = answered_by_capstan(folder, few)
        lines = write_lines(folder, options.lines)
        own, answers = answered_by_capstan(folder, lines)
        peer, wanted = answered_by_loop(folder)
    equal = sum(answers[name] == wanted[name] for name in wanted) / len(wanted)
    growth = 1e3 * (own["peak memory"] - few_run["peak memory"]) / (options.lines - len(few))
    report(own, peer, growth, equal, options)


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """A Llama with random weights, each of whose tokens is a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_lines(folder: Path, count: int) -> list[dict[str, Any]]:
    chance = random.Random(1)
    lines = [
        {
            "custom_id": f"line {number}",
            "prompt": [chance.randrange(3, VOCABULARY) for _ in range(chance.randrange(8, 40))],
            "max_tokens": NEW,
            "ignore_eos": True,
        }
        for number in range(count)
    ]
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


# --- measuring -------------------------------------------------------------------------------------------


def timed(command: list[str]) -> dict[str, float]:
    """Seconds and the most memory of a command in a process of its own."""
    before_s = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - before_s, "peak memory": usage.ru_maxrss * 1024 / 1e6}


def answered_by_capstan(folder: Path, lines: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """What it took, and the words of each answer."""
    output = folder / f"answers-{len(lines)}.jsonl"
    given = ["--model", str(folder / "model"), "--input", str(folder / "lines.jsonl"), "--device", "cpu"]
    run = timed([sys.executable, "-m", "capstan", "generate", *given, "--output", str(output)])
    with output.open() as file:
        done = {each["custom_id"]: each["response"]["body"] for each in map(json.loads, file)}
    return run, {name: body["choices"][0]["text"].split() for name, body in done.items()}


def answered_by_loop(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    run = timed([sys.executable, __file__, "--loop", str(folder)])
    return run, json.loads((folder / "loop.json").read_text())


def loop(folder: Path) -> None:
    """What one would write without an engine."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    lines = [json.loads(line) for line in (folder / "lines.jsonl").open()]
    lines.sort(key=lambda line: len(line["prompt"]))
    answers = {}
    for start in range(0, len(lines), AT_ONCE):
        some = lines[start : start + AT_ONCE]
        widest = max(len(line["prompt"]) for line in some)
        padding = [widest - len(line["prompt"]) for line in some]
        prompts = [[0] * before + line["prompt"] for before, line in zip(padding, some, strict=True)]
        mask = [[0] * before + [1] * (widest - before) for before in padding]
        with torch.inference_mode():
            found = model.generate(
                torch.tensor(prompts),
                attention_mask=torch.tensor(mask),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        for line, tokens in zip(some, found[:, widest:].tolist(), strict=True):
            answers[line["custom_id"]] = [f"w{token}" for token in tokens]
    (folder / "loop.json").write_text(json.dumps(answers))


# --- what came of it -------------------------------------------------------------------------------------


def report(
    own: dict[str, float], peer: dict[str, float], growth: float, equal: float, options: argparse.Namespace
) -> None:
    ratio = own["seconds"] / peer["seconds"]
    reached = dict(zip(GOALS, (ratio, growth, equal), strict=True))
    print(f"capstan {own}, loop {peer}, {reached}")
    if options.record is None:
        return
    units = {"seconds": "s", "peak memory": "MB"}
    write_record(
        options.record,
        claim=f"{options.lines} short lines take at most 3 times a batched loop's seconds, in flat memory",
        machine=this_machine(),
        figures={name: {"value": value, "unit": units[name]} for name, value in own.items()}
        | {name: {"value": value, "unit": ""} for name, value in reached.items()},
        peers={"a batched loop of transformers": peer},
        bound={"formula": "the same arithmetic, without padding", "value": 1.0},
        bars={
            name: {
                "goal": goal,
                "reached": reached[name],
                "holds": reached[name] >= goal if name.startswith("share") else reached[name] <= goal,
            }
            for name, goal in GOALS.items()
        },
        unfair="a model of some ten thousand parameters: what is compared is Python; one thread each",
    )


if __name__ == "__main__":
    main()
