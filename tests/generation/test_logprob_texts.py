"""Tokens beside their log-probabilities: texts, bytes, offsets, and no two of one name."""

from math import nan
from typing import Any

import pytest

from capstan.generation.batch.logprobs import LogprobWriter
from capstan.generation.requests import TokenLogprob
from made_tokenizers import TURN, byte_level, sentence_piece


def scored(token: int, *top: int) -> TokenLogprob:
    return TokenLogprob(token=token, logprob=-1.0, top=tuple((one, -1.0 - at) for at, one in enumerate(top)))


def split(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    before = tokenizer(prompt)["input_ids"]
    return before, tokenizer(prompt + answer)["input_ids"][len(before) :]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_tokens_of_a_completion_keep_their_spaces_and_offsets_are_places_in_its_text(make: Any) -> None:
    tokenizer = make()
    before, tokens = split(tokenizer, "Hello", " world foo cat")
    listed = LogprobWriter(tokenizer, before).completion([scored(token, token) for token in tokens])
    assert listed["tokens"] == [" world", " foo", " cat"]
    assert listed["text_offset"] == [0, 6, 10]
    assert listed["top_logprobs"] == [{" world": -1.0}, {" foo": -1.0}, {" cat": -1.0}]


def test_an_echoed_prompt_begins_at_zero_and_special_tokens_take_no_room() -> None:
    tokenizer = sentence_piece()
    tokens = tokenizer("Hello world")["input_ids"]
    entries = [TokenLogprob(token=tokens[0], logprob=nan), *map(scored, tokens[1:])]
    listed = LogprobWriter(tokenizer, ()).completion(entries)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert listed["tokens"][0] == "<s>"
    assert listed["token_logprobs"][0] is None
    shown = [
        (name, at) for name, at in zip(listed["tokens"], listed["text_offset"], strict=True) if name != "<s>"
    ]
    assert all(text.startswith(name, at) for name, at in shown)
    assert "".join(name for name, _ in shown) == text == "Hello world"


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_bytes_of_a_chats_tokens_are_the_bytes_of_its_text(make: Any) -> None:
    tokenizer = make()
    before, tokens = split(tokenizer, "Hello", " 😊é world")
    tokens.append(tokenizer.eos_token_id)
    content = LogprobWriter(tokenizer, before).chat([scored(token, token) for token in tokens])["content"]
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    assert joined.decode() == " 😊é world"
    assert [entry["bytes"] for entry in content] == [entry["top_logprobs"][0]["bytes"] for entry in content]
    parts = [entry for entry in content if len(entry["bytes"]) == 1 and entry["bytes"][0] >= 0x80]
    assert [entry["token"] for entry in parts][:4] == ["\\xf0", "\\x9f", "\\x98", "\\x8a"]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_parts_of_characters_are_told_apart(make: Any) -> None:
    tokenizer = make()
    before, parts = split(tokenizer, "Hello", "😊")
    listed = LogprobWriter(tokenizer, before).completion([scored(part, *parts[-4:]) for part in parts[-4:]])
    assert listed["tokens"] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x8a"]
    assert [len(top) for top in listed["top_logprobs"]] == [4] * 4
    assert len(set(listed["text_offset"])) == 1  # all of them make one character


def test_two_tokens_of_one_text_are_both_listed() -> None:
    tokenizer = sentence_piece()
    letter, byte = tokenizer.convert_tokens_to_ids(["a", "<0x61>"])
    listed = LogprobWriter(tokenizer, tokenizer("Hello")["input_ids"]).completion(
        [scored(letter, letter, byte)]
    )
    assert listed["top_logprobs"] == [{"a": -1.0, f"token_id:{byte}": -2.0}]


def test_a_special_token_is_listed_by_name() -> None:
    tokenizer = byte_level()
    (turn,) = tokenizer.convert_tokens_to_ids([TURN])
    entry = LogprobWriter(tokenizer, [1]).chat([scored(turn)])["content"][0]
    assert (entry["token"], entry["bytes"]) == (TURN, [])


def test_logprobs_of_a_prompt_have_the_text_of_each_token() -> None:
    tokenizer = sentence_piece()
    tokens = tokenizer("Hello world")["input_ids"]
    listed = LogprobWriter(tokenizer, ()).prompt([None, *map(scored, tokens[1:])], tokens)
    assert listed[0] is None
    assert "".join(
        each[str(token)]["decoded_token"] for token, each in zip(tokens[1:], listed[1:], strict=True)
    ) == ("Hello world")
