"""Texts as samples of token ids: a text file, or a file of JSON lines, each with a `text`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capstan.errors import InputError, require_extra

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def byte_tokens(path: Path) -> Tensor:
    """The file's bytes; of JSON lines those of the texts, a line feed between two."""
    found = "\n".join(_documents(path)).encode() if _is_json_lines(path) else _read(path)
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).long() if found else torch.zeros(0).long()


def model_tokens(path: Path, folder: Path, vocabulary_size: int) -> Tensor:
    """The ids that the tokenizer in `folder` gives to the file's texts, one after another, each followed by
    the tokenizer's end of sequence if it has one.

    Raises:
        InputError: no such file, not a text, no tokenizer, or an id for which the model has no embedding.
    """
    tokenizer = _tokenizer(folder)
    ids: list[int] = []
    for text in _documents(path):
        ids += tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
    if ids and max(ids) >= vocabulary_size:
        raise InputError(
            f"The tokenizer in {folder} gives {path} the token id {max(ids)}, and the model's embedding has "
            f"{vocabulary_size} rows, for ids below that. Put the tokenizer there with which the model was "
            "trained."
        )
    return torch.tensor(ids, dtype=torch.long)


def rows_of(tokens: Tensor, sequence: int, *, at_least: int, path: Path) -> Tensor:
    """Samples [samples, sequence + 1]: each begins with the last token of the one before.

    Raises:
        InputError: there are fewer than `at_least`.
    """
    count = (len(tokens) - 1) // sequence
    if count < at_least:
        raise InputError(
            f"{path} has {len(tokens)} tokens; {at_least} samples of {sequence} tokens and what follows them "
            f"need {at_least * sequence + 1}. Name a longer text or a shorter --sequence."
        )
    return tokens[: count * sequence + 1].unfold(0, sequence + 1, sequence)


def _is_json_lines(path: Path) -> bool:
    return path.suffix == ".jsonl"


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"There is no file {path}. Name a text file, or one of JSON lines (.jsonl).")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _documents(path: Path) -> Sequence[str]:
    try:
        text = _read(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text in UTF-8: byte {error.start} is none. Convert it.") from error
    if not _is_json_lines(path):
        return [text]
    # Not splitlines: JSON may hold other ends of lines as letters.
    numbered = enumerate(text.split("\n"), start=1)
    return [_document(line, f"Line {number} of {path}") for number, line in numbered if line.strip()]


def _document(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}. Give one object a line.") from error
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise InputError(f'{where} has no text. Give one object a line, as {{"text": "…"}}.')
    text: str = found["text"]
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{where} has half of a surrogate pair, which is no letter. Write the text anew.")
    return text


def _tokenizer(folder: Path) -> Any:
    require_extra("generation", "transformers", "tokenizers")
    from transformers import AutoTokenizer  # takes seconds

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(f"{folder} has no tokenizer. Put the model's own there, such as its tokenizer.json.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's own files lead to
        raise InputError(f"The tokenizer in {folder} cannot be read: {error}") from error
