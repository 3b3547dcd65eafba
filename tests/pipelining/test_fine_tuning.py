"""The verb on models in Hugging Face format: texts, losses, checkpoints, kills, and what is refused."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from capstan.cli.train_pipeline import pipeline
from capstan.errors import CapstanError, InputError, UnsupportedModel, UsageError
from capstan.models import cut_causal_lm, load_stage
from capstan.pipelining.decoder import token_loss
from capstan.pipelining.dropout import configured_rates, dropout_rates
from capstan.pipelining.planner import Links, plan_training, step_seconds
from capstan.pipelining.settings import Settings
from capstan.plans import Trace

FILE = str(Path(__file__).with_name("language_model_cases.py"))
SENTENCE = "the ship turns the capstan and the capstan lifts the anchor; "
SMALL = {"stages": 2, "sequence": 8, "batch": 8, "group_size": 16, "learning_rate": 0.01}


@pytest.fixture
def texts(tmp_path):
    """Lines of JSON to train on, and a text that is held out."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.txt"
    lines = [json.dumps({"text": SENTENCE + str(at), "id": at}) for at in range(3)]
    train.write_text("\n".join([*lines, "", ""]))
    held_out.write_text("the anchor turns; ")
    return {"data": str(train), "held_out": str(held_out)}


def test_a_tied_model_is_fine_tuned_and_written_and_the_plan_s_bytes_are_sent(
    in_world, folder_of, texts, tmp_path
):
    folder, output = folder_of("llama-tied"), tmp_path / "out"
    settings = SMALL | texts | {"model": str(folder), "epochs": 3}
    first, last = in_world(FILE, "trained", 2, {"settings": settings, "output": str(output)})
    assert first["loss"] == last["loss"]
    assert last["loss"][-1] < last["loss"][0] - 0.3

    told = Settings(**settings)
    rows, held_out = told.samples()
    links = Links(bandwidth_bytes_per_s=1e6, latency_s=0.01, compute_s=0.03)
    plan, trace = plan_training(told, len(rows), links), Trace.from_dict(json.loads(first["trace"]))
    steps = -(-len(rows) // 8)
    for promised, measured, epochs in zip(plan.phases, trace.phases, (1, 2), strict=True):
        assert promised.traffic == measured.traffic
        tied = epochs * steps * 258 * 16 * 4
        assert promised.traffic.size_bytes["rank 0->rank 1", "tied gradients"] == tied
        assert promised.traffic.size_bytes["rank 1->rank 0", "tied gradients"] == tied
    # The tied gradients come after each step's schedule: 258 x 16 float32 at 1e6 bytes/s, and the latency.
    sizes = plan.phases[0].traffic.size_bytes
    alone_s = step_seconds(
        "1f1b",
        num_stages=2,
        num_micro_batches=4,
        forward_bytes=sizes["rank 0->rank 1", "activations"] / steps / 4,
        backward_bytes=sizes["rank 1->rank 0", "gradients"] / steps / 4,
        links=links,
    )
    assert plan.phases[0].seconds / steps == pytest.approx(alone_s + 258 * 16 * 4 / 1e6 + 0.01)

    # What was written is what was trained: transformers finds the same loss, and the tokenizer is there.
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(output)(held_out[:, :-1]).logits
    assert token_loss(logits, held_out[:, 1:]).item() == pytest.approx(last["held_out_loss"][-1], rel=1e-5)
    assert (output / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_texts_of_json_lines_follow_each_other_with_the_end_between_them(folder_of, texts):
    settings = Settings(**SMALL, **texts, model=str(folder_of("llama-tied")))
    rows, held_out = settings.samples()
    stream = torch.cat([rows[:, :-1].flatten(), rows[-1:, -1]])
    one = len(SENTENCE) + 1
    assert stream[one] == stream[2 * one + 1] == 256  # the end
    assert torch.equal(stream[: one - 1], stream[one + 1 : 2 * one])
    assert stream[:-1].lt(256).sum() == len(stream) - 1 - 2
    assert torch.equal(rows[1:, 0], rows[:-1, -1])
    assert held_out.shape == (2, 9)
    # Without a model bytes are the tokens, and a line feed parts the texts.
    rows, _ = Settings(**SMALL, **texts).samples()
    assert bytes(rows[:, :-1].flatten().tolist()).startswith((SENTENCE + "0\n" + SENTENCE).encode())


def _run(start, torchrun, words):
    return [start(FILE, "verb", *words, environment=each) for each in torchrun(2)]


def _words(settings, **more):
    options = settings | more
    return ["train", "pipeline", "--json"] + [
        f"--{'eval' if name == 'held_out' else name.replace('_', '-')}={value}"
        for name, value in options.items()
        if name != "stages"
    ]


def test_a_rank_that_is_killed_under_torchrun_leaves_a_run_that_goes_on_with_the_same_losses(
    start, torchrun, folder_of, texts, tmp_path
):
    settings = SMALL | texts | {"model": str(folder_of("llama-tied")), "seed": 3}
    whole = _run(start, torchrun, _words(settings, epochs=6, output=tmp_path / "whole"))
    said = [rank.communicate(60) for rank in whole]
    assert [rank.returncode for rank in whole] == [0, 0], said
    assert said[1][0] == ""
    wanted = json.loads(said[0][0])

    kept = tmp_path / "run"
    long = _words(settings, epochs=5000, output=tmp_path / "halves", checkpoint=kept, patience_s=6)
    killed = _run(start, torchrun, long)
    until_s = time.monotonic() + 60
    while not all((kept / f"epoch-000002.stage-{rank}-of-2.pt").exists() for rank in range(2)):
        assert time.monotonic() < until_s, [rank.err for rank in killed]
        time.sleep(0.01)
    killed[1].kill()
    assert killed[0].wait(60) == 1
    assert "error: Rank 1 is gone" in killed[0].err
    epochs = 1 + max(int(path.name[6:12]) for path in kept.iterdir())

    resumed = _run(
        start,
        torchrun,
        _words(settings, epochs=epochs, output=tmp_path / "halves", checkpoint=kept, patience_s=6),
    )
    said = [rank.communicate(60) for rank in resumed]
    assert [rank.returncode for rank in resumed] == [0, 0], said
    found = json.loads(said[0][0])
    shared = min(epochs, 6)
    for name in ("loss", "held_out_loss", "wire_bytes"):
        assert found[name][:shared] == wanted[name][:shared]
        assert len(found[name]) == epochs


def _refusal(*words):
    app = typer.Typer()
    app.command()(pipeline)
    ran = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(ran.exception, CapstanError), ran.exception
    return ran.exception


def test_what_cannot_be_fine_tuned_is_refused_before_anything_starts(folder_of, tmp_path, monkeypatch):
    text, tied, out = tmp_path / "text.txt", folder_of("llama-tied"), tmp_path / "out"
    text.write_text(SENTENCE * 4)

    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    changed = tmp_path / "changed"
    changed.mkdir()
    for path in tied.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["t"] = 300
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    short = ["--sequence", 8]
    start = ["--data", text, "--output", out, *short]
    for words, error, message in [
        (["--model", tied, "--data", text, *short], UsageError, "give both"),
        (["--data", text, "--output", out, *short], UsageError, "give both"),
        (["--model", tied, *start, "--dim", 8], UsageError, "has its own dim"),
        (["--model", tmp_path / "no", *start], InputError, "There is no folder"),
        (["--model", tied, *start, "--stages", 5], UsageError, "cannot be cut into 5 stages"),
        (["--model", tied, "--data", text, "--output", out], InputError, "positions for 32 tokens"),
        (["--model", tied, "--data", text, "--output", tied, *short], UsageError, "weights of another model"),
        (["--model", tied, "--data", text, "--output", text, *short], UsageError, "is a file"),
        (["--model", tied, *start, "--checkpoint", text], UsageError, "is a file"),
        (["--model", folder_of("llama"), *start], InputError, "has no tokenizer"),
        (["--model", folder_of("gpt2"), *start], UnsupportedModel, "'resid_pdrop': 0.1"),
        (["--model", changed, *start], InputError, "token id 300"),
        (["--model", tied, *start, "--eval", tmp_path / "no.txt"], InputError, "There is no file"),
        (
            ["--model", tied, *start, "--eval", written("tiny.txt", b"a")],
            InputError,
            "has 2 tokens; 1 samples",
        ),
        (["--model", tied, *start, "--learning-rate", "nan"], UsageError, "learning_rate must be"),
        (["--model", tied, *start, "--clip", 0], UsageError, "clip must be a number above 0"),
        (["--data", written("latin.jsonl", b"\xff"), *short], InputError, "byte 0 is none"),
        (["--data", written("a.jsonl", b'{"text": "a"}\n{"text"'), *short], InputError, "Line 2 of"),
        (
            ["--data", written("b.jsonl", b'{"text": 7}'), *short],
            InputError,
            "Line 1 of .*b.jsonl has",
        ),
        (["--data", written("c.jsonl", b'["text"]'), *short], InputError, "has no text"),
        (["--data", written("d.jsonl", b'{"text": "\\ud800"}'), *short], InputError, "surrogate"),
        (["--data", written("e.jsonl", b""), *short], InputError, "has 0 tokens"),
    ]:
        found = _refusal(*words)
        assert isinstance(found, error), found
        with pytest.raises(error, match=message):
            raise found
    assert not out.exists()

    # A folder of another run.
    kept = tmp_path / "kept"
    kept.mkdir()
    other = Settings(**SMALL | {"data": str(text), "seed": 5})
    torch.save({"settings": vars(other)}, kept / "epoch-000004.stage-0-of-2.pt")
    found = _refusal("--data", text, "--checkpoint", kept, *short)
    assert "was trained with group_size=16" in str(found)
    assert "has checkpoints of 2 stages" in str(
        _refusal("--data", text, "--checkpoint", kept, "--stages", 3, *short)
    )
    (kept / "epoch-000004.stage-0-of-2.pt").write_bytes(b"PK")
    assert "is no checkpoint that can be read" in str(_refusal("--data", text, "--checkpoint", kept, *short))

    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert "has started 3 ranks, and --stages is 2" in str(_refusal("--data", text, "--stages", 2, *short))


def test_dropout_that_attention_applies_without_a_module_is_warned_of(folder_of):
    from transformers import GPT2Config, LlamaConfig

    assert configured_rates(LlamaConfig(attention_dropout=0.2)) == {"attention_dropout": 0.2}
    # Its summary_first_dropout is of a head that no causal language model has.
    assert configured_rates(GPT2Config()) == dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1)
    (cut,) = cut_causal_lm(folder_of("gpt2"), 1)
    assert {"attn_pdrop", "model.transformer.drop"} <= dropout_rates(
        load_stage(folder_of("gpt2"), cut)
    ).keys()


@pytest.mark.slow
def test_a_verb_that_is_killed_takes_its_ranks_along_and_the_same_command_goes_on(folder_of, texts, tmp_path):
    import subprocess

    settings = SMALL | texts | {"model": str(folder_of("llama-tied")), "epochs": 40}
    kept = tmp_path / "run"

    def command(name, **more):
        words = _words(settings, output=tmp_path / name, **more)
        return [sys.executable, "-m", "capstan", *words]

    whole = subprocess.run(command("whole"), capture_output=True, check=True, timeout=240)
    killed = subprocess.Popen(command("halves", checkpoint=kept), stderr=subprocess.DEVNULL)
    until_s = time.monotonic() + 120
    while not list(kept.glob("epoch-000003.*")):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    children = [int(each) for each in _descendants(killed.pid)]
    assert len(children) >= 3
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    while any(os.path.exists(f"/proc/{pid}") and _is_running(pid) for pid in children):
        assert time.monotonic() < until_s
        time.sleep(0.05)
    done = subprocess.run(command("halves", checkpoint=kept), capture_output=True, check=True, timeout=240)
    assert json.loads(done.stdout)["loss"] == json.loads(whole.stdout)["loss"]
    assert json.loads(done.stdout)["verb"] == "train pipeline"


def _descendants(pid):
    import psutil

    return [each.pid for each in psutil.Process(pid).children(recursive=True)]


def _is_running(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
