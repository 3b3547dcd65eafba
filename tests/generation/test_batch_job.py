"""The batch job: every line of the input has one line in the output, whatever it holds."""

import gzip
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capstan.errors import DoesNotFit, InputError
from capstan.generation import plan_for
from capstan.generation.batch.answers import error_line
from capstan.generation.batch.job import BatchReport, lengths_of, open_journal, read_batch, run_batch
from capstan.generation.batch.shard import Shard
from capstan.generation.planning.batching import Length
from capstan.generation.planning.planner import Planner
from capstan.hardware import Machine

CPU = torch.device("cpu")
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def folder(family_config: Callable[..., Any], save_model: Callable[..., Path]) -> Path:
    """A tiny Llama with a token for each byte and a chat template."""
    folder = save_model(family_config("llama", vocab_size=256))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def planner(folder: Path, machine: Machine) -> Planner:
    return plan_for(folder, device="cpu", device_memory="4MiB", host_memory="4MiB", machine=machine)[0]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write({"prompt": "x"}, "what?", …)`: an input file of these lines."""

    def write(*lines: Any) -> Path:
        path = tmp_path / "requests.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        return path

    return write


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


@pytest.fixture
def run(planner: Planner, output: Path) -> Callable[..., BatchReport]:
    """`run(path)`: the whole job, into `output`."""

    def run(path: Path, *, max_tokens: int = 3, overwrite: bool = False, **hooks: Any) -> BatchReport:
        batch = read_batch(path, planner.model, max_tokens=max_tokens)
        with open_journal(batch, output, planner.model, overwrite=overwrite) as journal:
            return run_batch(batch, journal, planner, CPU, **hooks)

    return run


def lines_in(output: Path) -> dict[str, dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = [json.loads(line, parse_constant=no_constant) for line in output.read_text().split("\n")[:-1]]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def body_of(line: dict[str, Any]) -> dict[str, Any]:
    assert line["response"]["status_code"] == 200
    assert line["error"] is None
    body = line["response"]["body"]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert body["created"] == 1_700_000_000
    return body


# --- reading ----------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_an_error(planner: Planner, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read: No such file"):
        read_batch(tmp_path / "none.jsonl", planner.model, max_tokens=3)


def test_a_folder_is_an_error(planner: Planner, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_batch(tmp_path, planner.model, max_tokens=3)


def test_a_file_that_is_not_text_is_an_error(planner: Planner, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "x"}\n'))
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 1\); is it compressed\?"):
        read_batch(path, planner.model, max_tokens=3)


@pytest.mark.parametrize("text", ["\ufeff", "\ufeff\n", "\ufeff\r\n"])
def test_a_byte_order_mark_alone_is_no_line(text: str, planner: Planner, write: Callable[..., Path]) -> None:
    path = write('{"prompt": "x"}')
    path.write_bytes(text.encode())
    assert not read_batch(path, planner.model, max_tokens=3).lines


def test_a_byte_order_mark_belongs_to_no_line(planner: Planner, write: Callable[..., Path]) -> None:
    path = write("\ufeff" + '{"prompt": "x"}', {"prompt": "y"}, "\ufeff" + '{"prompt": "z"}')
    batch = read_batch(path, planner.model, max_tokens=3)
    assert [asked.custom_id for asked in batch.requests] == ["line-1", "line-2"]
    assert [bad.custom_id for bad in batch.bad_lines] == ["line-3"], "only at the start it is a mark"
    path.write_bytes(path.read_bytes() + b"\xff")
    with pytest.raises(InputError, match=rf"\(byte {path.stat().st_size - 1}\)"):
        read_batch(path, planner.model, max_tokens=3)


def test_a_planner_hears_of_one_length_for_each_answer(planner: Planner, write: Callable[..., Path]) -> None:
    path = write({"prompt": "abc", "n": 2}, "what?", {"prompt": "x", "max_tokens": 9})
    batch = read_batch(path, planner.model, max_tokens=3)
    assert lengths_of(batch.requests) == [Length(3, 3), Length(3, 3), Length(1, 9)]
    assert [bad.custom_id for bad in batch.bad_lines] == ["line-2"]


# --- answering --------------------------------------------------------------------------------------------


def test_a_bad_line_is_answered_with_its_reason_and_the_job_goes_on(
    run: Callable[..., BatchReport], write: Callable[..., Path], output: Path
) -> None:
    report = run(
        write(
            {"custom_id": "a", "prompt": "one"},
            "what?",
            {"custom_id": "b", "prompt": ""},
            "",
            {"custom_id": "a", "prompt": "two"},
            {"custom_id": "c", "prompt": [3, 4], "max_tokens": 2},
        )
    )
    assert (report.num_answered, report.num_errors, report.num_answered_before) == (2, 3, 0)
    lines = lines_in(output)
    assert {name: line["response"]["status_code"] for name, line in lines.items()} == {
        "a": 200,
        "line-2": 400,
        "b": 400,
        "line-5": 400,
        "c": 200,
    }
    assert body_of(lines["a"])["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert body_of(lines["c"])["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    for name, words in (("line-2", "line 2: "), ("b", "empty"), ("line-5", "was used on line 1")):
        assert words in lines[name]["error"]["message"]
        assert lines[name]["response"]["body"]["error"]["message"] == lines[name]["error"]["message"]


def test_every_form_of_request_in_one_file(
    run: Callable[..., BatchReport], write: Callable[..., Path], output: Path
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    report = run(
        write(
            {"custom_id": "plain", "prompt": "hello"},
            {"custom_id": "several", "prompt": "hello", "n": 3, "temperature": 1.0, "seed": 5},
            {"custom_id": "scored", "prompt": "hello", "logprobs": 2},
            {"custom_id": "echoed", "prompt": "hello", "logprobs": 2, "echo": True},
            {"custom_id": "prompt", "prompt": "hello", "prompt_logprobs": 1},
            {"custom_id": "chat", "messages": messages, "logprobs": True, "top_logprobs": 2},
        )
    )
    assert (report.num_answered, report.num_errors) == (6, 0)
    bodies = {name: body_of(line) for name, line in lines_in(output).items()}

    plain = bodies["plain"]["choices"][0]
    assert plain["logprobs"] is None
    assert [choice["index"] for choice in bodies["several"]["choices"]] == [0, 1, 2]
    assert bodies["several"]["usage"] == {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}

    scored = bodies["scored"]["choices"][0]
    assert scored["text"] == plain["text"]
    assert {name: len(entries) for name, entries in scored["logprobs"].items()} == {
        "tokens": 3,
        "token_logprobs": 3,
        "top_logprobs": 3,
        "text_offset": 3,
    }
    assert all(value < 0 for value in scored["logprobs"]["token_logprobs"])
    for value, top in zip(
        scored["logprobs"]["token_logprobs"], scored["logprobs"]["top_logprobs"], strict=True
    ):
        assert value == max(top.values()), "the likeliest token was taken"

    echoed = bodies["echoed"]["choices"][0]
    assert echoed["text"] == "hello" + plain["text"]
    assert echoed["logprobs"]["tokens"][:5] == list("hello")
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert echoed["logprobs"]["token_logprobs"][5:] == pytest.approx(
        scored["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert echoed["logprobs"]["text_offset"] == list(range(8))

    (first, *rest) = bodies["prompt"]["choices"][0]["prompt_logprobs"]
    assert first is None
    own = [{entry["decoded_token"]: entry["logprob"] for entry in each.values()} for each in rest]
    assert [each[letter] for each, letter in zip(own, "ello", strict=True)] == pytest.approx(
        echoed["logprobs"]["token_logprobs"][1:5], abs=1e-4
    )

    chat = bodies["chat"]["choices"][0]
    assert chat["message"]["role"] == "assistant"
    assert bodies["chat"]["usage"]["prompt_tokens"] == len("<user>hi<assistant>")
    assert len(chat["logprobs"]["content"]) == 3
    for entry in chat["logprobs"]["content"]:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
        assert len(entry["top_logprobs"]) == 2
        data = bytes(entry["bytes"])  # a random model's bytes; alone, most are no character
        assert entry["token"] in (data.decode(errors="replace"), "".join(f"\\x{value:02x}" for value in data))


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(
    run: Callable[..., BatchReport], write: Callable[..., Path], output: Path
) -> None:
    prompts = [f"prompt {index}" for index in range(6)]
    run(write(*({"custom_id": prompt, "prompt": prompt} for prompt in prompts)), max_tokens=8)
    texts = {name: body_of(line)["choices"][0]["text"] for name, line in lines_in(output).items()}
    # Byte by byte, a random model writes broken characters too; the stop text is a whole one.
    prompt, place = next(
        (prompt, place)
        for prompt, text in texts.items()
        for place, letter in enumerate(text)
        if 0 < place < 6 and letter.isascii() and text.index(letter) == place
    )
    text = texts[prompt]
    stopped = {"custom_id": prompt, "prompt": prompt, "stop": ["never to be seen", text[place]]}
    run(write(stopped), max_tokens=8, overwrite=True)
    body = body_of(lines_in(output)[prompt])
    assert body["choices"][0]["text"] == text[:place]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert place < body["usage"]["completion_tokens"] < 8


def test_perplexity_can_be_had_from_echoed_logprobs(
    run: Callable[..., BatchReport],
    write: Callable[..., Path],
    output: Path,
    folder: Path,
    open_reference: Callable[[Path], Any],
    planner: Planner,
) -> None:
    text = "so a prompt is scored"
    run(write({"prompt": text, "echo": True, "logprobs": 0, "max_tokens": 1}))
    given = body_of(lines_in(output)["line-1"])["choices"][0]["logprobs"]["token_logprobs"][: len(text)]
    tokens = planner.model.tokenizer(text)["input_ids"]
    table = open_reference(folder).logprobs(tokens)
    wanted = [table[at, token].item() for at, token in enumerate(tokens[1:])]
    assert given[0] is None
    assert given[1:] == pytest.approx(wanted, abs=1e-4)
    assert math.exp(-sum(wanted) / len(wanted)) > 1


def test_echo_without_new_tokens_is_the_prompt_alone(
    run: Callable[..., BatchReport], write: Callable[..., Path], output: Path
) -> None:
    asked = {"prompt": "so a prompt is scored", "echo": True, "logprobs": 1, "n": 2}
    run(write(asked | {"max_tokens": 0}, asked | {"max_tokens": 1}))
    alone, one_more = (body_of(lines_in(output)[name]) for name in ("line-1", "line-2"))
    assert (alone["usage"]["completion_tokens"], one_more["usage"]["completion_tokens"]) == (0, 2)
    for choice, longer in zip(alone["choices"], one_more["choices"], strict=True):
        assert choice["text"] == asked["prompt"]
        assert choice["finish_reason"] == "length"
        for name, values in choice["logprobs"].items():
            assert values == longer["logprobs"][name][: len(asked["prompt"])]


# --- going on ---------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Raised between two sweeps."""


def test_a_job_that_was_stopped_goes_on_and_writes_the_same(
    run: Callable[..., BatchReport], write: Callable[..., Path], output: Path
) -> None:
    path = write(
        *(
            {
                "prompt": f"prompt {index}",
                "max_tokens": 2 + 2 * index,
                "repetition_penalty": 1 + index / 4,
                "frequency_penalty": index % 2,
            }
            for index in range(5)
        ),
        "bad",
    )
    whole = run(path)
    assert (whole.num_answered, whole.num_errors, whole.num_answered_before) == (5, 1, 0)
    expected = lines_in(output)

    def stop(progress: Any) -> None:
        if progress.num_sweeps == 6:
            raise Stopped

    with pytest.raises(Stopped):
        run(path, overwrite=True, on_progress=stop)
    done = len(lines_in(output))
    assert 1 < done < 6
    report = run(path)
    assert (report.num_answered, report.num_errors, report.num_answered_before) == (6 - done, 0, done)
    assert lines_in(output) == expected

    before = output.read_bytes()
    again = run(path)
    assert (again.num_answered, again.num_errors, again.num_answered_before) == (0, 0, 6)
    assert again.plan is None
    assert again.trace is None
    assert output.read_bytes() == before


def test_a_full_disk_ends_the_job_and_it_goes_on_later(
    run: Callable[..., BatchReport],
    write: Callable[..., Path],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(*({"prompt": f"prompt {index}", "max_tokens": 1 + index} for index in range(4)))
    real_write, calls = os.write, 0

    def full_in_the_third(file: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(28, os.strerror(28))
        return real_write(file, bytes(data)[:10] if calls == 3 else data)

    monkeypatch.setattr("capstan.generation.batch.journal.os.write", full_in_the_third)
    with pytest.raises(DoesNotFit, match="run the same command again"):
        run(path)
    monkeypatch.undo()
    assert len(lines_in(output)) == 2
    assert run(path).num_answered == 2
    assert sorted(lines_in(output)) == ["line-1", "line-2", "line-3", "line-4"]


def refused(planner: Planner, path: Path, output: Path, *, max_tokens: int = 3) -> str:
    batch = read_batch(path, planner.model, max_tokens=max_tokens)
    with pytest.raises(InputError) as raised:
        open_journal(batch, output, planner.model, overwrite=False)
    return str(raised.value)


def test_another_input_is_refused(
    run: Callable[..., BatchReport], planner: Planner, write: Callable[..., Path], output: Path
) -> None:
    run(write({"prompt": "x"}))
    assert "another input;" in refused(planner, write({"prompt": "y"}), output)


def test_other_bits_are_refused(
    run: Callable[..., BatchReport], folder: Path, machine: Machine, write: Callable[..., Path], output: Path
) -> None:
    path = write({"prompt": "x"})
    run(path)
    quantised, _ = plan_for(folder, device="cpu", machine=machine, weight_bits=8, cache_bits=8)
    assert "another weights and cache;" in refused(quantised, path, output)


def test_a_model_of_another_shape_is_refused(
    run: Callable[..., BatchReport],
    machine: Machine,
    family_config: Callable[..., Any],
    save_model: Callable[..., Path],
    write: Callable[..., Path],
    output: Path,
) -> None:
    path = write({"prompt": [1]})
    run(path)
    other, _ = plan_for(
        save_model(family_config("llama", num_hidden_layers=2)), device="cpu", machine=machine
    )
    assert "another model and tokenizer" in refused(other, path, output)


def test_a_model_of_the_same_shape_but_other_weights_is_refused(
    run: Callable[..., BatchReport],
    folder: Path,
    machine: Machine,
    write: Callable[..., Path],
    output: Path,
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    path = write({"prompt": "x"})
    run(path)
    other = tmp_path / "fine-tuned"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = {name: tensor * 1.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert "another model;" in refused(plan_for(other, device="cpu", machine=machine)[0], path, output)


def test_another_default_of_max_tokens_is_refused(
    run: Callable[..., BatchReport], planner: Planner, write: Callable[..., Path], output: Path
) -> None:
    path = write({"prompt": "x"})
    run(path, max_tokens=3)
    assert "another --max-tokens (3, not 4);" in refused(planner, path, output, max_tokens=4)


@pytest.mark.parametrize(
    ("begun", "then", "named"),
    [("1/2", "2/2", "1/2, not 2/2"), ("1/2", "1/1", "1/2, not none"), ("1/1", "1/2", "none, not 1/2")],
)
def test_the_output_of_another_shard_is_refused(
    begun: str, then: str, named: str, planner: Planner, write: Callable[..., Path], output: Path
) -> None:
    path = write("bad", "worse", {"prompt": "x"})
    first, other = (
        read_batch(path, planner.model, max_tokens=3, shard=Shard.parse(text)) for text in (begun, then)
    )
    with open_journal(first, output, planner.model, overwrite=False) as journal:
        journal.append([error_line(bad) for bad in first.bad_lines])
    before = output.read_bytes()
    with pytest.raises(InputError) as raised:
        open_journal(other, output, planner.model, overwrite=False)
    assert f"another --shard ({named});" in str(raised.value)
    assert output.read_bytes() == before
    with open_journal(first, output, planner.model, overwrite=False) as journal:
        assert journal.answered == {bad.custom_id for bad in first.bad_lines}


def test_a_job_from_before_there_were_shards_goes_on(
    run: Callable[..., BatchReport], write: Callable[..., Path], output: Path
) -> None:
    path = write({"prompt": "x"})
    run(path)
    beside = output.with_name(output.name + ".job")
    job = json.loads(beside.read_text())
    assert job.pop("--shard") is None
    beside.write_text(json.dumps(job))
    assert run(path).num_answered_before == 1


def test_a_custom_id_with_half_a_surrogate_pair_does_not_stop_the_job(
    run: Callable[..., BatchReport], write: Callable[..., Path], output: Path
) -> None:
    run(write('{"custom_id": "\\ud83d", "prompt": "x"}', {"custom_id": "b", "prompt": "x"}))
    assert set(lines_in(output)) == {"\ud83d", "b"}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"])
def test_a_job_does_not_go_on_with_another_tokenizer_template_or_end(
    file: str,
    run: Callable[..., BatchReport],
    folder: Path,
    machine: Machine,
    write: Callable[..., Path],
    output: Path,
    tmp_path: Path,
) -> None:
    path = write({"prompt": "x"})
    run(path)
    other = shutil.copytree(folder, tmp_path / "other")
    changed = (other / file).read_text() if (other / file).exists() else "{}"
    (other / file).write_text(changed + "\n")
    planner, _ = plan_for(other, device="cpu", machine=machine)
    assert "another tokenizer or chat template;" in refused(planner, path, output)
