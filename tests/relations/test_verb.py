"""`capstan relate`: plan, run, JSON, and what is refused."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from capstan.cli.relate import relate
from capstan.errors import CapstanError, DoesNotFit, InputError, UsageError
from capstan.plans import Plan, Trace

APP = typer.Typer()
APP.command("relate")(relate)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in {"a": (200, 150), "b": (150, 180)}.items():
        np.save(tmp_path / f"{name}.npy", rng.integers(-3, 4, shape).astype(np.float32))
    return tmp_path


def run(*words):
    done = CliRunner().invoke(APP, [str(word) for word in words])
    if isinstance(done.exception, CapstanError):
        raise done.exception
    return done


def test_a_product_within_a_budget_and_its_json(files):
    done = run(
        "ij,jk->ik",
        files / "a.npy",
        files / "b.npy",
        "--output",
        files / "c.npy",
        "--memory",
        "100KiB",
        "--json",
    )
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    a, b, c = (np.load(files / f"{name}.npy") for name in "abc")
    assert np.array_equal(c, a @ b)
    assert told["verb"] == "relate"
    plan, trace = Plan.from_dict(told["plan"]), Trace.from_dict(told["trace"])
    assert trace.traffic == plan.traffic
    assert 0 < trace.peak_bytes["host"] <= plan.peak_bytes["host"] <= 100 * 1024
    assert told["plan"]["decision"]["operations"][0]["read_bytes"] == plan.traffic.on("disk->host")
    assert "measured peak" in done.stderr


def test_explain_reads_only_headers_and_writes_nothing(files):
    before = sorted(files.iterdir())
    done = run("ij,jk->ik", files / "a.npy", files / "b.npy", "--memory", "100KiB", "--explain")
    assert "tiles i=" in done.stdout
    assert sorted(files.iterdir()) == before


def test_devices_alone_plan_with_bytes_per_operator(files):
    done = run("ij,jk->ik", files / "a.npy", files / "b.npy", "--devices", 8, "--json")
    told = json.loads(done.stdout)
    (operation,) = told["plan"]["decision"]["operations"]
    total = sum(sum(contents.values()) for contents in told["plan"]["bytes"].values())
    assert operation["input_bytes"] + operation["partial_bytes"] == total > 0
    assert np.prod(list(operation["join"].values())) == 8
    assert "trace" not in told
    assert "elements touched" in run("ij,jk->ik", files / "a.npy", files / "b.npy", "--devices", 8).stdout


def test_semirings_and_maps(files):
    run("ij,kj->ik", files / "a.npy", files / "a.npy", "--output", files / "c.npy", "--semiring", "max-plus")
    a = np.load(files / "a.npy")
    assert np.array_equal(np.load(files / "c.npy"), (a[:, None] + a[None]).max(-1))
    run("ij->ij", files / "a.npy", "--output", files / "r.npy", "--map", "negative", "--map", "relu")
    assert np.array_equal(np.load(files / "r.npy"), np.maximum(-a, 0))


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("ij,jk->ik", "a.npy", "b.npy"), UsageError, "--output"),
        (("ij,jk->ik", "a.npy", "a.npy", "--output", "c.npy"), InputError, "label 'j' has size 150"),
        (("ij,jk->iq", "a.npy", "b.npy", "--output", "c.npy"), UsageError, "'q'"),
        (("ij,jk->ik", "a.npy", "x.npy", "--output", "c.npy"), InputError, "no file"),
        (("ij,jk->ik", "a.npy", "b.npy", "--output", "c.npy", "--memory", "1KiB"), DoesNotFit, "at least"),
        (("ij,jk->ik", "a.npy", "b.npy", "--output", "c.npy", "--memory", "x"), UsageError, "not a size"),
        (("ij,jk->ik", "a.npy", "b.npy", "--output", "b.npy"), InputError, "also an operand"),
        (("ij,jk->ik", "a.npy", "b.npy", "--devices", "6"), UsageError, "use 4"),
        (("ij,jk->ik", "a.npy", "b.npy", "--devices", "4", "--bandwidth-mbit", "0"), UsageError, "positive"),
        (("ij->i", "a.npy", "--output", "c.npy", "--scratch", "nowhere"), InputError, "no folder nowhere"),
        (("ij->ij", "a.npy", "--output", "c.npy", "--map", "rellu"), UsageError, "'relu'"),
    ],
)
def test_what_is_wrong_is_refused(files, words, error, says):
    before = sorted(files.iterdir())
    with pytest.raises(error) as caught:
        run(*(files / word if word.endswith(".npy") else word for word in words))
    assert says in str(caught.value)
    assert sorted(files.iterdir()) == before
