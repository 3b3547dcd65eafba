"""The bytes of version 1, written down: a change here breaks every stored packet and needs a new version."""

import pytest
import torch

from capstan.codecs import codec_from_name

GOLDEN = {
    "identity": "000080bf0000003fcdcccc3d00004040000080be0000004000000040000000400000004000000040",
    "cast:float32": "000080bf0000003fcdcccc3d00004040000080be0000004000000040000000400000004000000040",
    "cast:float16": "00bc0038662e004200b400400040004000400040",
    "cast:bfloat16": "80bf003fcd3d404080be00400040004000400040",
    "cast:float8_e4m3fn": "b8301d44a84040404040",
    "group2:4": "d400bc563d0000b4000000004000000000400000",
    "group3:3:bfloat16": "780180bf5c3e070080beee3e000000400000000000400000",
    "group4:3": "f00b00bc672e0f0000b4ef32000000400000000000400000",
    "group8:2": "00ff00bc071e00ff662ed321000000b40000000000400000000000400000000000400000",
    "group4:2:symmetric:float32:dim0": "e42549923ee92549923ee72549923eceb76ddb3ee62549923e",
    "group3:4:stochastic": "980e00bc9338000000b40000000000400000000000400000",
    "minmax8": "000080bf00004040000000000000000000000000000000000000000000000000006046ff30c0c0c0c0c0",
    "sign:8": "9a99ad3f000000401100",
    "topk:0.3": "032a000040400000004000000040",
    "randomk:0.3:float16": "140000000000000000bc00420040",
    "group3:5:symmetric:stochastic": "e23c003cb66d5639",
}

MESSAGE = (
    "43504b540100220000001800000000000000ae3407710867726f7570343a3307666c6f6174333202"
    "02000000000000000500000000000000f00b00bc672e0f0000b4ef32000000400000000000400000"
)


def _values() -> torch.Tensor:
    return torch.tensor([[-1.0, 0.5, 0.1, 3.0, -0.25], [2.0, 2.0, 2.0, 2.0, 2.0]])


@pytest.mark.parametrize("name", GOLDEN)
def test_payloads_of_version_1_keep_their_bytes(name):
    packet = codec_from_name(name).encode(_values(), seed=20)
    assert packet.payload.numpy().tobytes().hex() == GOLDEN[name]


def test_a_whole_message_of_version_1_keeps_its_bytes():
    message = codec_from_name("group4:3").encode(_values()).to_bytes()
    assert message.hex() == MESSAGE
