"""Causal language models in Hugging Face format, trained in stages as in one process."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = str(Path(__file__).with_name("language_model_cases.py"))
PAGE = (Path(__file__).parents[2] / "docs" / "pipelining.md").read_text()
VOCABULARY, SEQUENCE, HIDDEN = 48, 8, 16


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("language_model_cases", FILE)
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    return cases


@pytest.mark.covering(1)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("size", [2, 4])
def test_fifty_steps_on_a_llama_are_those_of_one_process(in_world, cases, folder_of, size, schedule):
    # Each step multiplies what roundings have made of the difference, by less where steps are short.
    case = {"folder": str(folder_of("llama")), "steps": 50, "clip": 1.0, "rate": 0.02}
    losses, _ = cases.alone(folder_of("llama"), 50, 1.0, rate=0.02)
    ranks = in_world(FILE, "staged", size, case | {"schedule": schedule, "parts": 4})
    assert ranks[-1]["losses"] == pytest.approx(losses, rel=1e-6)
    assert losses[-1] < losses[0] - 0.1


def test_what_a_language_model_cannot_be_run_with_is_refused_by_all_and_the_next_step_runs(
    in_world, folder_of
):
    first, last = in_world(FILE, "refused", 2, {"folder": str(folder_of("llama"))})
    assert first == last
    above, below, kind, flat, long, autocast, checkpointed = first
    assert (
        above
        == "InputError: 48 is no token of the model, whose ids are 0 to 47. Use the model's own tokenizer."
    )
    assert "is no token of the model" in below
    assert "takes token ids [samples, tokens], found torch.float32" in kind
    assert "of shape [9]" in flat
    assert "positions for 16 tokens, found 27" in long
    assert autocast.startswith("UsageError: A pipeline is not run under autocast")
    assert checkpointed.startswith("UnsupportedModel: transformers' gradient checkpointing")


@pytest.mark.covering(1)
@pytest.mark.parametrize(("kind", "size"), [("llama", 2), ("gemma2-tied", 3)])
@pytest.mark.parametrize("visits", [1, 2])
def test_full_precision_fine_tunes_as_one_process_does(in_world, cases, folder_of, kind, size, visits):
    case = {"folder": str(folder_of(kind)), "steps": 12, "clip": 0.5, "visits": visits}
    losses, weights = cases.alone(folder_of(kind), 12, 0.5, visits)
    ranks = in_world(FILE, "staged", size, case)
    # The mean of micro-batches' means and the batch's mean differ by roundings of 2**-24.
    assert ranks[-1]["losses"] == pytest.approx(losses, rel=1e-6)
    found = {name: tensor for each in ranks for name, tensor in each["weights"].items()}
    if kind == "gemma2-tied":
        assert torch.equal(ranks[0]["tied"], ranks[-1]["tied"])
        assert torch.equal(found.pop("lm_head.weight"), ranks[0]["tied"])
    assert found.keys() == weights.keys()
    for name, wanted in weights.items():
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=1e-5, msg=name)
    crossed = 12 * 8 * SEQUENCE * HIDDEN * 4
    wanted = {"rank 0->rank 1 activations": crossed}
    if kind == "gemma2-tied":
        wanted["rank 0->rank 2 tied gradients"] = 12 * VOCABULARY * HIDDEN * 4
    assert ranks[0]["bytes"] == wanted


@pytest.mark.slow
def test_compressed_changes_fine_tune_nearly_as_well_and_ends_agree(in_world, cases, folder_of):
    steps = 40
    losses, _ = cases.alone(folder_of("llama"), steps, 1.0)
    case = {
        "folder": str(folder_of("llama")),
        "steps": steps,
        "clip": 1.0,
        "bits": {"forward_bits": 4, "backward_bits": 8},
    }
    first, last = in_world(FILE, "staged", 2, case)
    assert first["digests"][1] == last["digests"][0]
    assert losses[-1] < losses[0] - 0.3
    # Less than a tenth of what training gained.
    assert abs(last["losses"][-1] - losses[-1]) < 0.1 * (losses[0] - losses[-1])
    # After a sample's first visit, groups of 8 values each take 4 bytes of codes and 4 of their grid.
    new, known = 16, steps * 8 - 16
    row = SEQUENCE * HIDDEN
    assert first["bytes"] == {"rank 0->rank 1 activations": new * row * 4 + known * row}


def test_a_stage_of_another_rank_is_refused_by_all(in_world, folder_of):
    for found in in_world(FILE, "confused", 2, {"folder": str(folder_of("llama"))}):
        assert [each.partition(":")[0] for each in found] == ["UsageError"] * 3
        assert "found 0 of 2, 0 of 2." in found[0]
        assert "found 1 of 2, 0 of 2." in found[1]
        assert "found 0 of 3, 1 of 3." in found[2]


def test_the_page_s_example_fine_tunes_and_writes_a_checkpoint(start, torchrun, cases, folder_of, tmp_path):
    from transformers import AutoModelForCausalLM

    _, example = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    places = {
        "models/llama": folder_of("llama"),
        "models/tuned": tmp_path / "out",
        "samples.pt": tmp_path / "in.pt",
    }
    for name, place in places.items():
        assert f'"{name}"' in example
        example = example.replace(f'"{name}"', repr(str(place)))
    torch.save(cases.data(), tmp_path / "in.pt")
    script = tmp_path / "script.py"
    script.write_text(example)
    ranks = [start(FILE, "script", str(script), environment=each) for each in torchrun(2)]
    said = [rank.communicate(60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said

    def loss_of(folder: Path) -> float:
        samples = cases.data()
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(samples[:, :-1]).logits
        return cases.token_loss(logits, samples[:, 1:]).item()

    assert loss_of(tmp_path / "out") < loss_of(folder_of("llama")) - 0.02
