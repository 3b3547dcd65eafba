"""`capstan evaluate` as people run it, on a tiny model with a tokenizer, over two backends."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.cli import main
from capstan.cli.engine_model import EngineModel
from capstan.evaluation import Pair, Request
from capstan.evaluation.transformers_model import TransformersModel, special_encoded
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


@pytest.mark.parametrize("backend", ["transformers", "engine"])
def test_killed_and_started_again_gives_the_same_figures(run, fork, worded, tmp_path, small_machine, backend):
    def words(output: Path) -> list[str]:
        model = ["--backend", backend, "--model", str(worded), "--device", "cpu", "--output", str(output)]
        memory = ["--device-memory", "64MiB", "--host-memory", "64MiB"] if backend == "engine" else []
        entry = "dyck_language:num_parenthesis_pairs=3,max_eval_instances=150"
        return ["evaluate", "run", *model, *memory, "--run", entry]

    # It kills itself at its 70th answer: from here it might have ended, or not begun, whatever is waited for.
    killed = fork(__file__, "capstan_until", 70, *words(tmp_path / "a"))
    assert killed.wait(120) == -signal.SIGKILL, killed.err
    # Kept are those that were synced, and of the others as many as the system has got.
    known = (tmp_path / "a" / "answers.jsonl").read_bytes().count(b"\n")
    assert 64 <= known <= 70
    for output in ("a", "b"):
        done = run(*words(tmp_path / output))
        assert done.code == 0, done.err
    a, b = (next((tmp_path / each).rglob("per_instance_stats.json")) for each in ("a", "b"))
    num_asked = [json.loads((each.parent / "capstan.json").read_text())["num_asked"] for each in (a, b)]
    assert num_asked[0] == num_asked[1] - known

    def figures(path: Path, name: str) -> dict[str, float]:
        return {
            entry["instance_id"]: stat["mean"]
            for entry in json.loads(path.read_text())
            for stat in entry["stats"]
            if stat["name"]["name"] == name
        }

    for name in ("exact_match_indicator", "num_completion_tokens"):
        assert figures(a, name) == figures(b, name)
    assert len(figures(a, "logprob")) == 150
    # Other batches: sums of some ten float32 terms, in another order.
    assert figures(a, "logprob") == pytest.approx(figures(b, "logprob"), abs=1e-3)


def capstan_until(count: int, *words: str) -> None:
    """The command line, in a process that is killed when it has kept so many answers."""
    from capstan.evaluation import AnswerStore

    add = AnswerStore.add

    def add_or_die(store: AnswerStore, *told: Any) -> None:
        add(store, *told)
        if len(store) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    AnswerStore.add = add_or_die  # type: ignore[method-assign]
    sys.exit(main(list(words)))


def test_room_is_left_for_the_tokens_that_a_tokenizer_adds():
    from types import SimpleNamespace

    from capstan.evaluation.transformers_model import limits_of

    config = SimpleNamespace(max_position_embeddings=100)
    plain = SimpleNamespace(bos_token=None, eos_token="</s>", num_special_tokens_to_add=lambda: 0)
    adding = SimpleNamespace(bos_token="<s>", eos_token="</s>", num_special_tokens_to_add=lambda: 1)
    assert limits_of(config, plain).max_request_length == 100
    assert limits_of(config, adding).max_request_length == 99
    assert limits_of(config, adding).prefix_token == "<s>"


# --- what is said is used or refused ----------------------------------------------------------------------


@pytest.fixture
def plainly(run, worded, tmp_path) -> Callable[..., Any]:
    """`plainly(*words)`: an evaluation of the small model by transformers, into one folder."""

    def plainly(*words: object) -> Any:
        base = ["evaluate", "run", "--backend", "transformers", "--model", worded, "--output", tmp_path / "o"]
        return run(*base, *words)

    return plainly


def own_table(folder: Path, name: str, text: str, /, **more: str) -> Path:
    (folder / f"{name}.jsonl").write_text(json.dumps({"q": text, "a": "1"}) + "\n")
    told = {"name": "mine", "data": f"{name}.jsonl", "input": "{q}", "answer": "a"} | more
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in told.items()))
    return path


@pytest.mark.parametrize(
    ("option", "value", "backend"),
    [
        ("--weight-bits", 4, "transformers"), ("--cache-bits", 8, "transformers"),
        ("--device-memory", "1GiB", "transformers"), ("--url", "http://127.0.0.1:9/v1", "transformers"),
        ("--weight-bits", 4, "server"), ("--device", "cpu", "server"), ("--url", "http://x", "engine"),
    ],
)  # fmt: skip
def test_an_option_that_a_backend_would_not_heed_is_refused(run, worded, tmp_path, option, value, backend):
    words = ["evaluate", "run", "--model", worded, "--output", tmp_path / "o", "--run", "numeracy"]
    done = run(*words, "--backend", backend, option, value)
    assert done.code == 2
    assert option in done.words
    assert backend in done.words
    assert not (tmp_path / "o").exists()


def test_two_tasks_of_one_name_do_not_overwrite_each_other(plainly, tmp_path):
    a, b = own_table(tmp_path, "a", "one"), own_table(tmp_path, "b", "two")
    done = plainly("--run", a, "--run", b)
    assert done.code == 2
    assert "called mine" in done.words
    assert plainly("--run", a).code == 0
    assert plainly("--run", a).code == 0
    done = plainly("--run", b)
    assert done.code == 1
    assert "scenario_spec differ" in done.words
    assert "one" in (tmp_path / "o" / "runs" / "capstan" / "mine" / "scenario_state.json").read_text()


def test_another_model_or_other_settings_do_not_overwrite_a_run(plainly, run, worded, tmp_path):
    other = shutil.copytree(worded, tmp_path / "models" / worded.name)
    entry = own_table(tmp_path, "a", "one")
    assert plainly("--run", entry).code == 0
    base = ["evaluate", "run", "--backend", "transformers", "--model", other, "--output", tmp_path / "o"]
    (other / "notes.txt").write_text("other weights")
    done = run(*base, "--run", entry)
    assert done.code == 1
    assert "model differ" in done.words
    done = plainly("--run", entry, "--trials", 2)
    assert done.code == 1
    assert "adapter_spec differ" in done.words
    assert run(*base, "--run", entry, "--name", "other").code == 0


def test_json_is_json_where_a_figure_has_no_width(plainly, run, worded, tmp_path):
    def strict(text: str) -> Any:
        def refuse(name: str) -> None:
            raise AssertionError(name)

        return json.loads(text, parse_constant=refuse)

    done = plainly("--run", own_table(tmp_path, "a", "one"), "--json")
    found = strict(done.out)["runs"][0]["intervals"]["exact_match"]
    assert (found["low"], found["high"], found["count"]) == (None, None, 1)
    folder = tmp_path / "o"
    assert strict(run("evaluate", "compare", folder, folder, "--json").out)["runs"]
    assert strict(run("evaluate", "rescore", folder, "--model", worded, "--json").out)["runs"]


def test_a_damaged_report_is_named(plainly, run, worded, tmp_path):
    assert plainly("--run", own_table(tmp_path, "a", "one")).code == 0
    report = next((tmp_path / "o").rglob("capstan.json"))
    for text in ("{", "[]"):
        report.write_text(text)
        folder = tmp_path / "o"
        for words in (["compare", folder, folder], ["rescore", folder, "--model", worded]):
            done = run("evaluate", *words)
            assert done.code == 1
            assert "capstan.json is damaged" in done.words
        assert plainly("--run", tmp_path / "a.yaml").code == 1


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def chatting(worded, tmp_path_factory) -> Path:
    """The small model, with a chat template."""
    folder = shutil.copytree(worded, tmp_path_factory.mktemp("models") / "chatting")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def chat_task(folder: Path, **more: object) -> Path:
    rows = [{"q": f"Q{at}", "c": ["yes", "no"], "a": 0} for at in range(2)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {
        "task": "chat", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "t.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "c",
        "doc_to_target": "a", "description": "About ropes.", "num_fewshot": 1, "fewshot_split": "test",
    } | more  # fmt: skip
    path = folder / "t.yaml"
    path.write_text(json.dumps(told))
    return path


@pytest.mark.parametrize(
    ("more", "task", "wanted"),
    [
        ([], {}, "<system>About ropes.<user>Q1 yes\n\nQ0<assistant>yes"),
        (["--fewshot-as-multiturn"], {},
         "<system>About ropes.<user>Q1<assistant>yes<user>Q0<assistant>yes"),
        (["--system-instruction", "Be brief."], {"num_fewshot": 0},
         "<system>Be brief.\n\nAbout ropes.<user>Q0<assistant>yes"),
        ([], {"gen_prefix": "So:", "description": ""}, "<user>Q1 So: yes\n\nQ0<assistant>So:yes"),
    ],
)  # fmt: skip
def test_a_task_is_asked_by_the_chat_template(run, chatting, tmp_path, more, task, wanted):
    words = ["evaluate", "run", "--backend", "transformers", "--model", chatting, "--output", tmp_path / "o"]
    done = run(*words, "--apply-chat-template", *more, "--run", chat_task(tmp_path, **task), "--json")
    assert done.code == 0, done.err
    assert "prompts are written by the model's chat template" in json.loads(done.out)["runs"][0]["notes"]
    folder = next((tmp_path / "o").rglob("run_spec.json")).parent
    state = json.loads((folder / "scenario_state.json").read_text())["request_states"][0]
    assert state["request"]["prompt"] == wanted
    assert json.loads((folder / "run_spec.json").read_text())["chat_template"]["multiturn"] == bool(
        "--fewshot-as-multiturn" in more
    )
    before = json.loads((folder / "stats.json").read_text())
    assert run("evaluate", "rescore", folder, "--model", chatting).code == 0
    assert json.loads((folder / "stats.json").read_text()) == before


def test_helms_prompts_are_the_users_message(run, chatting, worded, tmp_path):
    words = ["evaluate", "run", "--backend", "transformers", "--apply-chat-template"]
    entry = own_table(tmp_path, "a", "one")
    words_here = [*words, "--model", chatting, "--output", tmp_path / "o", "--run", entry]
    done = run(*words_here)
    assert done.code == 0, done.err
    state = json.loads(next((tmp_path / "o").rglob("scenario_state.json")).read_text())["request_states"][0]
    assert state["request"]["prompt"] == "<user>Question: one\nAnswer:<assistant>"
    done = run(*words_here, "--system-instruction", "x")
    assert done.code == 1
    assert "chat_template differ" in done.words
    done = run(*words, "--model", worded, "--output", tmp_path / "p", "--run", entry)
    assert done.code == 1
    assert "has no chat template" in done.words
    assert run(*words[:-1], "--model", chatting, "--output", tmp_path / "q", "--run", entry,
               "--fewshot-as-multiturn").code == 2  # fmt: skip


def test_a_prompt_that_begins_with_the_models_beginning_has_it_once():
    def tokenizer(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [0 if part == "<s>" else 1 for part in text.split("|")]
        return {"input_ids": [0] * add_special_tokens + ids}

    assert special_encoded(tokenizer, "<s>|rope", "<s>") == [0, 1]
    assert special_encoded(tokenizer, "rope", "<s>") == [0, 1]
    assert special_encoded(tokenizer, "rope", "") == [0, 1]


@pytest.mark.parametrize(
    ("more", "words"), [(["--device", "tpu"], "device 'tpu'"), (["--run", "long.yaml"], "another name")]
)
def test_a_device_or_a_name_that_cannot_be_is_refused(plainly, tmp_path, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    own_table(tmp_path, "long", "one", name="x" * 300)
    done = plainly("--run", own_table(tmp_path, "a", "one"), *more)
    assert done.code == 1
    assert words in done.words


def test_a_group_is_run_task_by_task_and_averaged(plainly, tmp_path):
    chat_task(tmp_path, num_fewshot=0)
    (tmp_path / "g.yaml").write_text("group: g\ntask: [chat]\naggregate_metric_list: [{metric: acc}]\n")
    done = plainly("--run", tmp_path / "g.yaml", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    (group,) = told["groups"]
    assert (group["group"], group["runs"]) == ("g", ["chat"])
    assert group["averages"]["acc"]["mean"] == told["runs"][0]["intervals"]["acc"]["mean"]
    assert json.loads((tmp_path / "o" / "groups" / "capstan" / "g.json").read_text()) == group
    assert "group g" in plainly("--run", tmp_path / "g.yaml").words


def test_answers_that_are_not_of_the_form_asked_for_are_counted(plainly, tmp_path):
    rows = [{"q": f"Q{at}", "c": ["yes", "no"], "a": 0} for at in range(3)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"name": "c", "data": "c.jsonl", "input": "{q}", "choices": "c", "answer": "a"}
    (tmp_path / "c.yaml").write_text(json.dumps(told))
    done = plainly("--run", tmp_path / "c.yaml", "--run", "numeracy:max_eval_instances=3")
    assert done.code == 0, done.err
    assert "3 of 3 answers were none of the letters asked for" in done.words
    assert "3 of 3 answers did not end as examples do, but at max_tokens" in done.words
