"""On a GPU too the answers are those of transformers, and its memory stays within the plan."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.generation import Engine, Request
from capstan.generation.planning.memory import SAMPLING_BYTES_PER_LOGIT
from capstan.generation.runtime.sampling import Draw, choose
from capstan.transport import stream_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _float32_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    square = torch.ones(8, 8, device="cuda")
    with torch.cuda.stream(stream_of(square.device, "compute")):
        # For each stream that multiplies, cuBLAS and cuBLASLt keep a workspace.
        torch.nn.functional.linear(square, square, square[0]).mm(square)
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def engine(
    family: str,
    place: list[str],
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    make_machine: Callable[..., Any],
) -> Iterator[Engine]:
    machine = make_machine("cuda")
    with open_engine(
        model_folder(family), place=place, device="cuda", device_memory="400MiB", machine=machine
    ) as engine:
        yield engine


@pytest.mark.usefixtures("block")
def test_greedy_answers_on_a_gpu_equal_transformers_and_memory_stays_within_the_plan(
    engine: Engine,
    family: str,
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    before = torch.cuda.memory_allocated()
    assert answers_of(engine, requests) == expected(family)
    check_promises(engine)
    assert torch.cuda.memory_allocated() <= before + 2**20, "a job gives its memory back"


def test_bits_on_a_gpu_answer_as_they_do_on_the_processor(
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    make_machine: Callable[..., Any],
    requests: list[Request],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        with open_engine(
            model_folder("llama"),
            weight_bits=4,
            cache_bits=8,
            device=device,
            device_memory="400MiB",
            machine=make_machine(device),
            place=["weights=host cache=host attention=device"],
        ) as engine:
            answers.append(answers_of(engine, requests))
    assert answers[0] == answers[1]


def test_penalties_and_bias_on_a_gpu_answer_as_on_the_processor_within_the_plan(
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    make_machine: Callable[..., Any],
    requests: list[Request],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    settings: list[dict[str, Any]] = [
        {"repetition_penalty": 1.8, "min_p": 0.05, "temperature": 0.7, "seed": 1},
        {},
        {"presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"logit_bias": {7: 100.0, 9: -100.0}},
        {"logit_bias": {3: 4.5}, "repetition_penalty": 0.6, "min_tokens": 3, "stop_token_ids": (3,)},
    ]
    asked = [replace(each, **more) for each, more in zip(requests, settings, strict=True)]
    answers = []
    for device in ("cpu", "cuda"):
        with open_engine(
            model_folder("llama"), device=device, device_memory="400MiB", machine=make_machine(device)
        ) as engine:
            answers.append(answers_of(engine, asked))
            check_promises(engine)
    assert answers[0] == answers[1]
    assert answers[0][3] == [7] * requests[3].max_tokens


@pytest.mark.parametrize("vocabulary", [32_000, 50_272, 128_256, 151_936])
@pytest.mark.parametrize("changes", [False, True])
def test_sampling_on_a_gpu_needs_no_more_memory_than_is_foreseen(vocabulary: int, changes: bool) -> None:
    rows = 64
    draws = [
        Draw(
            temperature=0.7,
            top_k=50,
            top_p=0.9,
            seed=row,
            step=0,
            banned=frozenset({3}) if changes else frozenset(),
            min_p=0.01 if changes else 0.0,
            bias={5: 1.0} if changes else {},
        )
        for row in range(rows)
    ]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    choose(torch.randn(rows, vocabulary, device="cuda"), draws)
    assert torch.cuda.max_memory_allocated() - before <= rows * vocabulary * SAMPLING_BYTES_PER_LOGIT["cuda"]
