"""Does lm-evaluation-harness, run from outside, find with Capstan what it finds with transformers?

    python benchmarks/generation/harness_agreement.py --harness-python /path/to/env/bin/python --record NAME

Expected before the run: the same accuracy for the harness's own Hugging Face model, for `--model capstan`,
for its `local-completions` against `capstan serve`, and for scores of the engine without any harness; no
choice's score further apart than the rounding of float32.

One task of four choices in a JSONL file of its own, three examples before each question; a Llama with random
weights and a tokenizer of its own. The harness is in an environment of its own, with torch and transformers.
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

import torch
from serving_programs import served

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.generation import Engine
from capstan.hardware import this_machine
from record import RECORDS, write_record

ROOT = Path(__file__).parents[2]
CONTEXT = 512
# A sum of a few float32 log-probabilities of this model, computed in another order.
ROUNDING = 1e-3
_TASK = """task: rigging
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: 3
fewshot_config:
  sampler: first_n
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--harness-python", type=Path, required=True, help="where lm_eval is installed")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--record", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, task = Path(work) / "rigging", Path(work) / "tasks"
        documents = write_task(task, options.questions)
        write_model(folder, documents, hidden=options.hidden, layers=options.layers)
        harness = Harness(options.harness_python, task)
        runs = {"transformers": harness.run("hf", f"pretrained={folder},dtype=float32", "--device", "cpu")}
        runs["adapter"] = harness.run("capstan", f"pretrained={folder}", "--device", "cpu")
        with served(folder, longest=CONTEXT) as program:
            where = (
                f"model=rigging,base_url={program.url}/v1/completions,tokenizer={folder},num_concurrent=16"
            )
            runs["server"] = harness.run("local-completions", f"{where},max_length={CONTEXT}")
        runs["engine"] = score_directly(folder, runs["transformers"]["asked"])
    report(runs, options)


# --- the task and the model ------------------------------------------------------------------------------


def write_task(folder: Path, count: int) -> list[dict[str, Any]]:
    """Sums with four answers, one of them right."""
    chance = random.Random(4)
    folder.mkdir()
    documents = []
    for _ in range(count):
        ropes, bars = chance.randrange(100), chance.randrange(100)
        wrong = chance.sample([number for number in range(200) if number != ropes + bars], 3)
        choices = [str(number) for number in chance.sample([ropes + bars, *wrong], 4)]
        documents.append(
            {
                "question": f"{ropes} ropes and {bars} bars lie on deck. How many things are that?",
                "choices": choices,
                "answer": choices.index(str(ropes + bars)),
            }
        )
    data = folder / "rigging.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "rigging.yaml").write_text(_TASK.format(data=data))
    return documents


def write_model(folder: Path, documents: list[dict[str, Any]], *, hidden: int, layers: int) -> None:
    """A Llama with random weights, whose tokenizer knows the task's words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [f"Question: {each['question']}\nAnswer: 42" for each in documents], trainer
    )
    torch.manual_seed(4)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=600,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    with torch.no_grad():  # as initialised, every token would follow itself
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if parameter.dim() > 1 else 0.02)
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)


# --- four ways to the same figures -----------------------------------------------------------------------


class Harness:
    """lm-evaluation-harness in its own environment."""

    def __init__(self, python: Path, task: Path) -> None:
        self._python, self._task = python, task

    def run(self, model: str, arguments: str, *more: str) -> dict[str, Any]:
        """Accuracy, each question's scores, and seconds."""
        output = self._task.parent / f"out-{model}"
        words = ["run", "--model", model, "--model_args", arguments, "--tasks", "rigging"]
        words += ["--include_path", str(self._task), "--output_path", str(output), "--log_samples"]
        words += ["--batch_size", "16", *more]
        module = "capstan.generation.harness" if model == "capstan" else "lm_eval"
        start_s = time.perf_counter()
        done = subprocess.run(
            [str(self._python), "-m", module, *words],
            env=os.environ
            | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start_s
        if done.returncode:
            raise SystemExit(f"{model}: {done.stdout[-1000:]}{done.stderr[-3000:]}")
        (results,) = output.rglob("results*.json")
        (samples,) = output.rglob("samples*.jsonl")
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        return {
            "accuracy": json.loads(results.read_text())["results"]["rigging"]["acc,none"],
            "scores": [[float(choice[0][0]) for choice in line["resps"]] for line in lines],
            "right": [int(line["target"]) for line in lines],
            "asked": [[list(each.values()) for each in line["arguments"].values()] for line in lines]
            if isinstance(lines[0]["arguments"], dict)
            else [line["arguments"] for line in lines],
            "seconds": seconds,
        }


def score_directly(folder: Path, asked: list[list[list[str]]]) -> dict[str, Any]:
    """The same questions through `Engine.score`, without a harness."""
    start_s = time.perf_counter()
    with Engine.open(folder, device="cpu") as engine:
        tokenizer = engine.model.tokenizer
        pairs = [(context, context + choice) for question in asked for context, choice in question]
        texts = [tokenizer.encode(text) for _, text in pairs]
        found = engine.score(texts)
    sums = [
        sum(score.logprobs[len(tokenizer.encode(context)) - 1 :])
        for (context, _), score in zip(pairs, found, strict=True)
    ]
    scores = [sums[first : first + 4] for first in range(0, len(sums), 4)]
    return {"scores": scores, "seconds": time.perf_counter() - start_s}


# --- what came of it -------------------------------------------------------------------------------------


def report(runs: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    reference = runs["transformers"]
    runs["engine"]["accuracy"] = accuracy(runs["engine"]["scores"], reference["right"])
    for name, run in runs.items():
        run["furthest"] = max(
            abs(one - other)
            for own, theirs in zip(run["scores"], reference["scores"], strict=True)
            for one, other in zip(own, theirs, strict=True)
        )
        print(f"{name:14} {run['accuracy']:.4f}  {run['furthest']:.2e}  {run['seconds']:.1f} s")
    if options.record is None:
        return
    furthest = max(run["furthest"] for run in runs.values())
    same = all(run["accuracy"] == reference["accuracy"] for run in runs.values())
    figures = {
        f"{name}, {what}": {"value": run[what], "unit": unit}
        for name, run in runs.items()
        if name != "transformers"
        for what, unit in (("accuracy", ""), ("furthest", "nats from transformers"), ("seconds", "s"))
    }
    write_record(
        options.record,
        claim="lm-evaluation-harness finds with the adapter and with the server what it finds with "
        "transformers, and the engine without a harness too",
        machine=this_machine(),
        figures=figures,
        peers={"lm_eval 0.4 --model hf": {what: reference[what] for what in ("accuracy", "seconds")}},
        bound={"formula": "equal accuracies", "value": reference["accuracy"]},
        bars={
            "equal accuracies": {"goal": True, "reached": same, "holds": same},
            "scores within rounding": {"goal": ROUNDING, "reached": furthest, "holds": furthest <= ROUNDING},
        },
        folder=RECORDS,
        unfair="seconds are of whole programs, starting Python and loading included, once each; the "
        "few-shot prefix is not shared by any of them",
    )


def accuracy(scores: list[list[float]], right: list[int]) -> float:
    return sum(own.index(max(own)) == answer for own, answer in zip(scores, right, strict=True)) / len(right)


if __name__ == "__main__":
    main()
