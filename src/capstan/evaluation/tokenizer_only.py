"""A model of which only the tokenizer is there: enough to compute metrics again, not to ask anything."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from capstan.errors import InputError, require_extra
from capstan.evaluation.models import Limits, Pair, Request, Result, Scored


class TokenizerOnly:
    """Counts tokens with the tokenizer in a folder.

    Raises:
        InputError: there is none.
    """

    def __init__(self, folder: Path) -> None:
        require_extra("generation", "transformers")
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"There is no tokenizer in {folder}: {error}") from error
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
