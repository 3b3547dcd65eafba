"""A probe of a shaped or real network gives figures that a planner can use."""

from pathlib import Path

FILE = str(Path(__file__).with_name("probe_cases.py"))


def test_every_rank_gets_the_same_figures_and_they_are_possible(in_world):
    found = in_world(FILE, "probed", 3)
    assert all(each["network"] == found[0]["network"] for each in found)
    latency_s, bandwidth = found[0]["network"]
    assert latency_s > 0
    assert bandwidth > 0
    for each in found:
        assert each["coding"] == found[0]["coding"]
        assert min(each["coding"]) > 0
