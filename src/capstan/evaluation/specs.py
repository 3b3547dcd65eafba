"""What a run is: a scenario, how to ask (adapter), what to perturb, and what to measure.

All are plain frozen data which name what they mean, so that a run can be written down, hashed and made again.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from capstan.errors import UsageError, unknown_name
from capstan.evaluation.instances import EVAL_SPLITS

Method = Literal[
    "generation",
    "multiple_choice_joint",
    "multiple_choice_joint_chain_of_thought",
    "multiple_choice_separate_original",
    "multiple_choice_separate_calibrated",
    "language_modeling",
    "ranking_binary",
]
METHODS: tuple[Method, ...] = (
    "generation",
    "multiple_choice_joint",
    "multiple_choice_joint_chain_of_thought",
    "multiple_choice_separate_original",
    "multiple_choice_separate_calibrated",
    "language_modeling",
    "ranking_binary",
)


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """How instances become prompts, and how the model is to answer. Names and defaults are HELM's.

    Args:
        method: one of `METHODS`.
        instructions: stands before everything, its line break included.
        max_train_instances: how many examples a prompt shows at most; fewer where they do not fit.
        max_eval_instances: how many instances are asked; None for all.
        num_outputs: how many completions; with joint multiple choice, how many likeliest tokens.
        num_train_trials: how often the examples are drawn anew.
        num_trials: how often the same prompts are asked.
        sample_train: draw the examples by label; otherwise take them in order.
        output_mapping_pattern: a regular expression that finds the letter in an answer with reasoning.
    """

    method: Method = "generation"
    global_prefix: str = ""
    global_suffix: str = ""
    instructions: str = ""
    input_prefix: str = ""
    input_suffix: str = "\n"
    reference_prefix: str = "A. "
    reference_suffix: str = "\n"
    chain_of_thought_prefix: str = ""
    chain_of_thought_suffix: str = "\n"
    output_prefix: str = ""
    output_suffix: str = "\n"
    instance_prefix: str = "\n"
    substitutions: tuple[tuple[str, str], ...] = ()
    max_train_instances: int = 5
    max_eval_instances: int | None = None
    num_outputs: int = 5
    num_train_trials: int = 1
    num_trials: int = 1
    sample_train: bool = True
    model_deployment: str = ""
    model: str = ""
    temperature: float = 1.0
    max_tokens: int = 100
    stop_sequences: tuple[str, ...] = ()
    random: str | None = None
    multi_label: bool = False
    output_mapping_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("adapter method", self.method, METHODS)
        for name in ("max_train_instances", "max_tokens"):
            if getattr(self, name) < 0:
                raise UsageError(f"An adapter needs {name} of at least 0, not {getattr(self, name)}.")
        for name in ("num_outputs", "num_train_trials", "num_trials"):
            if getattr(self, name) < 1:
                raise UsageError(f"An adapter needs {name} of at least 1, not {getattr(self, name)}.")

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's run_spec.json; what is None is left out."""
        own: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        own["substitutions"] = [list(pair) for pair in self.substitutions]
        own["stop_sequences"] = list(self.stop_sequences)
        own["eval_splits"] = list(EVAL_SPLITS)
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ObjectSpec:
    """Names something that HELM would construct: its class, by HELM's name for it, and its arguments."""

    class_name: str
    args: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def short_name(self) -> str:
        """The class without its module."""
        return self.class_name.rsplit(".", 1)[-1]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's run_spec.json."""
        return {"class_name": self.class_name, "args": dict(self.args)}


class ScenarioSpec(ObjectSpec):
    """Names a scenario."""


class MetricSpec(ObjectSpec):
    """Names a metric."""


class PerturbationSpec(ObjectSpec):
    """Names a perturbation."""


@dataclass(frozen=True, kw_only=True)
class AugmenterSpec:
    """Which perturbed copies of each instance are asked beside it. Examples in prompts are never perturbed.

    `skip_unchanged` leaves out copies that a perturbation did not change.
    """

    perturbation_specs: tuple[PerturbationSpec, ...] = ()
    include_original: bool = True
    skip_unchanged: bool = True
    seeds_per_instance: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's run_spec.json."""
        on = bool(self.perturbation_specs)
        return {
            "perturbation_specs": [spec.to_dict() for spec in self.perturbation_specs],
            "should_augment_train_instances": False,
            "should_include_original_train": on,
            "should_skip_unchanged_train": on,
            "should_augment_eval_instances": on,
            "should_include_original_eval": on and self.include_original,
            "should_skip_unchanged_eval": on and self.skip_unchanged,
            "seeds_per_instance": self.seeds_per_instance,
        }


@dataclass(frozen=True, kw_only=True)
class Chat:
    """That prompts are written as conversations, by the model's chat template.

    Args:
        system_instruction: stands first, as the system's message.
        multiturn: each example of a task is a turn of its own, its answer the assistant's.
    """

    system_instruction: str = ""
    multiturn: bool = False


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that a run is made of. `name` is its run entry, such as `mmlu:subject=anatomy`.

    `chat`: prompts are written by the model's chat template.
    """

    name: str
    scenario_spec: ScenarioSpec
    adapter_spec: AdapterSpec
    metric_specs: tuple[MetricSpec, ...]
    data_augmenter_spec: AugmenterSpec = AugmenterSpec()
    groups: tuple[str, ...] = ()
    chat: Chat | None = None

    def with_adapter(self, **changes: Any) -> "RunSpec":
        """The same run with other adapter settings."""
        return replace(self, adapter_spec=replace(self.adapter_spec, **changes))

    def to_dict(self) -> dict[str, Any]:
        """As it stands in HELM's run_spec.json."""
        own = {
            "name": self.name,
            "scenario_spec": self.scenario_spec.to_dict(),
            "adapter_spec": self.adapter_spec.to_dict(),
            "metric_specs": [spec.to_dict() for spec in self.metric_specs],
            "data_augmenter_spec": self.data_augmenter_spec.to_dict(),
            "groups": list(self.groups),
            "annotators": [],
        }
        return own | ({"chat_template": asdict(self.chat)} if self.chat is not None else {})
