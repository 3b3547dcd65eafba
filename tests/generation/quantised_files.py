"""Tiny checkpoints in the formats in which quantised models are published, each written from its definition.

`write(kind, source, target)` quantises the matrices of the layers in folder `source`; `plain` gets the values
that the format's codes, scales and zero points stand for.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Written(NamedTuple):
    """The tensors that a matrix becomes, by what is put in the place of "weight", and its values."""

    tensors: dict[str, Tensor]
    values: Tensor


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes `[rows, columns]` in words of 32 bits along the columns, filled up with 0."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per_word)).unflatten(
        1, (-1, per_word)
    )
    packed = sum(codes[..., place] << (bits * index) for index, place in enumerate(order or range(per_word)))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def _grouped(weight: Tensor, bits: int, group_of: Tensor, *, symmetric: bool) -> tuple[Tensor, ...]:
    """Codes from 0 on, `[rows, columns]`; each group's scale (float16) and zero point, `[rows, groups]`."""
    most, num_groups = 2**bits - 1, int(group_of.max()) + 1
    members = [weight[:, group_of == group] for group in range(num_groups)]
    high = torch.stack([each.amax(1).clamp(min=0) for each in members], 1)
    low = torch.stack([each.amin(1).clamp(max=0) for each in members], 1)
    if symmetric:
        scales = (torch.maximum(high, -low) * 2 / most).half()
        zeros = torch.full_like(low, 2 ** (bits - 1))
    else:
        scales = ((high - low) / most).half()
        zeros = (-low / scales.float()).round().clamp(0, most)
    codes = (weight / scales.float()[:, group_of] + zeros[:, group_of]).round().clamp(0, most)
    return codes, scales, zeros


def _values(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    return (codes - zeros[:, group_of]) * scales.float()[:, group_of]


def _groups(columns: int, size: int, shuffled: bool = False) -> Tensor:
    group_of = torch.arange(columns) // size
    return (
        group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
        if shuffled
        else group_of
    )


def fp8_blocks(weight: Tensor) -> Written:
    rows, columns = torch.arange(weight.shape[0]) // 40, torch.arange(weight.shape[1]) // 48
    scales = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            scales[row, column] = weight[rows == row][:, columns == column].abs().max() / 448
    spread = scales[rows][:, columns]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return Written({"weight": codes, "weight_scale_inv": scales}, codes.float() * spread)


def fp8_exponents(weight: Tensor) -> Written:
    """Scales that are powers of 2, as bytes."""
    exponent = (weight.abs().max() / 448).log2().ceil()
    codes = (weight / exponent.exp2()).to(torch.float8_e4m3fn)
    scale = (exponent + 127).to(torch.uint8).view(1, 1)
    return Written({"weight": codes, "weight_scale_inv": scale}, codes.float() * exponent.exp2())


def fp8_tensor(weight: Tensor) -> Written:
    scale = (weight.abs().max() / 448).bfloat16().view(1)
    codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    extra = {"weight_scale": scale, "input_scale": torch.ones(1)}
    return Written({"weight": codes} | extra, codes.float() * scale.float())


def fp8_rows(weight: Tensor) -> Written:
    scales = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return Written({"weight": codes, "weight_scale": scales}, codes.float() * scales)


def int8_rows(weight: Tensor) -> Written:
    codes, scales, zeros = _grouped(weight, 8, _groups(weight.shape[1], 999), symmetric=False)
    tensors = {"weight": codes - 128, "weight_zero_point": zeros - 128}
    tensors = {name: each.to(torch.int8) for name, each in tensors.items()}
    return Written(tensors | {"weight_scale": scales}, (codes - zeros) * scales.float())


def packed(bits: int, size: int, *, symmetric: bool, shuffled: bool = False) -> Callable[[Tensor], Written]:
    def write(weight: Tensor) -> Written:
        group_of = _groups(weight.shape[1], size, shuffled)
        codes, scales, zeros = _grouped(weight, bits, group_of, symmetric=symmetric)
        tensors = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.T, bits).T
        if shuffled:
            tensors["weight_g_idx"] = group_of.int()
        return Written(tensors, _values(codes, scales, zeros, group_of))

    return write


def gptq(
    bits: int, size: int, *, symmetric: bool, shuffled: bool = False, less: int = 1
) -> Callable[[Tensor], Written]:
    def write(weight: Tensor) -> Written:
        group_of = _groups(weight.shape[1], size, shuffled)
        codes, scales, zeros = _grouped(weight, bits, group_of, symmetric=symmetric)
        stored = (zeros - less) % 2**bits
        tensors = {
            "qweight": words(codes, bits).T,
            "qzeros": words(stored.T, bits),
            "scales": scales.T,
            "g_idx": group_of.int(),
        }
        return Written(tensors, _values(codes, scales, zeros, group_of))

    return write


def awq(weight: Tensor) -> Written:
    group_of = _groups(weight.shape[1], 32)
    codes, scales, zeros = _grouped(weight, 4, group_of, symmetric=False)
    tensors = {
        "qweight": words(codes.T, 4, AWQ_ORDER),
        "qzeros": words(zeros.T, 4, AWQ_ORDER),
        "scales": scales.T,
    }
    return Written(tensors, _values(codes, scales, zeros, group_of))


def _tensors_config(layout: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def _fp8_config(block: list[int]) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}


def _gptq_config(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, **more}


class Kind(NamedTuple):
    config: dict[str, Any]
    write: Callable[[Tensor], Written]


KINDS: Mapping[str, Kind] = {
    "fp8-blocks": Kind(_fp8_config([40, 48]), fp8_blocks),
    "fp8-exponents": Kind(_fp8_config([128, 128]), fp8_exponents),
    "fp8-tensor": Kind(
        _tensors_config("float-quantized", num_bits=8, type="float", strategy="tensor"), fp8_tensor
    ),
    "fp8-rows": Kind(
        _tensors_config("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_rows
    ),
    "fp8-blocks-ct": Kind(
        _tensors_config("float-quantized", num_bits=8, strategy="block", block_structure=[40, 48]),
        lambda weight: Written(
            {name.removesuffix("_inv"): each for name, each in fp8_blocks(weight).tensors.items()},
            fp8_blocks(weight).values,
        ),
    ),
    "int8-rows": Kind(_tensors_config("int-quantized", num_bits=8, strategy="channel"), int8_rows),
    "packed4": Kind(
        _tensors_config("pack-quantized", num_bits=4, group_size=32, strategy="group"),
        packed(4, 32, symmetric=True),
    ),
    "packed4-asymmetric": Kind(
        _tensors_config("pack-quantized", num_bits=4, group_size=40, symmetric=False),
        packed(4, 40, symmetric=False),
    ),
    "packed4-ordered": Kind(
        _tensors_config("pack-quantized", num_bits=4, group_size=32, actorder="group"),
        packed(4, 32, symmetric=False, shuffled=True),
    ),
    "packed8-rows": Kind(
        _tensors_config("pack-quantized", num_bits=8, group_size=None, strategy="channel"),
        packed(8, 999, symmetric=True),
    ),
    "gptq4": Kind(_gptq_config(4, 32, sym=True), gptq(4, 32, symmetric=True)),
    "gptq4-asymmetric": Kind(_gptq_config(4, 40, sym=False), gptq(4, 40, symmetric=False)),
    "gptq4-ordered": Kind(_gptq_config(4, 32, desc_act=True), gptq(4, 32, symmetric=False, shuffled=True)),
    "gptq4-v2": Kind(_gptq_config(4, 32, checkpoint_format="gptq_v2"), gptq(4, 32, symmetric=False, less=0)),
    "gptq8": Kind(_gptq_config(8, -1, sym=True), gptq(8, 999, symmetric=True)),
    "gptq2": Kind(_gptq_config(2, 16, sym=False), gptq(2, 16, symmetric=False)),
    "awq": Kind(
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq
    ),
}


def write(kind: str, source: Path, target: Path, plain: Path) -> None:
    """Folder `source` in format `kind` as `target`, and with the values that it stands for as `plain`."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    stored, values = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if (
            ".layers." in name
            and name.endswith(".weight")
            and tensor.dim() == 2
            and ".gate.weight" not in name
        ):
            written = KINDS[kind].write(tensor.float())
            del stored[name]
            stored |= {
                name.removesuffix("weight") + each: part.contiguous()
                for each, part in written.tensors.items()
            }
            values[name] = written.values
    for folder, content in ((target, stored), (plain, values)):
        shutil.copytree(source, folder)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    state(target, KINDS[kind].config)


def state(folder: Path, quantisation: Mapping[str, Any]) -> None:
    """Let config.json say how the weights are quantised."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantisation}))
