"""A folder's tokenizer that cannot be read: what is wrong with the folder is said."""

from pathlib import Path

import pytest

from capstan.errors import InputError
from capstan.evaluation.tokenizer_only import TokenizerOnly


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no folder .*nowhere\. Name a folder with a tokenizer"):
        TokenizerOnly(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "3", "[]", '{"a": 1}', '{"added_tokens": [], "model": {"type": "x"}}'])
def test_a_damaged_tokenizer_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=f"The tokenizer in {tmp_path} cannot be read"):
        TokenizerOnly(tmp_path)
