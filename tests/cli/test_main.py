"""What the command line promises before any verb runs: help, version, mistakes, exit codes."""

import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from capstan import cli


def test_help_names_every_verb_and_that_plans_come_first(run: Callable[..., Any]) -> None:
    ran = run("--help")
    assert ran.code == 0
    for words in ("Run, train and judge big models", "plans before it runs", "--explain", "--version"):
        assert words in ran.words
    for verb in cli.VERBS:
        assert re.search(rf"^\s+{verb}\s+\w+", ran.out, re.MULTILINE)


def test_every_verb_has_help(run: Callable[..., Any]) -> None:
    for verb in cli.VERBS:
        ran = run(verb, "--help")
        assert ran.code == 0
        assert f" {verb} [OPTIONS] " in ran.words


def test_help_of_generate_teaches(run: Callable[..., Any]) -> None:
    ran = run("generate", "--help")
    assert ran.code == 0
    options = ["--model", "--input", "--output", "--device", "--device-memory", "--host-memory", "--disk"]
    options += [
        "--weight-bits",
        "--cache-bits",
        "--place",
        "--max-tokens",
        "--shard",
        "--overwrite",
        "--explain",
        "--json",
    ]
    for option in options:
        assert re.search(rf"^  {option}\s", ran.out, re.MULTILINE), option
    for words in (
        "a model that need not fit on the device",
        "A folder in Hugging Face format",
        '{"prompt": "…"}, or OpenAI batch lines with custom_id and body',
        "max_tokens, temperature, top_k, top_p, seed, stop, n, logprobs, prompt_logprobs, echo, ignore_eos",
        "Run the same command again after a stop or a crash: it goes on, and answers every request once",
        "as 8GiB",
        "16, 8 or 4 bits",
        "weights=device:0.3,host:0.5,disk:0.2",
        "What is not placed is planned",
        "nothing is loaded, nothing is written",
        "capstan generate --model DIR --input prompts.jsonl --device-memory 8GiB --explain",
    ):
        assert words in ran.words, words


def test_help_of_sharding_and_merging_leads_from_one_to_the_other(run: Callable[..., Any]) -> None:
    generate, merge = (run(verb, "--help").words for verb in ("generate", "merge"))
    for words in ("--shard", "the I-th of N shares of the input, as 2/8", "`capstan merge`"):
        assert words in generate, words
    for words in (
        "The outputs of `capstan generate --shard`, all of them",
        "Every line of the input must be answered exactly once",
        "named by file and line, and nothing is written",
        "capstan merge out-*.jsonl --input in.jsonl --output all.jsonl",
    ):
        assert words in merge, words


def test_version(run: Callable[..., Any]) -> None:
    ran = run("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"capstan {version('capstan-ml')}\n", "")


def test_a_mistyped_verb_is_wrong_usage_with_a_suggestion(run: Callable[..., Any]) -> None:
    ran = run("genrate")
    assert ran.code == 2
    assert "generate" in ran.err
    assert ran.out == ""


def test_a_mistyped_option_is_wrong_usage_with_a_suggestion(run: Callable[..., Any]) -> None:
    ran = run("generate", "--modle", "x", "--input", "y")
    assert ran.code == 2
    assert "--modle" in ran.err
    assert "--model" in ran.err.replace("--modle", "")
    assert ran.out == ""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--input", "x", "--explain"], "model"),
        (["--model", "x", "--explain"], "input"),
        (["--model", "x", "--input", "y", "--max-tokens", "0"], "max-tokens"),
        (["--model", "x", "--input", "y", "--max-tokens", "many"], "max-tokens"),
        (["--model", "x", "--input", "y", "--weight-bits", "four"], "weight-bits"),
        (["--model", "x", "--shard", "2/8"], "input"),
        (["--model", "x", "--input", "y", "more"], "more"),
    ],
    ids=[
        "no model",
        "no input",
        "no tokens",
        "tokens in words",
        "bits in words",
        "no input, a shard",
        "an argument too many",
    ],
)
def test_a_wrong_command_line_is_wrong_usage(words: list[str], named: str, run: Callable[..., Any]) -> None:
    ran = run("generate", *words)
    assert ran.code == 2
    assert named in ran.err
    assert ran.out == ""


def test_no_verb_at_all_shows_the_help(run: Callable[..., Any]) -> None:
    ran = run()
    assert ran.code == 2
    assert "Commands:" in ran.words


def test_ctrl_c_says_that_the_same_command_goes_on(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("capstan.generation.planning.opening.plan_for", interrupted)
    ran = run("generate", "--model", "x", "--input", "y", "--explain")
    assert ran.code == 130
    assert "The same command goes on where it was." in ran.err
