"""What config.json says that no weight of this folder can be used for: refused before any is looked for."""

import json
import re
from pathlib import Path
from typing import Any

from capstan.errors import UnsupportedModel
from capstan.models.quantisation import Quantisation

# What transformers calls the classes of models with another head.
_OTHER_TASK = re.compile(r"For(?!CausalLM|ConditionalGeneration)([A-Z]\w*)$")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|\d+")


def refuse_other_models(folder: Path) -> None:
    """Raise `UnsupportedModel` for what is no causal language model, before its weights are looked for.

    A model that was trained for something else than the next token may have all tensors of one that was, and
    would answer with nonsense.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = _stated_config(folder)
    if not config and (folder / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{folder} holds an adapter, which only changes another model. Merge it into that (with PEFT's "
            "merge_and_unload), save the whole, and give that folder."
        )
    classes, kind = config.get("architectures"), str(config.get("model_type"))
    stated = str(classes[0]) if isinstance(classes, list) and classes else ""
    task = _OTHER_TASK.search(stated)
    if task and stated not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        words = " ".join(_WORD.findall(task[1]))
        raise UnsupportedModel(
            f"{folder} holds a {stated}, a model for {words!r}, which does not go on with a text; give a "
            "causal language model, such as one whose class ends in ForCausalLM."
        )
    is_known = kind in CONFIG_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if is_known and not config.get("is_encoder_decoder"):
        raise UnsupportedModel(
            f"{folder} holds a {stated or 'model'} of type {kind!r}, of which transformers has no causal "
            "language model; give one that goes on with a text."
        )


def refuse_quantised(folder: Path, advice: str) -> None:
    """Weights in a format of their own must be decoded by its rules.

    Raises:
        UnsupportedModel: config.json in `folder` says that the weights are quantised.
    """
    stated = stated_quantisation(folder)
    if stated is not None:
        raise stated.refused(f", which this engine does not read here. {advice}")


def stated_quantisation(folder: Path) -> Quantisation | None:
    """What config.json in `folder` says of quantised weights."""
    config = _stated_config(folder)
    parts = [part for part in (config, *config.values()) if isinstance(part, dict)]
    for key in ("quantization_config", "compression_config"):
        stated = next((part[key] for part in parts if part.get(key)), None)
        if stated is not None:
            settings = stated if isinstance(stated, dict) else {"quant_method": str(stated)}
            method = str(settings.get("quant_method", "unknown"))
            return Quantisation(method=method, stated=settings, folder=folder, key=key)
    return None


def _stated_config(folder: Path) -> dict[str, Any]:
    """What config.json says; empty where it cannot be read, which is told of where the model is built."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
