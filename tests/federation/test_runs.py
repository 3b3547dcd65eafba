"""`capstan federate run`: from a YAML file to a trained network; what is wrong in it; going on."""

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from capstan.cli.federate import federate
from capstan.errors import CapstanError, InputError, UsageError
from capstan.federation.data_files import generate_samples, read_samples, split_off_test
from capstan.plans import Plan, Trace

LAYERS = ["relu", {"linear": {"out": 16}}, "relu", {"batch_norm1d": {}}, {"linear": {"out": 4}}]
JOB = {
    "data": {"generate": {"samples": 240, "features": 10, "classes": 4, "noise": 0.3}},
    "model": {"layers": [{"linear": {"out": 24}}, *LAYERS], "cut": 2},
    "devices": {"count": 4, "batch": 8},
    "wire": {"keep": 0.25},
    "training": {"epochs": 3},
}


def changed(**sections):
    job = {name: dict(section) for name, section in JOB.items()}
    for name, section in sections.items():
        job[name] = job.get(name, {}) | section
    return job


@pytest.fixture
def run(tmp_path):
    """`run(job, *words)`: the command on a file that says so; errors are raised."""

    def run(job, *words):
        path = tmp_path / "job.yaml"
        path.write_text(job if isinstance(job, str) else yaml.safe_dump(job))
        ran = CliRunner().invoke(federate, ["run", str(path), *map(str, words)])
        if ran.exception is not None:
            raise ran.exception
        return ran

    return run


def told(ran):
    return json.loads(ran.stdout)


def test_a_run_prints_one_object_whose_bytes_are_as_planned(run):
    report = told(run(JOB, "--json"))
    assert report["verb"] == "federate run"
    plan, trace = Plan.from_dict(report["plan"]), Trace.from_dict(report["trace"])
    assert plan.traffic == trace.traffic
    assert plan.phases[0].counts == trace.phases[0].counts
    assert len(report["accuracy"]) == 3
    # Four curves in little noise; guessing gives 0.25.
    assert report["accuracy"][-1] > 0.8
    assert [each["samples"] for each in report["epochs"]] == [168] * 3


def test_a_run_shows_plan_epochs_and_comparison(run):
    ran = run(JOB)
    assert "epoch 3: loss" in ran.stderr
    assert "against federated averaging" in ran.stderr
    assert "measured" in ran.stdout
    assert "devices->server" in ran.stdout


def test_an_epoch_without_any_iteration_has_no_loss(run):
    training = {"loss_rate": 0.99, "quorum": 1.0, "epochs": 1}
    ran = run(changed(training=training), "--json")
    assert told(ran)["epochs"][0]["loss"] is None
    assert "every iteration was skipped" in ran.stderr


def test_explain_trains_nothing(run):
    ran = run(JOB, "--explain")
    assert "epoch" not in ran.stderr
    assert "exact" in ran.stdout
    report = told(run(JOB, "--explain", "--json"))
    assert "trace" not in report
    assert report["plan"]["decision"]["training"]["algorithm"] == "joint"


@pytest.mark.parametrize("algorithm", ["fedavg", "split", "splitfed-v1", "splitfed-v2", "joint", "u-shaped"])
def test_every_algorithm_runs_from_a_file(run, algorithm):
    model = {"head": 5} if algorithm == "u-shaped" else {}
    job = changed(training={"algorithm": algorithm, "epochs": 1}, model=model)
    report = told(run(job, "--json"))
    assert Plan.from_dict(report["plan"]).traffic == Trace.from_dict(report["trace"]).traffic


@pytest.mark.parametrize(
    "wire",
    [
        {"keep": 1, "values": "float32"},
        {"alpha": 0.1},
        {"per": "tensor", "index": "packed"},
        {"downlink": "top-k", "error_feedback": True, "values": "int8"},
        {"index": "rice"},
    ],
)
def test_every_wire_runs_from_a_file(run, wire):
    report = told(run(changed(wire=wire, training={"epochs": 1}), "--json"))
    sent = Trace.from_dict(report["trace"]).traffic
    if wire.get("index") != "rice":
        assert Plan.from_dict(report["plan"]).traffic == sent
    assert bool(sent.of("index").links) == (wire["keep"] != 1 if "keep" in wire else True)


def test_a_threshold_runs_from_a_file(run):
    job = changed(training={"epochs": 1})
    job["wire"] = {"threshold": 0.5}
    assert told(run(job, "--json"))["accuracy"]


def test_rare_averages_are_warned_of_and_losses_are_noted(run):
    devices = {"partition": "dirichlet", "alpha": 0.3, "batch": [4, 8, 8, 2]}
    training = {"average_every": "epoch", "loss_rate": 0.3, "quorum": 0.5, "epochs": 1}
    ran = run(changed(devices=devices, training=training))
    assert "WARNING" in ran.stderr
    assert "were lost" in ran.stdout


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(run, tmp_path):
    wire = {"downlink": "top-k", "error_feedback": True}
    for algorithm in ("joint", "splitfed-v1"):
        whole = told(run(changed(wire=wire, training={"algorithm": algorithm}), "--json"))
        kept = tmp_path / f"{algorithm}.pt"
        shorter = changed(wire=wire, training={"algorithm": algorithm, "epochs": 1})
        first = told(run(shorter, "--json", "--checkpoint", kept))
        job = changed(wire=wire, training={"algorithm": algorithm})
        rest = told(run(job, "--json", "--checkpoint", kept))
        losses = [each["loss"] for each in first["epochs"] + rest["epochs"]]
        assert losses == [each["loss"] for each in whole["epochs"]]
        assert first["accuracy"] + rest["accuracy"] == whole["accuracy"]
        assert Plan.from_dict(rest["plan"]).traffic == Trace.from_dict(rest["trace"]).traffic
        done = told(run(job, "--json", "--checkpoint", kept))
        assert done["accuracy"] == []
        with pytest.raises(InputError, match="another job: its settings"):
            run(changed(wire=wire, training={"algorithm": algorithm, "seed": 5}), "--checkpoint", kept)
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no checkpoint"):
        run(JOB, "--checkpoint", tmp_path / "no.pt")


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ("[1, 2", "is not YAML"),
        ("", "describes no job"),
        (changed(training={"epochs": True}), "not a truth value"),
        (changed(training={"epoch": 3}), "training.epoch"),
        (changed(wire={"keep": 2}), "wire.keep"),
        (changed(wire={"threshold": 1}), "either keep or threshold"),
        (changed(devices={"batch": [1, 2]}), "4 of them"),
        (changed(data={"path": "x.csv"}), "either path or generate"),
        (changed(model={"cut": 6}), "cut < head"),
        (changed(model={"layers": ["rely", "relu"], "cut": 1}), "Did you mean 'relu'"),
        (changed(model={"layers": [{"linear": {"outt": 3}}, "relu"], "cut": 1}), "does not go with"),
        (changed(model={"layers": [{"linear": 3}, "relu"], "cut": 1}), "settings by name"),
        (changed(model={"layers": ["relu", {"linear": {"out": 3}}], "cut": 1}), "4 classes"),
        (changed(devices={"count": 1000}), "do not give"),
        (changed(training={"average_every": 0}), "training.average_every"),
        (changed(data={"test_fraction": 0.001}), "none to test with"),
        (changed(training={"algorithm": "split"}, devices={"batch": 1}), "Take larger batches"),
        (changed(training={"algorithm": "u-shaped"}), "ends on the devices"),
        (changed(training={"algorithm": "split", "quorum": 0.5}), "Quorum"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(run, job, said):
    with pytest.raises(CapstanError) as caught:
        run(job)
    assert said in str(caught.value)


def test_files_that_are_not_there_are_named(run, tmp_path):
    with pytest.raises(InputError, match="no configuration"):
        CliRunner().invoke(federate, ["run", str(tmp_path / "no.yaml")], catch_exceptions=False)
    job = changed()
    job["data"] = {"path": "no.csv"}
    with pytest.raises(InputError, match="no data file"):
        run(job)


def test_the_same_samples_come_from_every_kind_of_file(tmp_path):
    import pyarrow
    from pyarrow import parquet

    samples = generate_samples(30, 3, 3, 0.1, 0)
    named = np.array(["ant", "bee", "cat"])[samples.labels]
    np.savez(tmp_path / "a.npz", inputs=samples.inputs, labels=named)
    rows = [
        ",".join([*map(repr, map(float, row)), name]) for row, name in zip(samples.inputs, named, strict=True)
    ]
    (tmp_path / "a.csv").write_text("\n".join(["a,b,c,kind", *rows]) + "\n")
    columns = dict(zip("abc", samples.inputs.T, strict=True)) | {"kind": named}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    for name, label in (("a.npz", None), ("a.csv", "kind"), ("a.csv", None), ("a.parquet", "kind")):
        read = read_samples(tmp_path / name, inputs=None, label=label)
        np.testing.assert_array_equal(read.inputs, samples.inputs)
        np.testing.assert_array_equal(read.labels, samples.labels)


def test_files_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\nx,3\n")
    np.savez(tmp_path / "a.npz", inputs=np.ones((3, 2)), labels=np.ones(2))
    np.savez(tmp_path / "b.npz", inputs=np.full((3, 2), np.nan), labels=np.arange(3))
    cases = [
        ("a.csv", None, "cannot be read"),
        ("a.csv", "c", "no column"),
        ("a.npz", None, "a label each"),
        ("a.npz", "y", "no array"),
        ("b.npz", None, "no finite"),
    ]
    for name, label, said in cases:
        with pytest.raises(InputError, match=said):
            read_samples(tmp_path / name, inputs=None, label=label)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match="come from"):
        read_samples(tmp_path / "a.txt", inputs=None, label=None)


def test_a_share_of_each_label_is_kept_for_testing():
    samples = generate_samples(100, 2, 4, 1.0, 0)
    train, test = split_off_test(samples, 0.2, 3)
    assert np.bincount(test.labels).tolist() == [5] * 4
    assert len(train.labels) == 80
