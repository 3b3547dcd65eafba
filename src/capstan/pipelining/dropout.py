"""Which dropout a model applies: it makes a sample's activations differ at every visit."""

from typing import Any

from torch import nn

from capstan.models import Stage

# Of heads that a causal language model does not have.
_ELSEWHERE = ("classifier", "summary", "classification")


def dropout_rates(model: nn.Module) -> dict[str, float]:
    """The rates above 0, by module; of a stage of a causal language model also those in its config, because
    attention applies its own without a module."""
    found = {
        name: each.p for name, each in model.named_modules() if isinstance(each, nn.Dropout) and each.p > 0
    }
    return found | (configured_rates(model.model.config) if isinstance(model, Stage) else {})


def configured_rates(config: Any) -> dict[str, float]:
    """The rates above 0 in transformers' config of a causal language model, by their keys."""
    return {
        name: float(value)
        for name, value in config.get_text_config().to_dict().items()
        if "drop" in name and not name.startswith(_ELSEWHERE)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
