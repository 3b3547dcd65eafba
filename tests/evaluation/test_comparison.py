"""Two runs are paired by what their instances say, not by ids that another order or file changes."""

import json

import pytest

from capstan.errors import InputError
from capstan.evaluation import compare_folders


def write(folder, rows, *, with_states=True):
    """A run of (id, text, value)."""
    run = folder / "runs" / "capstan" / "mine"
    run.mkdir(parents=True)
    stats = [
        {
            "instance_id": name,
            "train_trial_index": 0,
            "stats": [{"name": {"name": "exact_match"}, "mean": value}],
        }
        for name, _, value in rows
    ]
    (run / "per_instance_stats.json").write_text(json.dumps(stats))
    states = [{"instance": {"id": name, "input": {"text": text}, "references": []}} for name, text, _ in rows]
    if with_states:
        (run / "scenario_state.json").write_text(json.dumps({"request_states": states}))
    return folder


A = [("id0", "one", 1.0), ("id1", "two", 0.0), ("id2", "three", 1.0)]


def compared(tmp_path, rows, **how):
    a, b = write(tmp_path / "a", A), write(tmp_path / "b", rows, **how)
    return compare_folders(a, b, metrics={"mine": "exact_match"})[0]


def test_another_order_is_paired_alike(tmp_path):
    found = compared(tmp_path, [("id0", "three", 1.0), ("id1", "one", 1.0), ("id2", "two", 0.0)])
    assert (found.num_higher, found.num_lower, found.num_unpaired) == (0, 0, 0)


def test_instances_that_only_one_has_are_counted_and_left_out(tmp_path):
    found = compared(tmp_path, [("id0", "one", 0.0), ("id1", "another", 1.0)])
    assert (found.num_higher, found.num_lower, found.num_unpaired) == (0, 1, 3)
    assert found.interval.num == 1


def test_two_data_sets_of_the_same_ids_are_not_paired(tmp_path):
    with pytest.raises(InputError, match="share no instance"):
        compared(tmp_path, [(name, f"other {text}", value) for name, text, value in A])


def test_equal_instances_are_paired_in_order(tmp_path):
    rows = [("id0", "one", 1.0), ("id1", "one", 0.0)]
    a, b = write(tmp_path / "a", rows), write(tmp_path / "b", rows)
    found = compare_folders(a, b, metrics={"mine": "exact_match"})[0]
    assert (found.num_higher, found.num_lower, found.interval.num) == (0, 0, 2)


def test_a_run_without_its_requests_is_paired_by_ids(tmp_path):
    found = compared(tmp_path, [(name, text, 1.0) for name, text, _ in A], with_states=False)
    assert (found.num_higher, found.num_lower, found.num_unpaired) == (1, 0, 0)


def test_damaged_requests_are_named(tmp_path):
    a, b = write(tmp_path / "a", A), write(tmp_path / "b", A)
    next(b.rglob("scenario_state.json")).write_text("{")
    with pytest.raises(InputError, match=r"scenario_state.json is damaged"):
        compare_folders(a, b, metrics={"mine": "exact_match"})


def test_a_folder_that_is_not_there_is_named(tmp_path):
    write(tmp_path / "a", [("id1", "one", 1.0)])
    with pytest.raises(InputError, match="There is no folder .*nowhere"):
        compare_folders(tmp_path / "a", tmp_path / "nowhere", metrics={"mine": "exact_match"})
