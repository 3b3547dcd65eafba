"""What answers cost: tokens, measured time, and the time of an ideal machine.

    time = prompt_time(n_in) + per_token * (n_out - 1) + overhead

`prompt_time` scales the smallest profiled length that holds the prompt; beyond the profile it is linear.

Source: HELM, `metrics/efficiency_metrics.py`. Differs: carbon and energy of *training* are left out, since
HELM's tables mix tons and kilograms and say nothing of a local model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capstan.errors import InputError, unknown_name
from capstan.evaluation.adapters import RequestState
from capstan.evaluation.metrics.aggregation import Answered
from capstan.evaluation.metrics.stat import Stat, stat


@dataclass(frozen=True, kw_only=True)
class RuntimeProfile:
    """Seconds to read a prompt of so many tokens, and to write one more."""

    prompt_s: Mapping[int, float]
    per_token_s: float
    overhead_s: float = 0.0

    def seconds(self, num_in: int, num_out: int) -> float:
        """The time of one request."""
        length = min((each for each in self.prompt_s if num_in <= each), default=max(self.prompt_s))
        total = self.prompt_s[length] * (num_in / length) + self.overhead_s
        return total + self.per_token_s * (num_out - 1) if num_out > 0 else total

    @classmethod
    def of_table(cls, table: Mapping[str, Any]) -> "RuntimeProfile":
        """From one model's entry in HELM's `inference_idealized_runtimes.json`."""
        return cls(
            prompt_s={
                int(length): float(time) for length, time in table["runtime_for_prompt_tokens"].items()
            },
            per_token_s=float(table["runtime_per_output_token"]),
            overhead_s=float(table.get("overhead") or 0.0),
        )


def read_runtime_profile(told: str) -> RuntimeProfile:
    """The profile in a file, or `FILE:MODEL`, one of several in HELM's table.

    Raises:
        InputError: there is no such file, or no profile in it.
        UsageError: the table has no such model.
    """
    name, model = (told, "") if Path(told).exists() else told.rpartition(":")[::2]
    try:
        table = json.loads(Path(name).read_text(encoding="utf-8"))
        if model and model not in table:
            raise unknown_name("model in the table", model, table)
        return RuntimeProfile.of_table(table[model] if model else table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{told} is no profile of run times ({type(error).__name__}: {error}). Wanted FILE or FILE:MODEL "
            "with runtime_for_prompt_tokens and runtime_per_output_token."
        ) from error


def efficiency_stats(run: Answered, state: RequestState) -> list[Stat]:
    """Of one request: tokens in and out, its time, and its share of its batch's time."""
    result = state.result
    assert result is not None
    num_in = num_prompt_tokens(run, state)
    num_all = sum(len(each.tokens) for each in result.completions)
    num_out = num_all
    if state.request.echo:  # the prompt's own tokens are not output
        num_out = num_all - num_in if num_in <= num_all else 0
    stats = [
        stat("num_prompt_tokens", num_in),
        stat("num_completion_tokens", num_all),
        stat("num_output_tokens", num_out),
        stat("inference_runtime", result.seconds),
    ]
    stats.append(stat("batch_size", result.batch_size or 1))
    if result.batch_size is not None:
        stats.append(stat("inference_denoised_runtime", result.seconds_each))
    profile = run.resources.get("idealised_runtime")
    if profile is not None:
        stats.append(stat("inference_idealized_runtime", profile.seconds(num_in, num_out)))
    return stats


def num_prompt_tokens(run: Answered, state: RequestState) -> int:
    """How many tokens a prompt has, by the model's tokenizer."""
    return len(run.model.encode(state.request.prompt))
