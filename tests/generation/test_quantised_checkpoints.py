"""Checkpoints that others quantised answer as transformers does with the weights that they stand for."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.generation import quantised_files
from tests.generation.quantised_files import KINDS

from capstan.errors import InputError, UnsupportedModel
from capstan.generation import Engine, Request
from capstan.generation.model import open_model
from capstan.models.decoded_checkpoint import open_checkpoint

MIXED = ["weights=device:0.3,host:0.4,disk:0.3 cache=device:0.34,host:0.33,disk:0.33 activations=host"]


class Folders(NamedTuple):
    quantised: Path
    plain: Path


@pytest.fixture(scope="module")
def folders_of(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Folders]:
    """`folders_of(kind, family)`: a tiny model in a quantised format, and one with the same values, plain."""

    def folders_of(kind: str, family: str = "llama") -> Folders:
        work = tmp_path_factory.mktemp(kind)
        folders = Folders(work / "quantised", work / "plain")
        quantised_files.write(kind, model_folder(family), *folders)
        return folders

    return cache(folders_of)


def _scores(engine: Engine, requests: list[Request]) -> list[Any]:
    return [each.logprobs for each in engine.score([each.prompt for each in requests])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_answers_as_transformers_with_the_weights_that_it_stands_for(
    kind: str,
    requests: list[Request],
    folders_of: Callable[..., Folders],
    open_reference: Callable[[Path], Any],
    open_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    folders = folders_of(kind)
    reference = open_reference(folders.plain)
    with open_engine(folders.quantised, place=MIXED) as engine:
        assert answers_of(engine, requests) == [
            reference.greedy(each.prompt, each.max_tokens) for each in requests
        ]
        check_promises(engine)
        scores = _scores(engine, requests)
    with open_engine(folders.plain, place=MIXED) as engine:
        assert scores == _scores(engine, requests)  # the very same numbers: equal bit for bit


@pytest.mark.parametrize("kind", ["fp8-blocks", "packed4-asymmetric", "gptq4", "awq"])
def test_quantised_experts_are_stacked_as_plain_ones(
    kind: str,
    requests: list[Request],
    folders_of: Callable[..., Folders],
    open_engine: Callable[..., Engine],
    check_promises: Callable[[Engine], None],
) -> None:
    folders, scores = folders_of(kind, "mixtral"), []
    for folder in folders:
        with open_engine(folder, place=MIXED) as engine:
            scores.append(_scores(engine, requests[:2]))
            check_promises(engine)
    assert scores[0] == scores[1]


@pytest.mark.parametrize("place", ["weights=device", "weights=host", "weights=disk"])
@pytest.mark.parametrize("kind", ["fp8-rows", "gptq4"])
def test_where_decoded_weights_lie_changes_no_number(
    kind: str,
    place: str,
    requests: list[Request],
    folders_of: Callable[..., Folders],
    open_engine: Callable[..., Engine],
    check_promises: Callable[[Engine], None],
) -> None:
    folders = folders_of(kind)
    with open_engine(folders.plain) as engine:
        wanted = _scores(engine, requests)
    with open_engine(folders.quantised, place=[place]) as engine:
        assert _scores(engine, requests) == wanted
        check_promises(engine)


@pytest.mark.parametrize(
    ("kind", "bits"), [("fp8-blocks", 4), ("fp8-rows", 16), ("gptq8", 4), ("gptq4-ordered", 8)]
)
def test_bits_that_are_asked_for_are_those_of_the_plain_weights(
    kind: str,
    bits: int,
    requests: list[Request],
    folders_of: Callable[..., Folders],
    open_engine: Callable[..., Engine],
) -> None:
    scores = []
    for folder in folders_of(kind):
        with open_engine(folder, weight_bits=bits, place=MIXED) as engine:
            scores.append(_scores(engine, requests))
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("kind", "weight_bits", "bits_each"),
    [
        # Codes, and for each of the groups of 32 columns two numbers of 32 bits.
        ("gptq4", None, 4 + 64 / 32),
        ("awq", 8, 4 + 64 / 32),
        ("packed4", 4, 4 + 64 / 32),
        ("gptq4-ordered", None, 32),
        ("fp8-blocks", None, 32),
    ],
)
def test_integers_in_groups_keep_their_few_bits(
    kind: str, weight_bits: int | None, bits_each: float, folders_of: Callable[..., Folders]
) -> None:
    model = open_model(folders_of(kind).quantised, dtype=torch.float32, weight_bits=weight_bits)
    matrices = [each for unit in model.manifest.units[:-1] for each in unit if len(each.spec.shape) == 2]
    assert len(matrices) == 7 * model.num_layers
    assert {each.stored_bytes * 8 / each.spec.num_elements for each in matrices} == {bits_each}


@pytest.mark.parametrize("kind", KINDS)
def test_any_run_of_bytes_is_that_of_the_whole(kind: str, folders_of: Callable[..., Folders]) -> None:
    checkpoint = open_checkpoint(folders_of(kind).quantised)
    values = load_file(folders_of(kind).plain / "model.safetensors")
    for name in (
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "lm_head.weight",
    ):
        wanted = values[name].flatten().view(torch.uint8)
        assert checkpoint.tensors[name].shape == values[name].shape
        for start, size in ((0, len(wanted)), (4, 4), (1001, 5003), (len(wanted) - 7, 7), (256, 512)):
            found = torch.zeros(size, dtype=torch.uint8)
            checkpoint.read(name, found, start=start)
            assert torch.equal(found, wanted[start : start + size])
    checkpoint.close()


def test_a_cache_has_the_bits_of_the_weights_that_are_not_quantised(
    folders_of: Callable[..., Folders], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders_of("fp8-rows").quantised, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    halves = {
        name: each.bfloat16() if each.dtype == torch.float32 and "scale" not in name else each
        for name, each in tensors.items()
    }
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_model(folder)
    assert model.meta_model.compute_dtype == torch.bfloat16
    assert {each.codec.name for each in open_model(folder, dtype=torch.float32).formats} == {"cast:bfloat16"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "'bitsandbytes'.*it reads fp8, ",
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, "'mxfp4'"),
    "auto-round": ({"quant_method": "auto-round", "bits": 4}, "'auto-round'"),
    "fp4 experts": ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
    "bad block": ({"quant_method": "fp8", "weight_block_size": [128]}, r"blocks of \[128\]"),
    "gptq in 3 bits": ({"quant_method": "gptq", "bits": 3}, "'gptq'.*with bits 3"),
    "marlin": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "checkpoint_format 'marlin'",
    ),
    "old marlin": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format True"),
    "adapter": ({"quant_method": "gptq", "bits": 4, "adapter": {"name": "lora"}}, "adapter {'name': 'lora'}"),
    "dynamic": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:lm_head": {}, "+:.*down.*": {"bits": 8}}},
        "other settings for '.:..down..'",
    ),
    "group of 0": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "groups of 0"),
    "gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
    "no zero points": ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point False"),
    "nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        "format 'nvfp4-pack-quantized'",
    ),
    "sparse": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config",
    ),
    "rotated": (
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
        "transform_config",
    ),
    "two widths": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}},
        },
        "not all in the same 2, 4 or 8 bits",
    ),
    "nothing quantised": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "none of its tensors is"),
    "no words": ({"quant_method": "compressed-tensors", "config_groups": [1]}, "words that mean nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_format_that_is_not_read_is_refused_by_its_name(
    name: str, model_folder: Callable[[str], Path], open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    stated, message = REFUSED[name]
    quantised_files.state(folder, stated)
    with pytest.raises(UnsupportedModel, match=message):
        open_engine(folder)


def _without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {key: each for key, each in tensors.items() if key != name}


def _changed(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: tensors | {name: change(tensors[name])}


_Q = "model.layers.0.self_attn.q_proj"
DAMAGED: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no scale of FP8": (
        "fp8-blocks",
        _without(f"{_Q}.weight_scale_inv"),
        "weight_scale_inv' or .*_scale', without",
    ),
    "no scales": ("gptq4", _without(f"{_Q}.scales"), "no '.*q_proj.scales', without which they mean nothing"),
    "no zero points": ("awq", _without(f"{_Q}.qzeros"), "no '.*q_proj.qzeros'"),
    "no shape": ("packed4", _without(f"{_Q}.weight_shape"), "no '.*q_proj.weight_shape'"),
    "few scales": (
        "gptq4",
        _changed(f"{_Q}.scales", lambda each: each[:1]),
        "has shape .1, 64., which does not fit",
    ),
    "few blocks": (
        "fp8-blocks",
        _changed(f"{_Q}.weight_scale_inv", lambda each: each[:1, :1].repeat(1, 3)),
        "fit",
    ),
    "another shape": (
        "packed4",
        _changed(f"{_Q}.weight_shape", lambda each: each * 2),
        "matrix of shape .128, 128.",
    ),
    "groups beyond": ("gptq4", _changed(f"{_Q}.g_idx", lambda each: each + 1), "groups that are not there"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_together_is_named(
    name: str, folders_of: Callable[..., Folders], open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    kind, damage, message = DAMAGED[name]
    folder = shutil.copytree(folders_of(kind).quantised, tmp_path / "model")
    tensors = {
        key: each.contiguous() for key, each in damage(load_file(folder / "model.safetensors")).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        open_engine(folder)


def test_an_order_of_columns_that_was_never_filled_in_is_none(
    requests: list[Request],
    folders_of: Callable[..., Folders],
    open_engine: Callable[..., Engine],
    tmp_path: Path,
) -> None:
    folders = folders_of("packed4")
    folder = shutil.copytree(folders.quantised, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    orders = {
        name.removesuffix("packed") + "g_idx": torch.full(
            (int(tensors[name.removesuffix("packed") + "shape"][1]),), -1
        )
        for name in tensors
        if name.endswith("packed")
    }
    save_file(tensors | orders, folder / "model.safetensors", metadata={"format": "pt"})
    scores = []
    for each in (folder, folders.plain):
        with open_engine(each) as engine:
            scores.append(_scores(engine, requests))
    assert scores[0] == scores[1]


def test_matrices_that_stand_the_other_way_round_are_refused(
    model_folder: Callable[[str], Path], open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder("gpt2"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(each for each in tensors if each.endswith("attn.c_proj.weight"))  # square, so it would fit
    written = quantised_files.gptq(4, 32, symmetric=True)(tensors.pop(name)).tensors
    tensors |= {name.removesuffix("weight") + key: each.contiguous() for key, each in written.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantised_files.state(folder, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel keeps its matrices transposed"):
        open_engine(folder)
