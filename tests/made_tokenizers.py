"""Tokenizers made up here, in the styles that text generation meets: no file, no download."""

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ("Hello", "world", "foo", "cat")
END, TURN = "<|end|>", "<|turn|>"


def _merged(vocabulary: dict[str, int], words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token, from left to right; what they make joins the vocabulary."""
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0]
        for letter in word[1:]:
            if (left, letter) not in merges:
                merges.append((left, letter))
            left += letter
            vocabulary.setdefault(left, len(vocabulary))
    return merges


def byte_level(words: Sequence[str] = WORDS) -> Any:
    """GPT-2's style: a token for each byte and for each word, with and without a space before it."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = _merged(vocabulary, [f"\u0120{word}" for word in words] + list(words))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    made.add_special_tokens({"additional_special_tokens": [TURN]})
    return made


def sentence_piece(words: Sequence[str] = WORDS) -> Any:
    """Llama 2's style: a sign for a space and one in front, bytes for other letters, `<s>` first."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{value:02X}>": 3 + value for value in range(256)}
    for letter in "\u2581abcdefghijklmnopqrstuvwxyzH":
        vocabulary.setdefault(letter, len(vocabulary))
    merges = _merged(vocabulary, [f"\u2581{word}" for word in words] + list(words))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
