"""MS MARCO: which passages answer a query. Eight million passages are streamed, never held.

Source: HELM, `scenarios/msmarco_scenario.py`; shuffles are in its order.
"""

import random
from collections.abc import Iterable
from typing import NamedTuple

from capstan.errors import InputError, unknown_name
from capstan.evaluation.instances import CORRECT, TRAIN, VALID, Instance, Reference
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_CLASS = "helm.benchmark.scenarios.msmarco_scenario.MSMARCOScenario"
_SEED, _NUM_TRAIN_QUERIES, _TRAIN_TOPK, _FIRST_WRONG = 1885, 1000, 20, 11
_DOCUMENTS = "passage_document.tsv"
_TRACKS = {
    "regular": ("queries.dev.tsv", "qrels.dev.small.tsv", "dev_topk.tsv", frozenset({1})),
    "trec": ("msmarco-test2019-queries.tsv", "2019qrels-pass.txt", "trec_topk.tsv", frozenset({2, 3})),
}


class _Queries(NamedTuple):
    text: dict[int, str]
    grades: dict[int, dict[int, int]]
    ranks: dict[int, dict[int, int]]
    gold: frozenset[int]

    def usable(self, order: Iterable[int], topk: int | None) -> list[int]:
        """Those with a right passage and, where `topk` passages are wanted, that many retrieved."""
        kept = [qid for qid in order if self.gold & set(self.grades.get(qid, {}).values())]
        return kept if topk is None else [qid for qid in kept if len(self.ranks.get(qid, {})) >= topk]


def load_msmarco(
    data: DataFolder, *, track: str = "regular", valid_topk: int | None = None
) -> list[Instance]:
    """Queries with judged passages and, with `valid_topk`, those that a retriever put first."""
    if track not in _TRACKS:
        raise unknown_name("track of MS MARCO", track, _TRACKS)
    valid_topk = int(valid_topk) if valid_topk is not None else None
    queries, qrels, topk, gold = _TRACKS[track]
    train = _read(data, "queries.train.tsv", "qrels.train.tsv", "train_topk.tsv", frozenset({1}))
    valid = _read(data, queries, qrels, topk, gold)
    draw = random.Random(_SEED)
    docids = [int(line.split("\t", 1)[0]) for line in data.lines(_DOCUMENTS, "docid⇥text on each line")]
    draw.shuffle(docids)
    place = {docid: at for at, docid in enumerate(docids)}
    train_order, valid_order = list(train.text), list(valid.text)
    draw.shuffle(train_order)
    draw.shuffle(valid_order)
    wanted = [
        (TRAIN, train, qid, _pair(train, qid))
        for qid in train.usable(train_order, _TRAIN_TOPK)[:_NUM_TRAIN_QUERIES]
    ]
    for qid in valid.usable(valid_order, valid_topk):
        ranked = valid.ranks.get(qid, {})
        first = [docid for docid, rank in ranked.items() if valid_topk is not None and rank <= valid_topk]
        wanted.append((VALID, valid, qid, list({*valid.grades[qid], *first})))
    texts = _texts(data, {docid for *_, ids in wanted for docid in ids})
    return [
        Instance(
            input=source.text[qid],
            references=tuple(
                _reference(source, qid, docid, texts) for docid in sorted(ids, key=lambda each: place[each])
            ),
            split=split,
        )
        for split, source, qid, ids in wanted
    ]


def _pair(train: _Queries, qid: int) -> list[int]:
    """The most relevant passage, and the first that a retriever ranked 11th or later and is not relevant."""
    grades = train.grades[qid]
    right = sorted(grades, key=lambda docid: grades[docid], reverse=True)[0]
    wrong = [
        docid
        for docid, rank in train.ranks[qid].items()
        if _FIRST_WRONG <= rank <= _TRAIN_TOPK and grades.get(docid) not in train.gold
    ]
    if not wrong:
        raise InputError(
            f"MS MARCO: query {qid} has no wrong passage of rank {_FIRST_WRONG} to {_TRAIN_TOPK}."
        )
    return [right, wrong[0]]


def _reference(source: _Queries, qid: int, docid: int, texts: dict[int, str]) -> Reference:
    grade, rank = source.grades[qid].get(docid), source.ranks.get(qid, {}).get(docid)
    tags = [f"docid={docid}"]
    tags += [CORRECT] if grade in source.gold else []
    tags += [f"relevance={grade}"] if grade else []
    tags += [f"rank={rank}"] if rank else []
    return Reference(text=texts[docid], tags=tuple(tags))


def _read(data: DataFolder, queries: str, qrels: str, topk: str, gold: frozenset[int]) -> _Queries:
    text = {}
    for line in data.lines(queries, "qid⇥query on each line"):
        qid, _, query = line.rstrip("\n").partition("\t")
        text[int(qid)] = query
    return _Queries(
        text,
        _triples(data, qrels, "qid 0 docid grade on each line", (0, 2, 3)),
        _triples(data, topk, "qid⇥docid⇥rank on each line", (0, 1, 2)),
        gold,
    )


def _triples(
    data: DataFolder, name: str, looks_like: str, at: tuple[int, int, int]
) -> dict[int, dict[int, int]]:
    found: dict[int, dict[int, int]] = {}
    for number, line in enumerate(data.lines(name, looks_like), start=1):
        parts = line.split()
        try:
            query, document, value = (int(parts[each]) for each in at)
        except (ValueError, IndexError) as error:
            raise InputError(f"{name}, line {number}: wants {looks_like}, not {line.strip()!r}.") from error
        found.setdefault(query, {})[document] = value
    return found


def _texts(data: DataFolder, wanted: set[int]) -> dict[int, str]:
    texts = {}
    for line in data.lines(_DOCUMENTS):
        docid, _, text = line.rstrip("\n").partition("\t")
        if int(docid) in wanted:
            texts[int(docid)] = text
    missing = wanted - set(texts)
    if missing:
        raise InputError(
            f"{data.folder / _DOCUMENTS} lacks {len(missing)} passages, {min(missing)} among them."
        )
    return texts


def _msmarco_spec(track: str = "regular", valid_topk: str | int | None = None) -> RunSpec:
    topk = int(valid_topk) if valid_topk is not None else None
    names = [f"{kind}.{k}" for kind in ("success", "recall") for k in (1, 2, 3, 5, 10, 20)]
    names += [f"recip_rank.{k}" for k in (5, 10, 20)]
    names += [f"ndcg_cut.{k}" for k in (5, 10, 20)] if track == "trec" else []
    measure = asking.metric(
        "ranking_metrics.RankingMetric",
        method="ranking_binary",
        measure_names=names,
        correct_output="Yes",
        wrong_output="No",
        rank=topk,
        multiple_relevance_values=track == "trec",
    )
    _, references, instances = asking.basic()
    return RunSpec(
        name=f"msmarco:track={track},valid_topk={topk}",
        scenario_spec=ScenarioSpec(class_name=_CLASS, args={"track": track, "valid_topk": topk}),
        adapter_spec=asking.ranking(),
        metric_specs=(measure, references, instances),
        groups=(f"msmarco_{track}",),
    )


SCENARIOS = (
    Scenario(
        name="msmarco",
        folder="msmarco",
        class_name=_CLASS,
        description="Passages that answer queries (Nguyen et al. 2016; TREC deep learning 2019)",
        load=load_msmarco,
        run_spec=_msmarco_spec,
        main_metric="RR@10",
        main_split="valid",
        page="microsoft.github.io/msmarco and trec.nist.gov/data/deep2019.html",
    ),
)
