"""Summaries of news: CNN/DailyMail and XSUM.

Source: HELM, `scenarios/summarization_scenario.py`. Differs: HELM loads pickles; here the same rows come from
JSONL, CSV or Parquet (`<dataset>/{train,validation,test}.*`, fields article and highlights, or document and
summary), for a pickle can run anything.
"""

from collections.abc import Iterator
from typing import Any

from capstan.errors import InputError, unknown_name
from capstan.evaluation.instances import TEST, TRAIN, VALID, Instance, correct
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_CLASS = "helm.benchmark.scenarios.summarization_scenario.SummarizationScenario"
_DATASETS = ("cnn-dm", "xsum", "xsum-sampled")


def load_summarization(
    data: DataFolder,
    *,
    dataset_name: str,
    sampling_min_length: int | None = None,
    sampling_max_length: int | None = None,
    doc_max_length: int | None = None,
) -> list[Instance]:
    """Articles and summaries; lengths are in words, and those of sampling bound training articles."""
    if dataset_name not in _DATASETS:
        raise unknown_name("data set of summaries", dataset_name, _DATASETS)
    instances = []
    for part, split in (("train", TRAIN), ("validation", VALID), ("test", TEST)):
        for row in _rows(data, dataset_name, part):
            whole, short = row.get("article", row.get("document")), row.get("highlights", row.get("summary"))
            if whole is None or short is None:
                raise InputError(
                    f"{dataset_name}/{part} wants article and highlights; it has {', '.join(row)}."
                )
            article, summary = _words(whole, doc_max_length), _words(short, None)
            if part == "train" and (
                not _within(len(article.split()), sampling_min_length, sampling_max_length)
                or (dataset_name == "xsum" and _is_odd(article, summary))
            ):
                continue
            instances.append(Instance(input=article, references=(correct(summary),), split=split))
    return instances


def _rows(data: DataFolder, dataset: str, part: str) -> Iterator[dict[str, Any]]:
    name = f"{dataset}/{part}"
    if data.exists(f"{name}.csv"):
        yield from data.records(f"{name}.csv")
    elif data.exists(f"{name}.parquet"):
        yield from data.parquet(f"{name}.parquet")
    else:
        yield from data.jsonl(f"{name}.jsonl", "an article and its summary on each line")


def _words(text: str, most: int | None) -> str:
    return " ".join(text.replace("\n", " ").split()[:most])


def _within(length: int, least: int | None, most: int | None) -> bool:
    return not (most and length > most) and not (least and length < least)


def _is_odd(article: str, summary: str) -> bool:
    """Training articles that HELM leaves out: pages without the text, and hardly shortened ones."""
    if any(words in article for words in ("Media playback is unsupported on your device", "Last updated at")):
        return True
    return len(summary.split()) <= 10 or len(summary.split()) / len(article.split()) > 0.2


def _spec(name: str, dataset: str, num_sentences: int, max_tokens: int) -> Any:
    def run_spec(temperature: str | float = 0.3, device: str = "cpu") -> RunSpec:
        args = {"dataset_name": dataset, "sampling_min_length": 50, "sampling_max_length": 150}
        return RunSpec(
            name=f"{name}:temperature={temperature},device={device}",
            scenario_spec=ScenarioSpec(class_name=_CLASS, args={**args, "doc_max_length": 512}),
            adapter_spec=asking.summarization(
                num_sentences, max_tokens=max_tokens, temperature=float(temperature)
            ),
            metric_specs=asking.summary(name) + asking.harms(),
            groups=(name,),
        )

    return run_spec


def _scenario(name: str, dataset: str, description: str, num_sentences: int, max_tokens: int) -> Scenario:
    return Scenario(
        name=name,
        folder="summarization",
        class_name=_CLASS,
        description=description,
        load=load_summarization,
        run_spec=_spec(name, dataset, num_sentences, max_tokens),
        main_metric="rouge_2",
        page="huggingface.co/datasets/abisee/cnn_dailymail and EdinburghNLP/xsum",
    )


SCENARIOS = (
    _scenario("summarization_cnndm", "cnn-dm", "News in three sentences (See et al. 2017)", 3, 128),
    _scenario("summarization_xsum", "xsum", "News in one sentence (Narayan et al. 2018)", 1, 64),
    _scenario("summarization_xsum_sampled", "xsum-sampled", "518 articles of XSUM, as FlexGen ran", 1, 64),
)
