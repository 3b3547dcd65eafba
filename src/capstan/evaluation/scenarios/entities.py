"""Rows of tables: a missing cell, or whether two rows are of the same thing.

Source: HELM, `scenarios/entity_data_imputation_scenario.py`, `entity_matching_scenario.py`.
"""

import random
from collections.abc import Mapping, Sequence

import numpy as np

from capstan.errors import InputError, unknown_name
from capstan.evaluation.instances import TEST, TRAIN, VALID, Instance, correct
from capstan.evaluation.scenarios import asking
from capstan.evaluation.scenarios.scenario import DataFolder, Scenario
from capstan.evaluation.specs import RunSpec, ScenarioSpec

_HELM = "helm.benchmark.scenarios."

_IMPUTED = {"Buy": "manufacturer", "Restaurant": "city"}


def load_entity_data_imputation(data: DataFolder, *, dataset: str) -> list[Instance]:
    """A row of a table with one cell to be guessed."""
    if dataset not in _IMPUTED:
        raise unknown_name("data set of entity_data_imputation", dataset, _IMPUTED)
    rows = _buy(data) if dataset == "Buy" else _restaurants(data)
    wanted, draw = _IMPUTED[dataset], np.random.RandomState
    test = draw(1234).choice(len(rows), size=round(0.1 * len(rows)), replace=False).tolist()
    rest = [at for at in range(len(rows)) if at not in set(test)]
    chosen = draw(1234).choice(len(rest), size=round(0.2 * len(rest)), replace=False).tolist()
    valid = [rest[at] for at in chosen]
    train = [at for at in rest if at not in set(valid)]
    instances = []
    for split, order in ((TRAIN, train), (VALID, valid), (TEST, test)):
        for at in order:
            text = _serialised({name: cell for name, cell in rows[at].items() if name != wanted})
            answer = correct(rows[at][wanted])
            instances.append(Instance(input=f"{text}. {wanted}?", references=(answer,), split=split))
    return instances


def _serialised(row: Mapping[str, str]) -> str:
    return ". ".join(f"{name}: {cell}".strip() for name, cell in row.items())


def _buy(data: DataFolder) -> list[dict[str, str]]:
    name = "Buy/Buy.csv" if data.exists("Buy/Buy.csv") else "Buy.csv"
    rows = as_pandas_reads(list(data.records(name, "id,name,description,manufacturer,price")))
    return [
        {name: cell for name, cell in row.items() if name != "id"}
        for row in rows
        if row["description"] != "nan"
    ]


def _restaurants(data: DataFolder) -> list[dict[str, str]]:
    name = "Restaurant/fz.arff" if data.exists("Restaurant/fz.arff") else "fz.arff"
    columns: list[str] = []
    rows = []
    for line in data.lines(name, "@attribute lines, @data, then rows"):
        if line.startswith("@attribute"):
            columns.append(line.split(maxsplit=2)[1])
        elif line.strip() and not line.startswith("@") and columns:
            cells = [cell.replace('"', "").strip() for cell in _arff_cells(line.strip())]
            row = dict(zip(columns, cells, strict=False))
            row.pop("class", None)
            if all(row.values()):
                rows.append(row)
    return rows


def _arff_cells(line: str) -> list[str]:
    import csv

    return next(csv.reader([line]))


def as_pandas_reads(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Cells as pandas would print them: an empty one is nan; whole numbers beside one have a decimal."""
    if not rows:
        return []
    columns = {name: _as_column([row[name] or "" for row in rows]) for name in rows[0]}
    return [{name: cells[at] for name, cells in columns.items()} for at in range(len(rows))]


def _as_column(cells: list[str]) -> list[str]:
    present = [cell for cell in cells if cell]
    try:
        numbers = [float(cell) for cell in present]
    except ValueError:
        return [cell or "nan" for cell in cells]
    if len(present) == len(cells) and all(cell.lstrip("+-").isdigit() for cell in present):
        return [str(int(cell)) for cell in cells]
    shown = iter(numbers)
    return [str(next(shown)) if cell else "nan" for cell in cells]


ENTITY_SETS = (
    "Beer",
    "iTunes_Amazon",
    "Fodors_Zagats",
    "DBLP_ACM",
    "DBLP_GoogleScholar",
    "Amazon_Google",
    "Walmart_Amazon",
    "Abt_Buy",
    "Company",
    "Dirty_iTunes_Amazon",
    "Dirty_DBLP_ACM",
    "Dirty_DBLP_GoogleScholar",
    "Dirty_Walmart_Amazon",
)


def load_entity_matching(data: DataFolder, *, dataset: str) -> list[Instance]:
    """Whether two rows are of the same thing, from `<dataset>/{tableA,tableB,train,valid,test}.csv`.

    Differs: as many unlike training pairs as like ones are drawn, but HELM draws with numbers that it kept.
    """
    if dataset not in ENTITY_SETS:
        raise unknown_name("data set of entity_matching", dataset, ENTITY_SETS)
    tables = [
        {
            row["id"]: row
            for row in as_pandas_reads(list(data.records(f"{dataset}/{name}.csv", "id and fields")))
        }
        for name in ("tableA", "tableB")
    ]
    instances = []
    for split in (TRAIN, VALID, TEST):
        pairs = list(data.records(f"{dataset}/{split}.csv", "ltable_id,rtable_id,label"))
        if split == TRAIN:
            pairs = _balanced(pairs)
        for pair in pairs:
            a, b = (
                _serialised({name: cell for name, cell in table[pair[key]].items() if name != "id"})
                for table, key in zip(tables, ("ltable_id", "rtable_id"), strict=True)
            )
            text = f"Product A is {a}. Product B is {b}. Are A and B the same?"
            answer = correct("Yes" if pair["label"] == "1" else "No")
            instances.append(Instance(input=text, references=(answer,), split=split))
    return instances


def _balanced(pairs: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    unlike = [pair for pair in pairs if pair["label"] != "1"]
    like = [pair for pair in pairs if pair["label"] == "1"]
    if len(unlike) < len(like):
        raise InputError(f"Of {len(pairs)} training pairs {len(like)} are like: more than the others.")
    return [*random.Random(0).sample(unlike, len(like)), *like]


def _table_spec(name: str, kind: str, instructions: str, dataset: str) -> RunSpec:
    return RunSpec(
        name=f"{name}:dataset={dataset}",
        scenario_spec=ScenarioSpec(class_name=_HELM + kind, args={"dataset": dataset}),
        adapter_spec=asking.generation(instructions=instructions, output_noun="Answer"),
        metric_specs=asking.exact_match() + asking.harms(),
        groups=(name,),
    )


_IMPUTATION = "entity_data_imputation_scenario.EntityDataImputationScenario"
_MATCHING = "entity_matching_scenario.EntityMatchingScenario"

SCENARIOS = (
    Scenario(
        name="entity_data_imputation",
        folder="entity_data_imputation",
        class_name=_HELM + _IMPUTATION,
        description="A cell of a table to be guessed (Mei et al. 2021)",
        load=load_entity_data_imputation,
        run_spec=lambda dataset: _table_spec(
            "entity_data_imputation", _IMPUTATION, "What is the missing value?", dataset
        ),
        main_metric="quasi_exact_match",
        page="dbs.uni-leipzig.de (Abt-Buy) and cs.utexas.edu/users/ml/riddle (restaurant)",
    ),
    Scenario(
        name="entity_matching",
        folder="entity_matching",
        class_name=_HELM + _MATCHING,
        description="Whether two rows are of the same thing (Mudgal et al. 2018)",
        load=load_entity_matching,
        run_spec=lambda dataset: _table_spec(
            "entity_matching", _MATCHING, "Are Product A and Product B the same? Yes or No?", dataset
        ),
        main_metric="quasi_exact_match",
        page="github.com/anhaidgroup/deepmatcher",
    ),
)
