"""Golden values: crfm-helm's own code on made-up files and answers.

Run in an environment of its own, beside Capstan's:

    python3.11 -m venv helm-env && helm-env/bin/pip install crfm-helm==0.5.16 torch==2.13.0 \\
        numba pytrec-eval-terrier
    helm-env/bin/python benchmarks/evaluation/golden_helm.py

writes tests/evaluation/golden_helm.json: of each run the digests of its prompts in order, its adapter's
settings and all its statistics. Patched are only what would ask the network and what Capstan reads from the
data folder: word lists, nltk's sentence model, the tokenizer. Names of scenarios as arguments
run only those and write nothing.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "evaluation"))

import toy_data  # noqa: E402

WORK = Path(tempfile.mkdtemp())
os.chdir(WORK)

import nltk  # noqa: E402

nltk.download = lambda *_, **__: True

import helm.benchmark.augmentations.dialect_perturbation as dialect  # noqa: E402
import helm.benchmark.augmentations.misspelling_perturbation as misspelling  # noqa: E402
import helm.benchmark.augmentations.person_name_perturbation as person_name  # noqa: E402
import helm.benchmark.metrics.basic_metrics as basic_metrics  # noqa: E402
import helm.benchmark.metrics.bias_metrics as bias_metrics  # noqa: E402
import helm.benchmark.metrics.efficiency_metrics as efficiency_metrics  # noqa: E402
import helm.benchmark.metrics.evaluate_reference_metrics as reference_metrics  # noqa: E402
from helm.benchmark.adaptation.adapters.adapter_factory import AdapterFactory  # noqa: E402
from helm.benchmark.adaptation.scenario_state import ScenarioState  # noqa: E402
from helm.benchmark.augmentations.data_augmenter import DataAugmenterSpec  # noqa: E402
from helm.benchmark.data_preprocessor import DataPreprocessor  # noqa: E402
from helm.benchmark.metrics.common_metric_specs import get_bias_metric_specs  # noqa: E402
from helm.benchmark.metrics.metric import create_metric  # noqa: E402
from helm.benchmark.run_expander import PERTURBATION_SPECS_DICT  # noqa: E402
from helm.benchmark.run_spec import get_run_spec_function  # noqa: E402
from helm.benchmark.runner import downsample_eval_instances  # noqa: E402
from helm.benchmark.scenarios.scenario import create_scenario, with_instance_ids  # noqa: E402
from helm.benchmark.window_services.window_service import EncodeResult  # noqa: E402
from helm.benchmark.window_services.window_service_factory import WindowServiceFactory  # noqa: E402
from helm.common.request import GeneratedOutput, RequestResult, Token  # noqa: E402
from helm.common.tokenization_request import TokenizationToken  # noqa: E402

# entry, arguments, augmentation, context, eval instances, trials, where HELM looks for our files
RUNS: list[tuple[str, dict[str, str], str | None, int, int, int, dict[str, str]]] = [
    (
        "boolq",
        {},
        "canonical",
        400,
        5,
        2,
        {
            "boolq/train.jsonl": "data/train",
            "boolq/dev.jsonl": "data/dev",
            "boolq/boolq_perturbed.json": "data/boolq_perturbed.jsonl",
        },
    ),
    (
        "boolq",
        {"only_contrast": "True"},
        "contrast_sets",
        400,
        5,
        1,
        {
            "boolq/train.jsonl": "data/train",
            "boolq/dev.jsonl": "data/dev",
            "boolq/boolq_perturbed.json": "data/boolq_perturbed.jsonl",
        },
    ),
    ("mmlu", {"subject": "anatomy"}, "canonical", 150, 6, 1, {"mmlu/data": "data"}),
    ("narrative_qa", {}, None, 600, 4, 1, {"narrativeqa": "data/narrativeqa-master"}),
    ("natural_qa", {"mode": "closedbook"}, None, 600, 4, 1, {"natural_qa": "data"}),
    ("natural_qa", {"mode": "openbook_longans"}, None, 600, 4, 1, {"natural_qa": "data"}),
    (
        "quac",
        {},
        None,
        500,
        4,
        1,
        {"quac/train_v0.2.json": "data/train.json", "quac/val_v0.2.json": "data/val.json"},
    ),
    (
        "commonsense",
        {"dataset": "hellaswag", "method": "multiple_choice_separate_original"},
        "fairness",
        400,
        4,
        1,
        {"hellaswag": "data"},
    ),
    (
        "commonsense",
        {"dataset": "openbookqa", "method": "multiple_choice_separate_calibrated"},
        None,
        400,
        6,
        1,
        {"openbookqa": "data"},
    ),
    ("truthful_qa", {"task": "mc_single"}, "robustness", 400, 6, 1, {"truthful_qa": "data"}),
    (
        "msmarco",
        {"track": "regular", "valid_topk": "20"},
        None,
        400,
        4,
        1,
        {
            "msmarco/passage_document.tsv": "data/documents.tsv",
            "msmarco/queries.train.tsv": "data/train_queries.tsv",
            "msmarco/qrels.train.tsv": "data/train_qrels.tsv",
            "msmarco/train_topk.tsv": "data/train_topk.tsv",
            "msmarco/queries.dev.tsv": "data/regular_queries.tsv",
            "msmarco/qrels.dev.small.tsv": "data/regular_qrels.tsv",
            "msmarco/dev_topk.tsv": "data/regular_topk.tsv",
        },
    ),
    (
        "msmarco",
        {"track": "trec", "valid_topk": "20"},
        None,
        400,
        4,
        1,
        {
            "msmarco/passage_document.tsv": "data/documents.tsv",
            "msmarco/queries.train.tsv": "data/train_queries.tsv",
            "msmarco/qrels.train.tsv": "data/train_qrels.tsv",
            "msmarco/train_topk.tsv": "data/train_topk.tsv",
            "msmarco/msmarco-test2019-queries.tsv": "data/trec_queries.tsv",
            "msmarco/2019qrels-pass.txt": "data/trec_qrels.tsv",
            "msmarco/trec_topk.tsv": "data/trec_topk.tsv",
        },
    ),
    (
        "civil_comments",
        {"demographic": "male"},
        "canonical",
        400,
        6,
        1,
        {"civil_comments/all_data_with_identities.csv": "wilds_civil_comments.csv"},
    ),
    ("wikifact", {"k": "5", "subject": "capital"}, None, 400, 4, 2, {"wikifact": "data"}),
    ("babi_qa", {"task": "19"}, None, 400, 5, 1, {"babi_qa": "data"}),
    (
        "gsm",
        {},
        None,
        600,
        6,
        1,
        {"gsm8k/train.jsonl": "gsm_data_train", "gsm8k/test.jsonl": "gsm_data_test"},
    ),
    ("blimp", {"phenomenon": "ellipsis"}, None, 400, 6, 1, {"blimp": "data"}),
    ("bbq", {"subject": "Religion"}, "robustness", 400, 12, 1, {"bbq/Religion.jsonl": "data/Religion"}),
    ("lsat_qa", {"task": "grouping"}, None, 400, 5, 1, {"lsat_qa": "data"}),
    ("legal_support", {}, "fairness", 400, 4, 1, {"legal_support": "data/legal_support"}),
    ("synthetic_reasoning", {"mode": "pattern_match"}, None, 400, 6, 1, {}),
    ("synthetic_reasoning", {"mode": "induction"}, None, 400, 6, 1, {}),
    ("synthetic_reasoning_natural", {"difficulty": "hard"}, None, 400, 6, 1, {}),
    ("dyck_language", {"num_parenthesis_pairs": "3"}, None, 400, 6, 1, {}),
    ("twitter_aae", {"demographic": "aa"}, None, 12, 4, 1, {"twitter_aae": "."}),
    ("copyright", {"datatag": "pilot"}, None, 1500, 4, 1, {"copyright": "."}),
    ("bold", {"subject": "race"}, None, 400, 4, 1, {"bold/race_prompt.json": "data/race"}),
    ("real_toxicity_prompts", {}, "robustness_surface", 400, 4, 1, {"real_toxicity_prompts": "data"}),
    ("entity_data_imputation", {"dataset": "Buy"}, None, 400, 3, 1, {"entity_data_imputation": "data"}),
    (
        "disinformation",
        {"capability": "reiteration", "topic": "covid"},
        None,
        400,
        4,
        1,
        {"disinformation/reiteration.jsonl": "reiteration"},
    ),
    (
        "disinformation",
        {"capability": "wedging"},
        None,
        400,
        4,
        1,
        {"disinformation/wedging.jsonl": "wedging"},
    ),
]
# Surface perturbations all at once, without synonyms, which need spaCy and WordNet.
SURFACE = (
    "contract",
    "filler",
    "lower",
    "misspelling_hard",
    "space",
    "typo_easy",
    "extra_space",
    "gender_terms_deterministic",
)


class Window:
    """A window service over the made-up tokenizer."""

    def __init__(self, longest: int) -> None:
        self.max_request_length = longest
        self.max_sequence_length = longest - 1
        self.max_sequence_and_generated_tokens_length = 10**9
        self.prefix_token = "<s>"

    def encode(self, text: str, truncation: bool = False, max_length: int | None = None) -> EncodeResult:
        tokens = [TokenizationToken(token) for token in toy_data.tokens_of(text)]
        return EncodeResult(text=text, tokens=tokens[:max_length] if truncation else tokens)

    def decode(self, tokens: Any, normalized_text: str | None = None) -> str:
        return "".join(token.value for token in tokens)

    def tokenize(self, text: str) -> list[str]:
        return toy_data.tokens_of(text)

    def get_num_tokens(self, text: str) -> int:
        return len(toy_data.tokens_of(text))

    def fits_within_context_window(self, text: str, expected_completion_token_length: int = 0) -> bool:
        return self.get_num_tokens(text) + expected_completion_token_length <= self.max_request_length

    def truncate_from_right(self, text: str, expected_completion_token_length: int = 0) -> str:
        longest = self.max_request_length - expected_completion_token_length
        result = self.decode(self.encode(text, truncation=True, max_length=longest).tokens)
        while not self.fits_within_context_window(result, expected_completion_token_length):
            result = result[:-1]
        return result


def answered(state: Any) -> Any:
    """The made-up answer to a request."""
    from dataclasses import replace

    request = state.request
    if request.echo_prompt:
        tokens = [Token(text, logprob) for text, logprob in toy_data.told_tokens(request.prompt)]
        found = [
            GeneratedOutput(request.prompt, sum(t.logprob for t in tokens), tokens, {"reason": "length"})
        ]
    else:
        candidates = [reference.output.text for reference in state.instance.references]
        if state.output_mapping is not None:
            candidates = list(state.output_mapping)
        if state.reference_index is not None:
            candidates = ["Yes", "No"]
        found = []
        for text, parts, reason in toy_data.told_answers(request.prompt, request.num_completions, candidates):
            tokens = [Token(token, logprob) for token, logprob in parts]
            found.append(GeneratedOutput(text, sum(t.logprob for t in tokens), tokens, {"reason": reason}))
    result = RequestResult(success=True, embedding=[], completions=found, cached=False, request_time=0.5)
    return replace(state, result=result)


def lay_files(data: Path, links: dict[str, str], output: Path) -> None:
    """Copy our files to where HELM would have downloaded them."""
    output.mkdir(parents=True, exist_ok=True)
    for source, target in links.items():
        place = output / target
        place.parent.mkdir(parents=True, exist_ok=True)
        if (data / source).is_dir():
            shutil.copytree(data / source, place, dirs_exist_ok=True)
        else:
            shutil.copy(data / source, place)


def adapter_dict(spec: Any) -> dict[str, Any]:
    from dataclasses import asdict

    told = asdict(spec)
    told.pop("model"), told.pop("model_deployment")
    return {key: value for key, value in told.items() if value is not None}


def stat_key(name: Any) -> str:
    perturbation = name.perturbation
    told = "" if perturbation is None else f"{perturbation.name}/{perturbation.computed_on}"
    return "|".join((name.name, name.split or "", name.sub_split or "", told))


def run(entry: str, args: dict[str, str], augmentation: str | None, longest: int, count: int, trials: int,
        links: dict[str, str], data: Path) -> dict[str, Any]:  # fmt: skip
    from dataclasses import replace

    spec = get_run_spec_function(entry)(**args)
    adapter_spec = replace(spec.adapter_spec, max_eval_instances=count, num_train_trials=trials,
                           model="simple/model1", model_deployment="simple/model1")  # fmt: skip
    output = WORK / f"{entry}-{len(list(WORK.iterdir()))}"
    lay_files(data, links, output)
    scenario = create_scenario(spec.scenario_spec)
    instances = with_instance_ids(scenario.get_instances(str(output)))
    instances = downsample_eval_instances(instances, count, ["valid", "test"])
    names = SURFACE if augmentation == "robustness_surface" else (augmentation,) if augmentation else ()
    specs = [each for name in names for group in PERTURBATION_SPECS_DICT[name].values() for each in group]
    augmenter = DataAugmenterSpec(perturbation_specs=specs, should_augment_eval_instances=bool(specs),
        should_include_original_eval=True, should_skip_unchanged_eval=True, seeds_per_instance=1)  # fmt: skip
    instances = DataPreprocessor(augmenter).preprocess(instances)
    window = Window(longest)
    with mock.patch.object(WindowServiceFactory, "get_window_service", return_value=window):
        states = AdapterFactory.get_adapter(adapter_spec, mock.Mock()).adapt(instances, 1)
        states = [answered(state) for state in states]
        state = ScenarioState(adapter_spec, states, annotator_specs=[])
        # Those that ask a service on the network are left out.
        asks_network = ("ToxicityMetric", "DisinformationHumanEvalMetrics")
        metric_specs = [s for s in spec.metric_specs if not s.class_name.endswith(asks_network)]
        if adapter_spec.method == "generation":
            metric_specs = [s for s in metric_specs if not s.class_name.endswith("BiasMetric")]
            metric_specs += get_bias_metric_specs()
        found: dict[str, list[float]] = {}
        for metric_spec in metric_specs:
            result = create_metric(metric_spec).evaluate(state, mock.Mock(), str(WORK), 1)
            for stat in result.aggregated_stats:
                found[stat_key(stat.name)] = [stat.count, stat.mean]
    return {
        "entry": entry + (":" + ",".join(f"{k}={v}" for k, v in args.items()) if args else ""),
        "augmentation": augmentation,
        "context": longest,
        "count": count,
        "trials": trials,
        "adapter": adapter_dict(adapter_spec),
        "prompts": [hashlib.sha256(each.request.prompt.encode()).hexdigest()[:12] for each in states],
        "ids": [each.instance.id for each in states],
        "stats": {key: value for key, value in sorted(found.items()) if value[1] is not None},
    }


def main() -> None:
    data = WORK / "toy"
    toy_data.make(data)
    words = data / "perturbations"
    spelt = json.loads((words / "correct_to_misspelling.json").read_text())
    plain_init = misspelling.MisspellingPerturbation.__init__

    def with_short_list(self: Any, prob: float) -> None:
        plain_init(self, prob)
        import re

        self.correct_to_misspelling = spelt
        self.mispelling_pattern = re.compile(r"\b({})\b".format("|".join(spelt)))

    misspelling.MisspellingPerturbation.__init__ = with_short_list
    dialect.DialectPerturbation.retrieve_mapping_dict = lambda _: str(words / "SAE_to_AAVE_mapping.json")
    person_name.PersonNamePerturbation.download_name_file = lambda _: str(words / "person_names.txt")
    bias_metrics.BiasMetric.TARGET_CATEGORY_TO_WORD_LIST = toy_data.BIAS_TARGETS
    for module in (bias_metrics, reference_metrics):
        module.word_tokenize = lambda text: nltk.word_tokenize(text, preserve_line=True)
    efficiency_metrics.WindowServiceFactory = WindowServiceFactory
    basic_metrics.WindowServiceFactory = WindowServiceFactory

    chosen = [each for each in RUNS if len(sys.argv) < 2 or each[0] in sys.argv[1:]]
    runs = []
    for each in chosen:
        runs.append(run(*each, data))
        print(each[0], each[1], len(runs[-1]["prompts"]), "requests", len(runs[-1]["stats"]), "statistics")
    if len(chosen) < len(RUNS):
        return  # a look at some; the golden values are of all
    target = ROOT / "tests" / "evaluation" / "golden_helm.json"
    told = {"crfm-helm": version("crfm-helm"), "runs": runs}
    target.write_text(json.dumps(told, separators=(",", ":")) + "\n")
    print(target, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
