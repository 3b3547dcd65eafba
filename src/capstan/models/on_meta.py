"""Models built without memory for their parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capstan.errors import InputError, UnsupportedModel


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Every parameter registered inside goes to the meta device; buffers stay real.

    `torch.empty` of a large matrix costs nothing until it is touched, and initialisers see meta tensors.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_on_meta(folder: Path, dtype: torch.dtype | None, *, attention: str | None) -> tuple[Any, Any]:
    """transformers' causal language model of `folder`, its parameters on the meta device; and its config.

    Args:
        dtype: what the model computes in; None keeps the checkpoint's own.
        attention: transformers' name of an attention; None for its own choice.

    Raises:
        InputError: no readable config.json.
        UnsupportedModel: transformers knows no such model, cannot build it, or it is an encoder-decoder.
    """
    config = _read_config(folder)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{config.model_type!r} in {folder} is an encoder-decoder; give a decoder-only model."
        )
    from transformers import AutoModelForCausalLM

    if dtype is not None:
        config.dtype = dtype
    try:
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=config.dtype or torch.float32
            )
    except Exception as error:  # whatever a model's own code, or a config that lacks something, leads to
        if attention is not None and isinstance(error, KeyError) and error.args == (attention,):
            raise UnsupportedModel(
                f"{config.model_type!r} in {folder} chooses its attention from its own list: it does not go "
                "through transformers' attention interface, so its KV cache cannot be placed."
            ) from error
        raise UnsupportedModel(
            f"transformers cannot build {config.model_type!r} from {folder} for this engine: {error}"
        ) from error
    return model, config


def _read_config(folder: Path) -> Any:
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has no config.json. Name a folder in Hugging Face format.")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UnsupportedModel(f"transformers does not know the model in {folder}: {error}") from error
