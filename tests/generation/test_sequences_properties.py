"""Sequences while they grow: they end at the right token, for the right reason, with the right text."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from capstan.generation import Request
from capstan.generation.runtime.sequences import Sequence

# One token for each byte and a few for several: text of any language, cut in the middle of its characters.
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "a")]
_VOCABULARY = {token: index for index, token in enumerate([*_BYTES, "ab", "abc", "Ġa"])}


class _Tokenizer:
    """As much of a transformers tokenizer as a sequence needs."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(models.BPE(vocab=_VOCABULARY, merges=_MERGES))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)


TOKENIZER = _Tokenizer()
LETTERS = "abc é中😀"


def _growing(**settings) -> Sequence:
    stop_tokens = settings.pop("stop_tokens", frozenset())
    return Sequence(
        request=Request(prompt=[1, 2], **settings),
        request_index=0,
        answer=0,
        prompt=[1, 2],
        stop_tokens=stop_tokens,
        tokenizer=TOKENIZER,
    )


def _grown(tokens: list[int], **settings) -> Sequence:
    sequence = _growing(**settings)
    for token in tokens:
        sequence.append(token)
        if sequence.finish_reason is not None:
            break
    return sequence


@given(
    st.text(LETTERS, min_size=1, max_size=40),
    st.lists(st.text(LETTERS, min_size=1, max_size=12), min_size=1, max_size=3),
    st.data(),
)
@settings(deadline=None)
def test_a_stop_text_ends_the_answer_at_its_last_token_and_is_no_part_of_it(text, stops, data):
    start = data.draw(st.integers(0, len(text) - 1))
    stops = [*stops, text[start : start + data.draw(st.integers(1, 12))]]  # at least one that occurs
    tokens = TOKENIZER.encode(text)
    sequence = _grown(tokens, stop=tuple(stops), max_tokens=1000)

    def first_stop(seen: str) -> int | None:
        return min((place for stop in stops if (place := seen.find(stop)) >= 0), default=None)

    num_tokens = next(
        count
        for count in range(1, len(tokens) + 1)
        if first_stop(TOKENIZER.decode(tokens[:count], skip_special_tokens=True)) is not None
    )
    seen = TOKENIZER.decode(tokens[:num_tokens], skip_special_tokens=True)
    answer = sequence.finished()
    assert answer.finish_reason == "stop"
    assert list(answer.tokens) == tokens[:num_tokens]
    assert answer.text == seen[: first_stop(seen)]


def test_a_stop_text_of_many_bytes_a_character_is_found():
    tokens = TOKENIZER.encode("abc" + "😀" * 8)  # four tokens each
    sequence = _grown(tokens, stop=("😀" * 8,), max_tokens=1000)
    assert sequence.finish_reason == "stop"
    assert sequence.finished().text == "abc"


@given(st.text(LETTERS, min_size=1, max_size=30), st.text("xyz", min_size=1, max_size=3))
@settings(deadline=None)
def test_a_stop_text_that_never_comes_changes_nothing(text, stop):
    tokens = TOKENIZER.encode(text)
    answer = _grown(tokens, stop=(stop,), max_tokens=len(tokens)).finished()
    assert (answer.text, list(answer.tokens), answer.finish_reason) == (text, tokens, "length")


def test_a_stop_text_at_the_very_start_leaves_an_empty_answer():
    answer = _grown(TOKENIZER.encode("ab c"), stop=("a",), max_tokens=9).finished()
    assert (answer.text, answer.finish_reason) == ("", "stop")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12), st.booleans())
def test_end_of_sequence_ends_an_answer_unless_it_is_ignored(tokens, max_tokens, ignore_eos):
    assume(len(tokens) >= max_tokens)
    sequence = _grown(tokens, max_tokens=max_tokens, stop_tokens=frozenset({3, 7}), ignore_eos=ignore_eos)
    ends = [index + 1 for index, token in enumerate(tokens) if token in (3, 7)]
    stops_at = min(ends, default=99) if not ignore_eos else 99
    assert len(sequence.generated) == min(stops_at, max_tokens)
    assert sequence.finish_reason == ("stop" if stops_at <= max_tokens else "length")


def test_what_was_generated_counts_as_given_so_that_an_interrupted_sequence_goes_on():
    sequence = _growing(max_tokens=5)
    before = sequence.length
    sequence.append(7)
    sequence.append(8)
    assert (before.prompt, before.new) == (2, 5)
    assert (sequence.length.prompt, sequence.length.new) == (4, 3)
    assert [sequence.token(position) for position in range(4)] == [1, 2, 7, 8]
    assert sequence.draw.step == 2


@pytest.mark.parametrize("answers", [(0, 1), (1, 2)])
def test_every_answer_to_a_request_has_a_seed_of_its_own(answers):
    seeds = set()
    for answer in answers:
        sequence = _growing(max_tokens=5, temperature=1.0, seed=9)
        sequence.answer = answer
        seeds.add(sequence.draw.seed)
    assert len(seeds) == 2
