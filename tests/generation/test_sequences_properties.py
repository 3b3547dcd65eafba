"""Sequences while they grow: they end at the right token, for the right reason, with the right text."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from capstan.generation import Request
from capstan.generation.runtime.sequences import Sequence
from made_tokenizers import END, TURN, byte_level

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


# --- special tokens, ends that a request states, the least number of tokens -----------------------------


def _said(words: str, **settings) -> Sequence:
    """A sequence of the made-up tokenizer that has said these words, or as many as it takes."""
    tokenizer = byte_level()
    sequence = Sequence(
        request=Request(prompt=[1], **{"max_tokens": 99, **settings}),
        request_index=0,
        answer=0,
        prompt=tokenizer("Hello")["input_ids"],
        stop_tokens=frozenset({tokenizer.eos_token_id}),
        tokenizer=tokenizer,
    )
    for token in tokenizer(words)["input_ids"]:
        if sequence.finish_reason is None:
            sequence.append(token)
    return sequence


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        (TURN, " world", 2),
        (END, " world cat", 4),
        (f"{TURN} c", " world", 3),
        (f"world{TURN}", " ", 2),
        ("cat", " world ", 3),
    ],
)
def test_a_stop_text_may_hold_special_tokens(stop, text, num_tokens, ignore_eos):
    sequence = _said(f" world{TURN} cat{END} foo", stop=(stop, "never"), ignore_eos=ignore_eos)
    assert sequence.finish_reason == "stop"
    assert len(sequence.generated) == num_tokens
    assert sequence.finished().text == text


def test_a_stop_text_is_part_of_the_answer_where_that_is_asked_for():
    sequence = _said(" world foo cat", stop=("o f",), include_stop_str_in_output=True)
    assert sequence.finish_reason is None
    sequence = _said(" world foo cat", stop=("d f",), include_stop_str_in_output=True)
    assert sequence.finished().text == " world f"


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_token_that_a_request_names_ends_it_and_is_not_shown(ignore_eos):
    (foo,) = byte_level()(" foo")["input_ids"]
    settings = {"stop_token_ids": (foo,), "ignore_eos": ignore_eos}
    answer = _said(" world foo cat", **settings).finished()
    assert (answer.text, answer.finish_reason, len(answer.tokens)) == (" world", "stop", 2)
    shown = _said(" world foo cat", include_stop_str_in_output=True, **settings).finished()
    assert shown.text == " world foo"


def test_an_end_of_sequence_that_is_no_special_token_is_not_shown():
    sequence = _grown(TOKENIZER.encode("abc"), max_tokens=9, stop_tokens=frozenset({_VOCABULARY["abc"]}))
    assert sequence.finished().text == ""


def test_before_the_least_number_of_tokens_nothing_ends_an_answer():
    (foo,) = byte_level()(" foo")["input_ids"]
    sequence = _said(" world foo world foo", stop=("foo",), min_tokens=2)
    assert (len(sequence.generated), sequence.finished().text) == (4, " world foo world ")
    assert sequence.draw.banned == frozenset()
    waiting = _said(" world", stop_token_ids=(foo,), min_tokens=2)
    assert waiting.draw.banned == {foo, byte_level().eos_token_id}
    assert _said(" world", stop_token_ids=(foo,), min_tokens=2, ignore_eos=True).draw.banned == {foo}


# --- seeds ----------------------------------------------------------------------------------------------


def _seed(name: str, *, answer: int = 0, seed: int | None = None) -> int:
    sequence = _growing(temperature=1.0, seed=seed, id=name)
    sequence.answer = answer
    return sequence.draw.seed


@given(st.lists(st.text(max_size=8), unique=True, min_size=2, max_size=6))
def test_without_a_seed_every_request_and_choice_is_drawn_apart_and_always_the_same(names):
    places = [(name, answer) for name in names for answer in range(3)]
    seeds = [_seed(name, answer=answer) for name, answer in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [_seed(name, answer=answer) for name, answer in places]


@given(st.text(max_size=8), st.text(max_size=8), st.integers(-5, 5))
def test_a_stated_seed_decides_alone(one, other, seed):
    assert _seed(one, seed=seed) == _seed(other, seed=seed)
    assert _seed(one, seed=0) != _seed("x" + one)
