"""Text in pieces: whatever the tokens and however many come at a time, the pieces are the text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capstan.generation.detokenizer import texts_of
from capstan.generation.requests import Request
from capstan.generation.runtime.sequences import Sequence
from capstan.generation.serving.streams import TextSoFar

# Bytes that are letters of one to four bytes, whole or cut in the middle.
STOPS = st.lists(st.text("ab\u20ac ", min_size=1, max_size=4), max_size=2)
TEXTS = st.text(alphabet="ab\u00e9\u20ac\U0001f6a2 \n", max_size=40)


class ByteTokenizer:
    """Every byte is a token, so that most letters come in several."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(tokens).decode(errors="replace")


def _pieces(
    tokens: list[int], cuts: list[int], stop: tuple[str, ...], tokenizer: Any
) -> tuple[list[str], str]:
    """The pieces of a sequence that gets these tokens one by one, looked at after some; and its text."""
    growing = Sequence(
        request=Request(prompt=[1], max_tokens=max(1, len(tokens)), stop=stop),
        request_index=0,
        answer=0,
        prompt=[1],
        stop_tokens=frozenset(),
        tokenizer=tokenizer,
    )
    so_far = TextSoFar(texts_of(tokenizer), growing.prompt, stop)
    pieces = []
    for number, token in enumerate(tokens):
        growing.append(token)
        if growing.finish_reason is not None:
            break
        if number in cuts:
            pieces.append(so_far.grow(growing.generated))
    text = growing.finished().text
    return [*pieces, so_far.finish(text)], text


@given(TEXTS, st.sets(st.integers(0, 159)), STOPS)
def test_the_pieces_of_an_answer_are_its_text_and_no_stop_text_shows_in_them(
    text: str, cuts: set[int], stop: list[str]
) -> None:
    tokens = list(text.encode())
    if not tokens:
        return
    pieces, whole = _pieces(tokens, sorted(cuts), tuple(stop), ByteTokenizer())
    assert "".join(pieces) == whole
    assert not any(each in whole for each in stop)
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40), st.sets(st.integers(0, 40)))
def test_bytes_that_are_no_text_come_as_they_do_in_the_whole(tokens: list[int], cuts: set[int]) -> None:
    pieces, whole = _pieces(tokens, sorted(cuts), (), ByteTokenizer())
    assert "".join(pieces)[: len(whole)] == whole


@pytest.fixture(scope="module")
def tokenizer(text_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(text_model)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_real_tokenizers_pieces_are_its_text(tokenizer: Any, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=30))
    cuts = data.draw(st.sets(st.integers(0, 30)))
    pieces, whole = _pieces(tokens, sorted(cuts), (), tokenizer)
    assert "".join(pieces) == whole
