"""The page about this room: its example runs, its figures are right, its names are all there are."""

import re
from pathlib import Path

import torch

import capstan.codecs
from capstan.codecs import codec_from_name

PAGE = (Path(__file__).parents[2] / "docs" / "codecs.md").read_text()


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "docs/codecs.md", "exec"), {})


def test_bits_per_element_are_what_encoded_bytes_says():
    rows = re.findall(r"^\| `([^`]+)` \| ([0-9.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    for name, num_bits in rows:
        size = codec_from_name(name).encoded_bytes((64, 64), torch.float32)
        assert 8 * size / 64**2 == float(num_bits)


def test_the_public_names_are_complete():
    expected = ["Cast", "Codec", "ErrorFeedback", "GroupQuantised", "Identity", "MinMaxUInt8", "Packet"]
    expected += ["Compressor", "Delta", "RandomK", "Sign", "TopK", "codec_from_name"]
    assert sorted(capstan.codecs.__all__) == sorted(expected)
    assert all(hasattr(capstan.codecs, name) for name in expected)
