"""The demo's model: it is trained the same whether or not training was stopped, and its prompts are valid."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from capstan.cli import demo_model
from capstan.generation.batch.lines import BatchRequest, parse_lines
from capstan.generation.model import open_model


class Stopped(Exception):
    """Raised in the middle of training, as a kill would end it."""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return demo_model.corpus().training[:12]


@pytest.fixture(autouse=True)
def _six_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in {"_STEPS": 6, "_SAVE_EVERY": 2, "_WINDOW": 16, "_WINDOWS_PER_STEP": 2}.items():
        monkeypatch.setattr(demo_model, name, number)
    monkeypatch.setattr(demo_model, "VOCABULARY", 300)


def test_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path, texts: list[str]) -> None:
    steps: list[int] = []

    def stop_after_five(step: int, num_steps: int, loss: float) -> None:
        assert num_steps == 6
        assert loss == pytest.approx(5.7, abs=1.0), "about the logarithm of the vocabulary"
        steps.append(step)
        if step == 5 and steps.count(5) == 1:
            raise Stopped

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    demo_model.train(straight, texts, lambda *_: None)
    with pytest.raises(Stopped):
        demo_model.train(stopped, texts, stop_after_five)
    assert not stopped.exists(), "a folder that exists is complete"
    demo_model.train(stopped, texts, stop_after_five)
    assert steps == [1, 2, 3, 4, 5, 5, 6], "it goes on after the save at step 4"

    first, second = (load_file(folder / "model.safetensors") for folder in (straight, stopped))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, second[name]), name
    assert {path.name for path in tmp_path.iterdir()} == {"straight", "stopped"}, "nothing is left behind"


def test_prompts_are_valid_batch_lines_that_the_model_can_answer(tmp_path: Path, texts: list[str]) -> None:
    demo_model.train(tmp_path / "model", texts, lambda *_: None)
    model = open_model(tmp_path / "model")
    path = tmp_path / "prompts.jsonl"
    demo_model.write_prompts(path, demo_model.corpus().held_out, 64)
    lines = path.read_text().splitlines()
    parsed = parse_lines(lines, model, max_tokens=1)
    requests = [line for line in parsed if isinstance(line, BatchRequest)]
    assert len(requests) == len(parsed) == 64
    assert [asked.custom_id for asked in requests] == [f"prompt-{index}" for index in range(64)]
    assert {asked.request.max_tokens for asked in requests} == {48}
    assert len({len(json.loads(line)["body"]["prompt"].split()) for line in lines}) > 10, (
        "short and long ones"
    )


def test_held_out_texts_are_not_trained_on() -> None:
    corpus = demo_model.corpus()
    assert len(corpus.held_out) > 5
    assert not set(corpus.held_out) & set(corpus.training)
