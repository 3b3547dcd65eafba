"""Whatever lies where and whatever is computed together, the answers are those of transformers."""

from collections.abc import Callable, Iterator

import pytest

from capstan.generation import Engine, Request


@pytest.fixture(scope="module")
def engine(family: str, place: list[str], start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    with start_engine(family, place=place) as engine:
        yield engine


@pytest.mark.covering(2)
@pytest.mark.usefixtures("block")
def test_greedy_answers_equal_transformers_token_for_token_and_every_byte_was_predicted(
    engine: Engine,
    family: str,
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    assert answers_of(engine, requests) == expected(family)
    check_promises(engine)
