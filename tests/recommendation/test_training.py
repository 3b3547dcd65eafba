"""Training on files: how well it ranks, that bytes are those predicted, that it goes on where it was."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from capstan.errors import DoesNotFit, InputError, UsageError
from capstan.plans import Plan, compare, explain, parse_bytes
from capstan.recommendation.click_log import ClickLog, string_id
from capstan.recommendation.ranking_network import RankingNetwork, multiplications
from capstan.recommendation.recommender import export_tables
from capstan.recommendation.training import Training
from capstan.recommendation.training_config import config_of, read_config


@pytest.fixture
def training(clicks, given_machine):
    def make(**options):
        defaults = {"config": read_config(clicks.config), "data": clicks.train, "machine": given_machine}
        return Training(**defaults | {"batch_size": 128, "epochs": 2} | options)

    return make


def test_it_ranks_nearly_as_well_as_the_chances_that_labels_were_drawn_with(training, clicks):
    auc = training(test=clicks.test).run().auc
    # The chances' own AUC; its standard error on 6,000 samples is 0.006. What 20,000 samples do not
    # tell of 340 effects costs about 0.01.
    assert clicks.best_auc == pytest.approx(0.7788, abs=5e-5)
    assert clicks.best_auc - 0.02 < auc < clicks.best_auc + 0.005


def test_rows_that_are_late_by_up_to_16_batches_rank_as_well(training, clicks):
    def mean_auc(**options):
        return np.mean([training(test=clicks.test, seed=seed, **options).run().auc for seed in range(3)])

    assert mean_auc(mode="hybrid", staleness=16) > mean_auc() - 0.001


@pytest.mark.parametrize("on_disk", [False, True])
def test_bytes_and_rows_are_those_that_were_predicted(training, tmp_path, on_disk):
    trained = training(mode="hybrid", staleness=3, folder=tmp_path if on_disk else None).run()
    assert trained.trace.traffic == trained.plan.traffic
    assert trained.trace.peak_bytes == trained.plan.peak_bytes
    assert trained.trace.phase("train").counts == trained.plan.phase("train").counts
    assert trained.staleness.peak_in_flight == 3
    assert trained.plan.phase("train").counts["samples"] == 40_000
    assert "batches were in flight" in compare(trained.plan, trained.trace)


def test_the_plan_counts_each_batchs_distinct_ids(clicks, given_machine):
    config = read_config(clicks.config)
    plan = Training(config=config, data=clicks.train, machine=given_machine, batch_size=128, epochs=2).plan()
    columns = pq.read_table(clicks.train).to_pydict()
    distinct = 0
    for start in range(0, 20_000, 128):
        distinct += len(set(columns["item"][start : start + 128]))
        distinct += len({tag for tags in columns["tags"][start : start + 128] for tag in tags})
    assert plan.phase("train").counts["rows"] == 2 * distinct
    # dim 4: 16 bytes of embedding read; with Adagrad's state 32 written
    assert plan.traffic.to_dict() == {
        "network->tables": {"rows": 2 * distinct * 32},
        "tables->network": {"embeddings": 2 * distinct * 16},
    }
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    pooled = 20_000 * 2 * 4 * 4
    assert plan.phase("train").busy_s == {
        "tables->network": pytest.approx(2 * (distinct * 16 + pooled) / 8e9),
        "network->tables": pytest.approx(2 * (distinct * 2 * 32 + pooled) / 8e9),
        "processor": pytest.approx(2 * 6 * 20_000 * (9 * 16 + 16) / 4e10),
    }
    assert "hybrid, staleness 2" in explain(plan)


def test_multiplications_are_the_weights_of_the_network():
    settings = config_of(
        {"label": "y", "dense": ["x"], "slots": ["a"], "network": {"slots": [8, 4], "dense": [3], "top": [5]}}
    ).network
    network = RankingNetwork(settings, num_embedded=16, num_dense=1)
    weights = sum(each.numel() for name, each in network.named_parameters() if name.endswith("weight"))
    assert multiplications(settings, num_embedded=16, num_dense=1) == weights


def test_training_is_the_same_in_every_run_and_differs_between_seeds(training):
    def losses(**options):
        return training(epochs=1, **options).run().losses

    before = torch.get_rng_state()
    assert losses(mode="hybrid", staleness=4) == losses(mode="hybrid", staleness=4)
    assert losses(mode="hybrid", staleness=1) == losses()
    assert losses(seed=1) != losses(seed=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_goes_on_where_it_was(training, clicks, tmp_path):
    whole = training(test=clicks.test, mode="hybrid", staleness=2).run()
    training(epochs=1, mode="hybrid", staleness=2, output=tmp_path).run()
    rest = training(test=clicks.test, mode="hybrid", staleness=2, output=tmp_path).run()
    assert rest.losses == whole.losses[1:]
    assert rest.auc == whole.auc
    assert rest.trace.traffic == rest.plan.traffic
    again = training(test=clicks.test, mode="hybrid", staleness=2, output=tmp_path).run()
    assert (again.losses, again.auc, again.samples_per_s) == ((), whole.auc, 0.0)


def test_a_recommender_that_was_trained_otherwise_is_not_gone_on_with(training, tmp_path):
    training(epochs=1, output=tmp_path).run()
    with pytest.raises(InputError, match="another seed"):
        training(output=tmp_path, seed=9).run()
    (tmp_path / "recommender.pt").write_bytes(b"torn")
    with pytest.raises(InputError, match="is not a trained recommender.$"):
        training(output=tmp_path).run()


def test_exported_rows_are_the_tables(training, tmp_path):
    trained = training(epochs=1, output=tmp_path).run()
    assert export_tables(tmp_path / "recommender.pt", tmp_path / "rows") == {
        slot: len(table) for slot, table in trained.recommender.embedding.tables.items()
    }
    exported = pq.read_table(tmp_path / "rows" / "tags.parquet").to_pydict()
    table = trained.recommender.embedding.tables["tags"]
    assert set(exported["id"]) == {string_id(f"tag {each}") for each in range(40)}
    assert np.array_equal(
        np.array(exported["embedding"], np.float32), table.rows_of(np.array(exported["id"], np.uint64))
    )


def test_a_table_smaller_than_its_ids_evicts_and_still_learns(training, clicks):
    told = {"item": {"dim": 4, "capacity": 150, "evict": "lru", "optimizer": {"kind": "adagrad", "lr": 0.1}}}
    config = config_of({"label": "clicked", "slots": told, "network": {"top": [8]}})
    trained = training(config=config, test=clicks.test).run()
    assert trained.tables["item"].rows == 150
    assert trained.tables["item"].evicted > 0
    assert trained.auc > 0.6


def test_tables_larger_than_what_is_granted_are_refused_before_training(training):
    plan = training().plan()
    assert training(memory_bytes=plan.peak_bytes["tables"]).plan().budget_bytes == plan.peak_bytes
    with pytest.raises(DoesNotFit, match="--disk FOLDER"):
        training(memory_bytes=plan.peak_bytes["tables"] - 1).plan()
    with pytest.raises(DoesNotFit, match="1.00 KiB are granted"):
        training(memory_bytes=parse_bytes("1KiB")).run()


def test_strings_have_the_same_id_in_every_file():
    assert string_id("tag 7") == string_id(" tag 7 ") == 1731099439103097917
    assert string_id("tag 7") != string_id("tag 8")


def test_train_and_test_files_need_no_common_encoder(tmp_path, given_machine):
    # The test file lacks a category: encoders fitted apart would shift every later one.
    names = np.array(["a", "b", "c", "d"] * 500)
    effect = {"a": 1, "b": 0, "c": 1, "d": 0}
    for name, keep in (("train", "abcd"), ("test", "acd")):
        rows = [each for each in names if each in keep]
        table = pa.table({"kind": rows, "y": [effect[each] for each in rows]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    config = config_of({"label": "y", "slots": ["kind"], "network": {"top": []}, "optimizer": {"lr": 0.05}})
    run = Training(
        config=config,
        data=tmp_path / "train.parquet",
        test=tmp_path / "test.parquet",
        machine=given_machine,
        epochs=5,
        batch_size=64,
    ).run()
    assert run.auc == 1.0


def written(folder, **columns):
    path = folder / "data.parquet"
    pq.write_table(pa.table(columns), path)
    return path


CONFIG = {"label": "y", "dense": ["x"], "slots": ["a"], "network": {"top": [2]}}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"y": [0, 2], "x": [1.0, 2.0], "a": [1, 2]}, "must be 0 or 1.*`positive:`"),
        ({"y": [0, None], "x": [1.0, 2.0], "a": [1, 2]}, "label 'y'.*missing"),
        ({"y": [0, 1], "x": [1.0, None], "a": [1, 2]}, "Column 'x'.*missing or not finite"),
        ({"y": [0, 1], "x": ["u", "v"], "a": [1, 2]}, "needs numbers"),
        ({"y": [0, 1], "x": [1.0, 2.0], "a": [1, -2]}, "ID -2 is negative"),
        ({"y": [0, 1], "x": [1.0, 2.0], "a": [0.5, 1.5]}, "flat array of integers"),
        ({"y": [0, 1], "x": [1.0, 2.0], "a": [["u", None], ["v"]]}, "1 nulls"),
    ],
)
def test_columns_that_cannot_be_trained_on_are_named(tmp_path, columns, message):
    log = ClickLog(written(tmp_path, **columns), config_of(CONFIG))
    with pytest.raises(InputError, match=message):
        list(log.batches(8))


def test_a_column_that_is_not_there_is_named(tmp_path):
    path = written(tmp_path, y=[0], x=[1.0], aa=[1])
    with pytest.raises(UsageError, match="no column in .* 'a'. Did you mean 'aa'"):
        ClickLog(path, config_of(CONFIG))
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        ClickLog(tmp_path / "nowhere.parquet", config_of(CONFIG))


def test_labels_may_be_words(tmp_path):
    path = written(tmp_path, y=[" >50K", "<=50K"], x=[1, 2], a=pa.array(["u", None]).dictionary_encode())
    (samples,) = ClickLog(path, config_of(CONFIG | {"positive": ">50K"})).batches(8)
    assert samples.labels.tolist() == [1, 0]
    assert samples.bags["a"].offsets.tolist() == [0, 1, 1]


def test_a_last_batch_of_one_sample_is_refused_where_it_cannot_be_normalised(tmp_path, given_machine):
    path = written(tmp_path, y=[0, 1, 1], x=[1.0, 2.0, 3.0], a=[1, 2, 3])
    config = config_of(CONFIG | {"network": {"dense": [2], "batch_norm": True}})
    with pytest.raises(InputError, match="last one has one sample"):
        Training(config=config, data=path, machine=given_machine, batch_size=2).plan()


def test_no_samples_are_refused(tmp_path, given_machine):
    path = written(
        tmp_path, y=pa.array([], pa.int64()), x=pa.array([], pa.float32()), a=pa.array([], pa.int64())
    )
    with pytest.raises(InputError, match="no samples"):
        Training(config=config_of(CONFIG), data=path, machine=given_machine).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"staleness": 2}, "Give --mode hybrid"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_that_contradict_are_refused(training, options, message):
    with pytest.raises(UsageError, match=message):
        training(**options)
