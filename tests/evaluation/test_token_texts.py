"""Tokens say their text byte for byte, whatever the tokenizer's alphabet: in scores, windows and answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from capstan.evaluation import Limits, Token
from capstan.evaluation.metrics.basic import num_bytes
from capstan.evaluation.token_texts import GrowingText, cut_at_stops, num_covering, pieces_of
from capstan.evaluation.windows import text_windows

CORPUS = ["The house of the king stands on a hill, and the men of the town look up to it."] * 3
TEXTS = [
    "The house of the king stands.",
    "Сегодня хорошая погода, и мы идём гулять.",
    "今日は天気がいいので、散歩に行きます。",
    "Ça fait déjà 👍🏽 très  longtemps\n\n ",
    " a",
    "x\ufffdy",
]


def marked() -> PreTrainedTokenizerFast:
    """Word marks and bytes for what the vocabulary lacks, as SentencePiece has them."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    made.pre_tokenizer = None
    taken_off = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), *taken_off])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=350, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


TOKENIZERS = {"marked": marked(), "byte_level": byte_level()}


class Counting:
    """What windows need of a model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, longest: int) -> None:
        self.tokenizer = tokenizer
        prefix = tokenizer.bos_token or tokenizer.eos_token
        self.limits = Limits(max_sequence_length=longest - 1, max_request_length=longest, prefix_token=prefix)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("special", [True, False])
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=20)))
@settings(max_examples=40, deadline=None)
def test_pieces_joined_are_the_text(name, special, text):
    pieces = pieces_of(TOKENIZERS[name], text, adds_special=special)
    assert len(pieces.ids) == len(pieces.texts)
    if pieces.ids[special and name == "marked" :]:
        assert "".join(pieces.texts) == text
        assert num_bytes([Token(each, -1.0) for each in pieces.texts]) == len(text.encode())


class Slow:
    """A tokenizer that does not say where its tokens lie in a text."""

    is_fast = False

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer, self.decode = tokenizer, tokenizer.decode

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_without_offsets_says_the_text_too(name, text):
    slow = pieces_of(Slow(TOKENIZERS[name]), text, adds_special=False)
    assert "".join(slow.texts) == text
    assert slow.ids == pieces_of(TOKENIZERS[name], text, adds_special=False).ids


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_keeps_the_space_before_its_first_word(name, text):
    model = Counting(TOKENIZERS[name], 99)
    prompt = model.encode("The king:")
    whole = model.encode("The king:" + text)
    if whole[: len(prompt)] != prompt:
        pytest.fail("the prompt's tokens change with what follows")
    growing = GrowingText(model.decode, prompt)
    for token in whole[len(prompt) :]:
        growing.add(token)
    assert "".join(growing.finished()) == growing.text == text


def test_an_answer_that_ends_within_a_character_says_so():
    model = Counting(TOKENIZERS["byte_level"], 99)
    growing = GrowingText(model.decode, ())
    for token in model.encode("a今")[:-1]:
        growing.add(token)
    assert growing.text == "a"
    assert growing.finished()[0] == "a"
    assert growing.text == "a\ufffd"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("longest", [9, 12, 17])
@pytest.mark.parametrize("text", [*TEXTS[:4], " ".join(TEXTS[:4])])
def test_windows_predict_every_byte_of_a_text_once(name, longest, text):
    model = Counting(TOKENIZERS[name], longest)
    total = 0
    for window in text_windows(text, model):
        pieces = pieces_of(model.tokenizer, window.text, adds_special=False)
        assert len(pieces.ids) <= longest
        total += len("".join(pieces.texts[window.num_conditioning_tokens :]).encode())
    assert total == len(text.encode())


def test_a_choice_is_as_many_tokens_as_say_it():
    for tokenizer in TOKENIZERS.values():
        pieces = pieces_of(tokenizer, "The house: king", adds_special=False)
        count = num_covering(pieces.texts, " king")
        assert "".join(pieces.texts[-count:]) == " king"
    assert num_covering(["a", "b"], "") == 0
    assert num_covering(["a", "b"], "xxab") == 2


def test_what_lies_behind_a_stop_is_dropped_by_its_place_in_the_text():
    tokens = [Token(text, -1.0) for text in (" the", " king", "", "今", " ST", "OP", " and")]
    kept = cut_at_stops("".join(text for text, _ in tokens), tokens, [" STOP"], "length")
    assert kept.text == " the king今"
    assert kept.tokens == tuple(tokens[:4])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bytes:\\xe2\\x80", 2), ("bytes:\\x99", 1), ("bytes: \\xe2", 2), ("bytes:", 6),
        ("bytes:5", 7), ("é", 2), ("\ud800", 3),
    ],
)  # fmt: skip
def test_tokens_that_stand_for_bytes_count_those(text, size):
    assert num_bytes([Token(text, 0.0)]) == size
