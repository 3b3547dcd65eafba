"""Tokens that all prompts begin with are computed and stored once, and nothing else changes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capstan.generation import Engine, Request
from capstan.generation.planning.batching import Length
from capstan.generation.planning.prefixes import common_prefix

PREFIX = [(7 * at) % 120 + 1 for at in range(20)]
# One prompt has a single token of its own, one begins its own part like the end of the prefix.
PROMPTS = [[*PREFIX, *own] for own in ([5], [9, 9, 3, 4], [PREFIX[-1], 2, 8], list(range(40, 53)), [6, 1])]
NEW = [6, 3, 1, 5, 4]
FAMILIES = ["opt", "llama", "mistral", "gemma2", "gpt-neox", "mixtral"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(family: str, place: list[str], start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    with start_engine(family, place=place) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(
    open_reference: Callable[[Path], Any], model_folder: Callable[[str], Path], family: str
) -> list[list[int]]:
    reference = open_reference(model_folder(family))
    return [reference.greedy(prompt, count) for prompt, count in zip(PROMPTS, NEW, strict=True)]


@pytest.mark.covering(2)
@pytest.mark.usefixtures("block")
def test_answers_after_a_shared_prefix_equal_transformers_and_every_byte_was_predicted(
    engine: Engine,
    expected: list[list[int]],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    asked = [
        Request(prompt=prompt, max_tokens=count, ignore_eos=True)
        for prompt, count in zip(PROMPTS, NEW, strict=True)
    ]
    assert answers_of(engine, asked) == expected
    assert any(choice.name == "prefix" for choice in engine.plan.choices)
    check_promises(engine)


def test_a_shared_prefix_is_stored_once(start_engine: Callable[..., Engine]) -> None:
    with start_engine("llama", place=["weights=device cache=host attention=host"]) as engine:
        lengths = [Length(len(prompt), 4) for prompt in PROMPTS]
        alone, shared = (engine.plan_job(lengths, prefix=prefix) for prefix in (0, len(PREFIX)))
        rows = engine.model.num_layers * len(PREFIX) * (len(PROMPTS) - 1)
        saved = rows * engine.model.formats[0].row_bytes
    written = [each.plan.traffic.size_bytes["device->host", "cache"] for each in (alone, shared)]
    assert written[0] - written[1] == saved


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([PREFIX], 0),
        ([PREFIX, PREFIX], 19),
        ([PREFIX, [*PREFIX, 1, 2]], 19),
        ([[*PREFIX, 3], [*PREFIX, 1, 2]], 20),
        ([[*PREFIX, 3], [*PREFIX[:16], 121, 3], [*PREFIX, 7]], 16),
        ([[*PREFIX, 3], [*PREFIX[:15], 121, 3]], 0),
        ([PREFIX, [1]], 0),
    ],
)
def test_a_common_prefix_leaves_every_prompt_a_token(prompts: list[list[int]], shared: int) -> None:
    assert common_prefix(prompts) == shared
