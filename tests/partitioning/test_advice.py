"""Advice gains what it says, in the authors' trace and made-up workloads; where that is little it is none."""

import csv
import random
from pathlib import Path

import pytest

from capstan.errors import UsageError
from capstan.partitioning import History, JobRun, Rates, Side, advise, workload
from capstan.partitioning.search import by_pairs, exhaustive

TABLES = {"lineitem": 144, "nation": 48, "orders": 16, "part": 8, "partsupp": 4, "region": 2, "supplier": 1}
PAIR = {"lineitem", "orders"}


def _layout(scheme):
    layout = {}
    for table, weight in TABLES.items():
        setting, scheme = divmod(scheme, weight)
        if setting:
            layout[table] = f"{table} {setting}"
    return layout


def _trace():
    text = (Path(__file__).parent / "data" / "lachesis_trace.csv").read_text()
    return [
        JobRun(
            name=row["query"], kind="query", seconds=float(row["seconds"]), layout=_layout(int(row["scheme"]))
        )
        for row in csv.DictReader(text.splitlines())
    ]


TRACE = _trace()


def _measured(layout):
    return sum(run.seconds for run in TRACE if run.layout == layout)


def test_the_trace_is_read_as_its_authors_wrote_it():
    sums = [_measured(_layout(scheme)) for scheme in range(432)]
    assert sums[0] == pytest.approx(331.2, abs=0.05)
    assert min(sums) == pytest.approx(126.6, abs=0.05)
    assert sums.index(min(sums)) == 172
    assert sums[160] == pytest.approx(144.7, abs=0.05)


def test_on_the_trace_the_cost_advisor_finds_the_pair_and_comes_near_the_best():
    advice = advise(TRACE)
    best = min(_measured(_layout(scheme)) for scheme in range(432))
    assert {"lineitem": "lineitem 1", "orders": "orders 1"}.items() <= advice.choice.items()
    assert _measured(advice.choice) <= 1.15 * best
    assert _measured(advice.choice) < _measured({})
    assert advice.expected_speedup > 2
    assert "Q04" in " ".join(advice.reasons)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_schemes", [10, 40, 150])
def test_of_a_part_of_the_trace_it_never_takes_one_of_the_pair_alone_nor_what_is_worse_than_none(
    seed, num_schemes
):
    kept = {0, *random.Random(seed).sample(range(1, 432), num_schemes)}
    layouts = [_layout(scheme) for scheme in kept]
    choice = advise([run for run in TRACE if run.layout in layouts]).choice
    assert len(PAIR & set(choice)) != 1
    assert _measured(choice) <= _measured({})


def test_without_the_good_pair_in_the_record_the_trace_says_nothing_about_it():
    runs = [run for run in TRACE if not set(run.layout) >= PAIR]
    assert not PAIR & set(advise(runs).choice)


def _side(table, key, **more):
    return Side(
        table=table, key=key, key_text=f"row[{key!r}]", **{"num_rows": 1000, "size_bytes": 10**6} | more
    )


def _join(name="j", seconds=10.0, shuffle_s=6.0, sides=(("a", "k"), ("b", "k")), **more):
    return JobRun(
        name=name,
        kind="join",
        seconds=seconds,
        shuffle_s=shuffle_s,
        shuffle_bytes=2 * 10**6,
        sides=tuple(_side(*each) for each in sides),
        **more,
    )


def test_a_join_that_shuffles_gets_both_sides_laid_out():
    advice = advise([_join()])
    assert advice.choice == {"a": "k", "b": "k"}
    # 10 s, of which 6 s shuffled; writing 4 MB of both at the rate of the shuffle is 6 s over 10 runs.
    assert advice.predicted_s == pytest.approx(4 + 0.6)
    assert advice.expected_speedup == pytest.approx(10 / 4.6)
    text = advice.explain()
    assert "no shuffle" in text
    assert "none" in text


def test_none_is_chosen_where_the_gain_is_less_than_three_percent():
    small = [_join(seconds=100.0, shuffle_s=2.9)]
    large = [_join(seconds=100.0, shuffle_s=3.6)]
    assert advise(small).choice == {}
    assert advise(small).expected_speedup == 1.0
    assert "gain" in advise(small).reasons[0]
    assert advise(large, expected_runs=1000).choice == {"a": "k", "b": "k"}


def test_what_runs_once_more_is_not_worth_its_writing():
    assert advise([_join()], expected_runs=1).choice == {}
    assert advise([_join()], expected_runs=3).choice


def test_a_key_that_may_change_is_never_advised():
    run = JobRun(
        name="j",
        kind="join",
        seconds=10,
        shuffle_s=9,
        shuffle_bytes=1,
        sides=(_side("a", "k", is_reusable=False), _side("b", "k")),
    )
    assert advise([run]).choice == {}
    assert advise([run], advisor="rules").choice == {}


def test_no_record_no_advice(tmp_path):
    History(tmp_path / "runs.db", create=True)
    advice = advise(tmp_path / "runs.db")
    assert advice.to_dict()["choice"] == "none"
    assert "no record" in advice.reasons[0]


def test_without_timed_shuffles_or_rates_no_gain_is_made_up():
    run = _join(shuffle_s=None)
    assert advise([run]).choice == {}
    assert "no shuffle was timed" in advise([run]).reasons[0]
    rates = Rates(shuffle_bytes_per_s=1e6, write_bytes_per_s=1e7, source="by hand")
    assert advise([run], rates=rates).choice == {"a": "k", "b": "k"}


def test_a_layout_that_was_measured_to_be_slower_is_not_chosen_again():
    slower = _join(seconds=11.0, shuffle_s=None, layout={"a": "k", "b": "k"})
    assert advise([_join(), _join(), slower, slower]).choice == {}


def test_the_most_frequent_key_alone_may_be_worse_than_none_and_is_then_not_taken():
    # a's most frequent key is x, in joins that no layout of a alone helps.
    runs = [_join(f"x{n}", seconds=10, shuffle_s=0.0, sides=(("a", "x"), ("c", "x"))) for n in range(3)]
    runs.append(_join("k", seconds=100, shuffle_s=60.0))
    assert advise(runs, advisor="frequent").choice == {}
    assert advise(runs).choice == {"a": "k", "b": "k"}


def test_unknown_advisors_and_no_runs_to_expect_are_refused():
    with pytest.raises(UsageError, match="Did you mean 'cost'"):
        advise(TRACE, advisor="costs")
    with pytest.raises(UsageError, match="expected_runs"):
        advise(TRACE, expected_runs=0)


def _random_workload(seed):
    dice = random.Random(seed)
    tables, runs = "abcdef"[: dice.randint(2, 6)], []
    for number in range(dice.randint(1, 10)):
        sides = [(table, dice.choice("xyz")) for table in dice.sample(tables, 2)]
        seconds = dice.uniform(1, 100)
        run = _join(f"j{number}", seconds=seconds, shuffle_s=seconds * dice.random(), sides=sides)
        runs += [run] * dice.randint(1, 4)
    return workload(runs, Rates.of_runs(runs))


def test_the_search_by_pairs_is_within_a_tenth_of_all_layouts_in_nine_of_ten_random_workloads():
    known = [_random_workload(seed) for seed in range(50)]
    near = [each.seconds(by_pairs(each)) <= 1.1 * each.seconds(exhaustive(each)) for each in known]
    assert sum(near) >= 45


@pytest.mark.parametrize("seed", range(10))
def test_a_search_never_ends_above_none(seed):
    known = _random_workload(seed)
    assert known.seconds(exhaustive(known)) <= known.seconds(by_pairs(known)) <= known.seconds({})
