"""Whatever placement and budgets a planner accepts, the job runs, and every byte was predicted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capstan.errors import DoesNotFit
from capstan.generation import Engine, Request, plan_for
from capstan.generation.planning.batching import Length
from capstan.generation.planning.placement import TIERS, Wish
from capstan.generation.planning.planner import Planner
from capstan.hardware import Machine
from capstan.plans import IntegerProgram

shares = st.one_of(
    st.none(),
    st.sampled_from(TIERS).map(lambda tier: {tier: 1.0}),
    st.permutations([0.5, 0.3, 0.2]).map(lambda parts: dict(zip(TIERS, parts, strict=True))),
)
wishes = st.builds(
    Wish,
    weights=shares,
    cache=shares,
    activations=st.one_of(st.none(), st.sampled_from(TIERS)),
    attention=st.sampled_from([None, 0.0, 0.4, 1.0]),
)
# From less than one layer needs to more than everything: the tiny model has about 0.5 MiB.
KIB = 1024
budgets = st.builds(
    lambda *sizes: dict(zip(TIERS, sizes, strict=True)),
    st.sampled_from([500 * KIB, 700 * KIB, 900 * KIB, 1200 * KIB, 20_000 * KIB]),
    st.sampled_from([100 * KIB, 300 * KIB, 500 * KIB, 20_000 * KIB]),
    st.sampled_from([0, 40 * KIB, 20_000 * KIB]),
)
jobs = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 4)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def planners(model_folder: Callable[[str], Path], machine: Machine) -> dict[str, Planner]:
    """Planners of the tiny models, by how they are stored."""
    kinds = {"exact": {}, "in few bits": {"weight_bits": 4, "cache_bits": 8}}
    return {
        name: plan_for(model_folder("llama"), machine=machine, device="cpu", **bits)[0]
        for name, bits in kinds.items()
    }


@given(st.sampled_from(["exact", "in few bits"]), wishes, budgets, jobs, st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_job_that_a_planner_accepts_runs_within_its_budgets_and_moves_what_was_predicted(
    planners, scratch, check_promises, kind, wish, budgets, job, scores
):
    planner = replace(planners[kind], wish=wish, budgets=budgets)
    lengths = [Length(prompt=num_prompt, new=num_new) for num_prompt, num_new in job]
    prompts = [
        [1 + (index * 31 + at * 7) % 120 for at in range(each.prompt)] for index, each in enumerate(lengths)
    ]
    try:
        opening = planner.plan(lengths)
    except DoesNotFit as error:
        assert "was granted" in str(error) or "No placement" in str(error)
        return
    with Engine.start(planner, opening, torch.device("cpu"), disk_folder=scratch) as engine:
        requests = [
            Request(prompt=prompt, max_tokens=each.new, ignore_eos=True)
            for prompt, each in zip(prompts, lengths, strict=True)
        ]
        done = {completion.id: completion for completion in engine.generate(requests)}
        assert [len(done[str(index)].answers[0].tokens) for index in range(len(job))] == [
            each.new for each in lengths
        ]
        check_promises(engine)
        if scores:
            assert [len(score.logprobs) for score in engine.score(prompts)] == [
                each.prompt - 1 for each in lengths
            ]
            check_promises(engine)


@given(shares, shares, jobs)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wished_shares_are_what_is_planned(planners, weights, cache, job):
    planner = replace(
        planners["exact"], wish=Wish(weights=weights, cache=cache), budgets=dict.fromkeys(TIERS, 20_000 * KIB)
    )
    plan = planner.plan([Length(*each) for each in job])
    if weights is not None:
        placed = planner.model.manifest.placeable
        largest = max(tensor.stored_bytes for tensor in placed.values())
        total = sum(tensor.stored_bytes for tensor in placed.values())
        for tier, share in weights.items():
            there = sum(
                placed[name].stored_bytes for name, where in plan.placement.weights.items() if where == tier
            )
            assert abs(there - share * total) <= 2 * largest
    if cache is not None and 1.0 in cache.values():
        (tier,) = cache
        assert plan.placement.cache == (tier,) * 3


def test_a_weight_that_the_solver_leaves_on_disk_goes_where_host_memory_has_room(planners, monkeypatch):
    """A small tensor on disk costs less than the gap within which the solver stops."""
    solve = IntegerProgram.minimise

    def within_its_gap(program, cost, *, relaxed=False, **more):
        found = solve(program, cost, relaxed=relaxed, **more)
        counts = [name for name in found if name.startswith("input_layernorm.weight") and " on " in name]
        total = sum(found[name] for name in counts)
        return found | {name: total if name.endswith("on disk") else 0.0 for name in counts}

    monkeypatch.setattr(IntegerProgram, "minimise", within_its_gap)
    budgets = dict.fromkeys(TIERS, 20_000 * KIB)
    found = replace(planners["exact"], budgets=budgets).plan([Length(prompt=20, new=4)])
    assert "disk" not in found.placement.weights.values()
