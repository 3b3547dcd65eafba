"""From tokens to text: the answer goes on where the prompt ended, however its tokens come."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.generation.detokenizer import AnswerText, Detokenizer, TokenTexts
from made_tokenizers import END, TURN, byte_level, sentence_piece

TEXTS = st.text("Hello world foo cat é中😀", max_size=24)


@pytest.fixture(scope="module", params=[byte_level, sentence_piece])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> TokenTexts:
    return TokenTexts(tokenizer)


def fed(detokenizer: Detokenizer, tokens: list[int]) -> str:
    return "".join([*map(detokenizer.feed, tokens), detokenizer.flush()])


def test_an_answer_keeps_the_space_before_its_first_word(tokenizer: Any, texts: TokenTexts) -> None:
    prompt = tokenizer("Hello")["input_ids"]
    answer = tokenizer("Hello world foo")["input_ids"][len(prompt) :]
    assert texts.continuation(prompt, answer) == " world foo"
    assert fed(Detokenizer(texts, prompt), answer) == " world foo"


@given(data=st.data())
@settings(deadline=None)
def test_prompt_and_answer_together_are_the_text_of_all_tokens(
    tokenizer: Any, texts: TokenTexts, data: st.DataObject
) -> None:
    text = data.draw(TEXTS)
    tokens = tokenizer(text)["input_ids"]
    cut = data.draw(st.integers(0, len(tokens)))
    # A prompt that ends inside a character shows a sign for it, which the answer makes whole.
    prompt = tokenizer.decode(tokens[:cut], skip_special_tokens=True).rstrip("\ufffd")
    answer = texts.continuation(tokens[:cut], tokens[cut:])
    assert prompt + answer == tokenizer.decode(tokens, skip_special_tokens=True)
    assert fed(Detokenizer(texts, tokens[:cut]), tokens[cut:]) == answer


@given(data=st.data())
@settings(deadline=None)
def test_pieces_of_any_tokens_are_what_all_of_them_add(
    tokenizer: Any, texts: TokenTexts, data: st.DataObject
) -> None:
    some = st.lists(st.integers(0, len(tokenizer) - 1), max_size=20)
    prompt, tokens = data.draw(some), data.draw(some)
    assert fed(Detokenizer(texts, prompt), tokens) == texts.continuation(prompt, tokens)


@given(data=st.data())
@settings(deadline=None)
def test_bytes_of_tokens_are_the_bytes_of_their_text(
    tokenizer: Any, texts: TokenTexts, data: st.DataObject
) -> None:
    text = "Hello" + data.draw(TEXTS)
    tokens = tokenizer(text)["input_ids"]
    visible = [token for token in tokens if texts.is_visible(token)]
    found = [texts.bytes_of(token, is_first=at == 0) for at, token in enumerate(visible)]
    assert b"".join(found).decode() == tokenizer.decode(tokens, skip_special_tokens=True)


def test_every_byte_is_known_by_its_own_token(tokenizer: Any, texts: TokenTexts) -> None:
    for letter in ("é", "中", "😀"):
        parts = tokenizer("a" + letter)["input_ids"][-len(letter.encode()) :]
        assert [texts.bytes_of(part) for part in parts] == [bytes([value]) for value in letter.encode()]


def test_a_special_token_is_no_part_of_a_text_but_has_a_name() -> None:
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    turn, foo = tokenizer.convert_tokens_to_ids([TURN, "\u0120foo"])
    assert texts.continuation([foo], [foo, turn, foo]) == " foo foo"
    assert texts.text(turn) == TURN
    assert texts.bytes_of(turn) == b""


def test_a_place_among_special_tokens_is_one_in_the_text() -> None:
    tokenizer = byte_level()
    turn, end, foo, cat = tokenizer.convert_tokens_to_ids([TURN, END, "\u0120foo", "\u0120cat"])
    text = AnswerText(TokenTexts(tokenizer), [foo])
    for token in (foo, turn, cat, end, foo):
        text.feed(token)
    assert text.shown == f" foo{TURN} cat{END} foo"
    assert text.text == " foo cat foo"
    for stop, before in ((TURN, " foo"), (f"{TURN} c", " foo"), ("cat", " foo "), (END, " foo cat")):
        found = text.find([stop])
        assert found is not None
        assert text.until(found[0]) == before
    assert text.final([f"{END} food"]) == " foo cat"


def test_without_a_tokenizer_there_is_no_text() -> None:
    texts = TokenTexts(None)
    assert texts.continuation([1], [2, 3]) == ""
    assert texts.text(1) == ""
    assert texts.bytes_of(1) == b""
