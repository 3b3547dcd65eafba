"""A model of which only the tokenizer is there: enough to compute metrics again, not to ask anything."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capstan.errors import InputError, require_extra
from capstan.evaluation.models import Limits, Pair, Request, Result, Scored


def read_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder.

    Raises:
        InputError: there is no folder, or no tokenizer that can be read in it.
    """
    require_extra("generation", "transformers")
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise InputError(
            f"There is no folder {folder}. Name a folder with a tokenizer in Hugging Face format."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a tokenizer's own files lead to
        raise InputError(f"The tokenizer in {folder} cannot be read: {error}") from error


class TokenizerOnly:
    """Counts tokens with the tokenizer in a folder.

    Raises:
        InputError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = read_tokenizer(folder)
        self.name, self.limits = folder.name, Limits()

    @property
    def identity(self) -> str:
        """It answers nothing, so nothing is kept under it."""
        return "tokenizer"

    def encode(self, text: str) -> list[int]:
        """A text's token ids."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Result]]:
        """Refuse."""
        raise InputError("Metrics are computed again from answers; nothing can be asked here.")

    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Scored]]:
        """Refuse."""
        raise InputError("Metrics are computed again from answers; nothing can be asked here.")

    def score_rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, Scored]]:
        """Refuse."""
        raise InputError("Metrics are computed again from answers; nothing can be asked here.")
