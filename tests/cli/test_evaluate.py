"""`capstan evaluate` as people run it, on a tiny model with a tokenizer, over two backends."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from capstan.cli.engine_model import EngineModel
from capstan.evaluation import Pair, Request
from capstan.evaluation.transformers_model import TransformersModel
from capstan.generation import Engine

TEXTS = [
    "A small crew hauls a great anchor out of the sea, round and round the capstan goes.",
    "The rope comes in hand over hand; one rope and eight bars make a small crew strong.",
    "Rules: X + Y | Y - X | Result: zebra + apple. Input: ( [ ] { } < > Target: Answer: 1, 2; 3, 4",
]


@pytest.fixture(scope="session")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("models") / "worded"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


PREFIX = TEXTS[0] + " " + TEXTS[1] + "\n"
REQUESTS = [
    Request(prompt=PREFIX + "The rope", max_tokens=4),
    Request(prompt=PREFIX + "A great anchor", max_tokens=3),
    Request(prompt="One rope", max_tokens=5),
]
PAIRS = [Pair(PREFIX + "Answer:", " strong"), Pair(PREFIX + "Answer:", " great anchor"), Pair("The", " sea")]


def test_shared_beginnings_change_nothing_but_the_work(worded):
    shared, alone = TransformersModel(worded), TransformersModel(worded, shares_prefixes=False)
    for one, other in zip(sorted(shared.generate(REQUESTS)), sorted(alone.generate(REQUESTS)), strict=True):
        assert one[1].completions[0].text == other[1].completions[0].text
    a, b = dict(shared.score(PAIRS)), dict(alone.score(PAIRS))
    for at in a:
        assert a[at].num_scored == b[at].num_scored
        # Sums of some ten float32 terms, in another order.
        assert a[at].logprob == pytest.approx(b[at].logprob, abs=1e-4)


def test_log_probabilities_are_those_of_the_raw_logits_also_when_greedy(worded):
    model = TransformersModel(worded)
    result = dict(model.generate(REQUESTS))[2]
    ids = model.encode(REQUESTS[2].prompt)
    with torch.no_grad():
        logits = model._model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    first = result.completions[0].tokens[0]
    assert first.logprob == pytest.approx(float(logits.max()), abs=1e-4)
    assert first.logprob < -0.01  # HELM's own client says 0.0 here


def test_engine_and_transformers_answer_alike(worded, small_machine):
    model = TransformersModel(worded)
    with Engine.open(worded, device="cpu", device_memory="64MiB", host_memory="64MiB") as engine:
        ours = EngineModel(engine, bits="16")
        answers, scores = dict(ours.generate(REQUESTS)), dict(ours.score(PAIRS))
        rolling = dict(ours.score_rolling([TEXTS[0]]))
    for at, wanted in model.generate(REQUESTS):
        assert answers[at].completions[0].text == wanted.completions[0].text
        assert answers[at].completions[0].logprob == pytest.approx(wanted.completions[0].logprob, abs=1e-3)
    for at, scored in model.score(PAIRS):
        assert scores[at].num_scored == scored.num_scored
        assert scores[at].logprob == pytest.approx(scored.logprob, abs=1e-3)
    assert rolling[0].logprob == pytest.approx(dict(model.score_rolling([TEXTS[0]]))[0].logprob, abs=1e-2)


@pytest.fixture
def evaluate(run, worded, small_machine) -> Callable[..., object]:
    """`evaluate(output, *more)`: a small suite over the engine."""

    def evaluate(output: Path, *more: object) -> object:
        words = ["evaluate", "run", "--model", worded, "--suite", "smoke", "--size", "4", "--output", output]
        return run(*words, "--device-memory", "64MiB", "--host-memory", "64MiB", *more)

    return evaluate


def test_a_suite_runs_compares_and_is_scored_again(evaluate, run, worded, tmp_path):
    a = evaluate(tmp_path / "a", "--json")
    assert a.code == 0, a.err
    runs = json.loads(a.out)["runs"]
    assert len(runs) == 4
    assert all(each["num_asked"] > 0 for each in runs)
    again = json.loads(evaluate(tmp_path / "a", "--json").out)["runs"]
    assert [each["num_asked"] for each in again] == [0, 0, 0, 0]
    assert [each["intervals"] for each in again] == [each["intervals"] for each in runs]
    assert evaluate(tmp_path / "b", "--weight-bits", 4).code == 0
    compared = run("evaluate", "compare", tmp_path / "a", tmp_path / "b", "--metric", "logprob", "--json")
    assert {each["metric"] for each in json.loads(compared.out)["runs"]} == {"logprob"}
    assert "sign" in run("evaluate", "compare", tmp_path / "a", tmp_path / "b").words
    folder = next((tmp_path / "a").rglob("stats.json")).parent
    before = json.loads((folder / "stats.json").read_text())
    assert run("evaluate", "rescore", folder, "--model", worded).code == 0
    assert json.loads((folder / "stats.json").read_text()) == before


def test_explain_asks_nothing(evaluate, tmp_path):
    shown = evaluate(tmp_path / "a", "--explain")
    assert shown.code == 0
    assert "requests" in shown.words
    assert not (tmp_path / "a").exists()


def test_until_an_interval_is_narrow_enough(run, worded, tmp_path):
    words = ["evaluate", "run", "--backend", "transformers", "--model", worded, "--output", tmp_path / "a"]
    done = run(*words, "--run", "numeracy:max_eval_instances=60", "--until", "ci=0.5")
    assert done.code == 0, done.err
    assert "asked 50 instances for a half width of 0.5: reached" in done.words
    assert run(*words, "--run", "numeracy", "--until", "soon").code == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--backend", "clouds"], "engine, transformers or server"),
        (["--backend", "server"], "needs its address"),
        (["--run", "gsm"], "There is no"),
    ],
)
def test_wrong_usage_says_what_to_do(run, worded, tmp_path, more, words):
    base = ["evaluate", "run", "--model", worded, "--output", tmp_path / "o", "--data-root", tmp_path]
    chosen = [*more, "--backend", "transformers"] if "--run" in more else ["--run", "numeracy", *more]
    done = run(*base, *chosen)
    assert done.code in (1, 2)
    assert words in done.words


def test_nothing_to_run_is_said(run, worded, tmp_path):
    done = run("evaluate", "run", "--model", worded, "--output", tmp_path / "o")
    assert done.code == 2
    assert "--run ENTRY" in done.words


def test_killed_and_started_again_gives_the_same_figures(run, fork, worded, tmp_path):
    def words(output: Path) -> list[str]:
        backend = ["--backend", "transformers", "--model", str(worded), "--output", str(output)]
        entry = "dyck_language:num_parenthesis_pairs=3,max_eval_instances=300"
        return ["evaluate", "run", *backend, "--run", entry]

    killed = fork("commands.py", "capstan", *words(tmp_path / "a"))
    answers, deadline = tmp_path / "a" / "answers.jsonl", time.monotonic() + 120
    while not (answers.exists() and answers.stat().st_size > 20_000):
        assert killed.poll() is None, f"it ended before it could be killed: {killed.err}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait(30)
    known = answers.read_bytes().count(b"\n")
    assert 0 < known < 300
    for output in ("a", "b"):
        done = run(*words(tmp_path / output))
        assert done.code == 0, done.err
    a, b = (next((tmp_path / each).rglob("per_instance_stats.json")) for each in ("a", "b"))
    keep = ("exact_match_indicator", "logprob", "num_completion_tokens")

    def figures(path: Path) -> list[object]:
        return [
            (entry["instance_id"], stat["name"]["name"], round(stat["mean"], 4))
            for entry in json.loads(path.read_text())
            for stat in entry["stats"]
            if stat["name"]["name"] in keep
        ]

    assert figures(a) == figures(b)
    assert json.loads((a.parent / "capstan.json").read_text())["num_asked"] < 300


def test_room_is_left_for_the_tokens_that_a_tokenizer_adds():
    from types import SimpleNamespace

    from capstan.evaluation.transformers_model import limits_of

    config = SimpleNamespace(max_position_embeddings=100)
    plain = SimpleNamespace(bos_token=None, eos_token="</s>", num_special_tokens_to_add=lambda: 0)
    adding = SimpleNamespace(bos_token="<s>", eos_token="</s>", num_special_tokens_to_add=lambda: 1)
    assert limits_of(config, plain).max_request_length == 100
    assert limits_of(config, adding).max_request_length == 99
    assert limits_of(config, adding).prefix_token == "<s>"
