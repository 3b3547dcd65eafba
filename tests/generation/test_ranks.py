"""A model divided over ranks answers as one that is not, and every byte between ranks was predicted."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.generation import Request
from capstan.generation.planning.stage import Capacity, divide, pipelined
from capstan.hardware import Machine

RANKS_WORLD = Path(__file__).with_name("ranks_world.py")
AMPLE = {"device": 100 << 20, "host": 100 << 20, "disk": 100 << 20}
NEAR = "weights=device cache=device"
STREAMED = "weights=device:0.3,host:0.4,disk:0.3 cache=host attention=host"
FAR = "weights=disk cache=disk attention=device activations=disk"
HALF = "weights=host cache=device activations=host"
# As in test_scores.py: sums of the same terms in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def run_world(
    fork: Callable[..., Any],
    torchrun: Callable[[int], list[dict[str, str]]],
    machine: Machine,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., list[list[dict[str, Any]]]]:
    """`run_world(size, cases)`: for each case, what each rank reports."""

    def run_world(size: int, cases: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        scratch = tmp_path_factory.mktemp("world")
        world = {"machine": machine.as_dict(), "scratch": str(scratch), "cases": cases}
        ranks = [fork(RANKS_WORLD, "run", world, environment=each) for each in torchrun(size)]
        outputs = [rank.communicate(timeout=200) for rank in ranks]
        for rank, (_, errors) in zip(ranks, outputs, strict=True):
            assert rank.returncode == 0, errors
        return [list(reports) for reports in zip(*(json.loads(out) for out, _ in outputs), strict=True)]

    return run_world


def _case(folder: Path, requests: Sequence[Request], place: str, shape: tuple[int, int], size: int) -> Any:
    asked = [{"prompt": list(each.prompt), "max_tokens": each.max_tokens} for each in requests]
    return {
        "folder": str(folder),
        "place": place,
        "shape": shape,
        "budgets": [AMPLE] * size,
        "requests": asked,
    }


def _check_promises(report: Mapping[str, Any]) -> None:
    assert report["counted"] == report["planned"]
    for tier, peak_bytes in report["peak"].items():
        assert peak_bytes <= report["planned peak"].get(tier, 0), tier


def _check_greedy(reports: Sequence[Any], wanted: list[list[int]]) -> None:
    """Every rank has the answers, each layer lies on one rank, and the ledgers are as planned."""
    for report in reports:
        assert "error" not in report, report
        assert [each["tokens"][0] for each in report["answers"]] == wanted
        _check_promises(report)
    runs = [report["layers"] for report in reports]
    assert runs[0][0] == 0
    assert runs[-1][1] == 3
    assert all(before[1] == after[0] for before, after in pairwise(runs))
    for rank, (before, after) in enumerate(pairwise(reports)):
        link = f"rank {rank}->rank {rank + 1}"
        assert before["counted"][link]["activations"] == after["counted"][link]["activations"] > 0


TWO = [
    ("llama", NEAR, (2, 3)),
    ("llama", STREAMED, (1, 2)),
    ("llama", HALF, (5, 1)),
    ("opt", FAR, (2, 3)),
    ("opt", STREAMED, (1, 3)),
    ("gemma2", HALF, (1, 3)),
    ("gemma2", "", (0, 0)),
    ("qwen2", NEAR, (1, 2)),  # whose input embedding is its output matrix
]


def test_two_ranks(
    run_world: Callable[..., Any],
    model_folder: Callable[[str], Path],
    expected: Callable[[str], list[list[int]]],
    open_reference: Callable[[Path], Any],
    text_model: Path,
    requests: list[Request],
) -> None:
    """Greedy answers, scores, asked-for probabilities, samples, answers that end early, tight budgets."""
    cases = [_case(model_folder(name), requests, place, shape, 2) for name, place, shape in TWO]
    llama, greedy = model_folder("llama"), len(cases)
    texts = [list(range(3, 3 + length)) for length in (1, 14, 6, 2, 9)]
    cases.append(_case(llama, [], STREAMED, (1, 2), 2) | {"texts": texts})
    wide, narrow = AMPLE, {"device": 700 << 10, "host": 400 << 10, "disk": 100 << 20}
    cases.append(_case(llama, requests, "", (0, 0), 2) | {"budgets": [wide, narrow]})
    cases.append(_case(llama, requests, "", (0, 0), 2) | {"budgets": [wide, wide | {"device": 1 << 10}]})
    sampled = {"prompt": [5, 9, 2, 7], "max_tokens": 6, "temperature": 0.9, "seed": 3, "n": 3, "logprobs": 2}
    scored = {"prompt": [4, 8, 1], "max_tokens": 2, "prompt_logprobs": 1}
    shared = [{"prompt": [*range(20), last], "max_tokens": 3} for last in (30, 31, 32)]
    cases.append(_case(llama, [], NEAR, (1, 2), 2) | {"requests": [sampled, scored]})
    cases.append(_case(llama, [], STREAMED, (1, 3), 2) | {"requests": shared})
    ending = [{"prompt": [0, 30 + at], "max_tokens": 24} for at in range(8)]
    cases.append(_case(text_model, [], STREAMED, (1, 2), 2) | {"requests": ending})
    plain = {"prompt": [5, 9, 2, 7], "max_tokens": 9, "ignore_eos": True}
    penalised = [plain | {"repetition_penalty": 1.8}, plain, plain | {"logit_bias": [[7, 100.0]]}]
    cases.append(_case(llama, [], STREAMED, (1, 2), 2) | {"requests": penalised})
    found = run_world(2, cases)

    for (name, *_), reports in zip(TWO, found, strict=False):
        _check_greedy(reports, expected(name))
    assert "2 waves" in found[0][0]["waves"]
    scores, unequal, refused, asked, prefixed, early, less_likely = found[greedy:]

    reference = open_reference(llama)
    for report in scores:
        _check_promises(report)
        for text, logprobs in zip(texts, report["answers"], strict=True):
            wanted = reference.logprobs(text)[:-1].gather(1, torch.tensor(text)[1:, None])[:, 0]
            assert logprobs == pytest.approx(wanted.tolist(), abs=TOLERANCE)

    _check_greedy(unequal, expected("llama"))
    assert unequal[1]["planned peak"]["device"] <= narrow["device"] < unequal[0]["planned peak"]["device"]
    for report in refused:
        assert report["error"].startswith("DoesNotFit: Rank 1: The device needs")

    assert asked[0]["answers"] == asked[1]["answers"]
    first, second = asked[0]["answers"]
    assert len({tuple(tokens) for tokens in first["tokens"]}) > 1
    after = reference.logprobs([5, 9, 2, 7])[-1]
    for tokens, scored_tokens in zip(first["tokens"], first["logprobs"], strict=True):
        assert [entry[0] for entry in scored_tokens] == tokens
        assert all(len(entry[2]) == 2 for entry in scored_tokens)
        assert scored_tokens[0][1] == pytest.approx(float(after[tokens[0]]), abs=TOLERANCE)
    assert [entry[0] for entry in second["prompt"]] == [8, 1]

    wanted = [reference.greedy(request["prompt"], 3) for request in shared]
    _check_greedy(prefixed, wanted)
    stopping = open_reference(text_model)
    for report in early:
        answers = report["answers"]
        for request, answer in zip(ending, answers, strict=True):
            assert answer["tokens"][0] == stopping.greedy(request["prompt"], 24, eos_token_id=1)
    assert early[0]["answers"] == early[1]["answers"]
    prompt = plain["prompt"]
    wanted = [reference.greedy(prompt, 9, repetition_penalty=1.8), reference.greedy(prompt, 9), [7] * 9]
    assert wanted[0] != wanted[1]
    _check_greedy(less_likely, wanted)


def test_three_ranks(
    run_world: Callable[..., Any],
    model_folder: Callable[[str], Path],
    expected: Callable[[str], list[list[int]]],
    requests: list[Request],
) -> None:
    """A rank in the middle has neither end; fewer batches than ranks make fewer waves."""
    places = [("llama", NEAR, (1, 3)), ("opt", STREAMED, (2, 2)), ("gemma2", FAR, (1, 5))]
    cases = [_case(model_folder(name), requests, place, shape, 3) for name, place, shape in places]
    for (name, *_), reports in zip(places, run_world(3, cases), strict=True):
        _check_greedy(reports, expected(name))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_every_family_over_ranks(
    run_world: Callable[..., Any],
    model_folder: Callable[[str], Path],
    expected: Callable[[str], list[list[int]]],
    requests: list[Request],
    size: int,
) -> None:
    families = ["opt", "opt-350m-like", "gpt2", "llama", "qwen3", "mistral", "gemma", "gemma2", "gemma3"]
    families += ["mixtral", "qwen3-moe", "phi3", "gpt-neox"]
    places = [(NEAR, (2, 3)), (STREAMED, (1, 2)), (FAR, (1, 3)), (HALF, (5, 1))]
    asked = [(name, *place) for name in families for place in places]
    cases = [_case(model_folder(name), requests, place, shape, size) for name, place, shape in asked]
    for (name, *_), reports in zip(asked, run_world(size, cases), strict=True):
        _check_greedy(reports, expected(name))


# --- decisions without processes -------------------------------------------------------------------------

_EVEN = Capacity(1e9, 1e9, 1e9, 1e8, 1e7)


def test_equal_ranks_get_equal_shares() -> None:
    assert divide([10] * 6, 0, [_EVEN] * 3) == [range(2), range(2, 4), range(4, 6)]


def test_the_last_rank_gets_fewer_layers_for_its_output_matrix() -> None:
    assert divide([10] * 6, 40, [_EVEN] * 2) == [range(5), range(5, 6)]


def test_a_rank_with_little_device_memory_gets_fewer_layers() -> None:
    small = _EVEN._replace(device_bytes=20)
    assert divide([10] * 8, 0, [_EVEN, small]) == [range(6), range(6, 8)]


def test_every_rank_gets_a_layer() -> None:
    slow = _EVEN._replace(device_bytes_per_s=1.0)
    assert divide([10] * 3, 0, [slow, slow, _EVEN]) == [range(1), range(1, 2), range(2, 3)]


def test_with_as_many_waves_as_ranks_the_slowest_rank_sets_the_pace() -> None:
    ends = pipelined([[1.0] * 8, [2.0] * 8], waves=2)
    assert ends[1] == [3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0, 17.0]


def test_with_one_wave_ranks_take_turns() -> None:
    assert pipelined([[1.0] * 3, [2.0] * 3], waves=1) == [[1.0, 4.0, 7.0], [3.0, 6.0, 9.0]]
