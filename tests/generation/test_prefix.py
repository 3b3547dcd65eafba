"""Tokens that all prompts begin with are computed and stored once, and nothing else changes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capstan.generation import Engine, Request, plan_for
from capstan.generation.planning.batching import Length
from capstan.generation.planning.placement import TIERS, parse_wish
from capstan.generation.planning.planner import Planner
from capstan.generation.planning.prefixes import common_prefix
from capstan.hardware import Machine
from capstan.plans import explain

PREFIX = [(7 * at) % 120 + 1 for at in range(20)]
# One prompt has a single token of its own, one begins its own part like the end of the prefix.
PROMPTS = [[*PREFIX, *own] for own in ([5], [9, 9, 3, 4], [PREFIX[-1], 2, 8], list(range(40, 53)), [6, 1])]
NEW = [6, 3, 1, 5, 4]
FAMILIES = ["opt", "llama", "mistral", "gemma2", "gpt-neox", "mixtral"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(family: str, place: list[str], start_engine: Callable[..., Engine]) -> Iterator[Engine]:
    with start_engine(family, place=place, share_prefixes=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(
    open_reference: Callable[[Path], Any], model_folder: Callable[[str], Path], family: str
) -> list[list[int]]:
    reference = open_reference(model_folder(family))
    return [reference.greedy(prompt, count) for prompt, count in zip(PROMPTS, NEW, strict=True)]


@pytest.mark.covering(2)
@pytest.mark.usefixtures("block")
def test_answers_after_a_shared_prefix_equal_transformers_and_every_byte_was_predicted(
    engine: Engine,
    expected: list[list[int]],
    answers_of: Callable[..., list[list[int]]],
    check_promises: Callable[[Engine], None],
) -> None:
    asked = [
        Request(prompt=prompt, max_tokens=count, ignore_eos=True)
        for prompt, count in zip(PROMPTS, NEW, strict=True)
    ]
    assert answers_of(engine, asked) == expected
    assert any(choice.name == "prefix" for choice in engine.plan.choices)
    check_promises(engine)


def test_a_shared_prefix_is_stored_once(start_engine: Callable[..., Engine]) -> None:
    place = ["weights=device cache=host attention=host"]
    with start_engine("llama", place=place, share_prefixes=True) as engine:
        lengths = [Length(len(prompt), 4) for prompt in PROMPTS]
        alone, shared = (engine.plan_job(lengths, prefix=prefix) for prefix in (0, len(PREFIX)))
        rows = engine.model.num_layers * len(PREFIX) * (len(PROMPTS) - 1)
        saved = rows * engine.model.formats[0].row_bytes
    written = [each.plan.traffic.size_bytes["device->host", "cache"] for each in (alone, shared)]
    assert written[0] - written[1] == saved


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([PREFIX], 0),
        ([PREFIX, PREFIX], 19),
        ([PREFIX, [*PREFIX, 1, 2]], 19),
        ([[*PREFIX, 3], [*PREFIX, 1, 2]], 20),
        ([[*PREFIX, 3], [*PREFIX[:16], 121, 3], [*PREFIX, 7]], 16),
        ([[*PREFIX, 3], [*PREFIX[:15], 121, 3]], 0),
        ([PREFIX, [1]], 0),
    ],
)
def test_a_common_prefix_leaves_every_prompt_a_token(prompts: list[list[int]], shared: int) -> None:
    assert common_prefix(prompts) == shared


@pytest.fixture(scope="module")
def planner_of(
    model_folder: Callable[[str], Path], make_machine: Callable[..., Machine]
) -> Callable[..., Planner]:
    """`planner_of(kind, ...)`: a planner of a tiny model on a made-up machine, which may be a GPU's."""

    def planner_of(kind: str = "cpu", **changes: Any) -> Planner:
        planner = plan_for(model_folder("llama"), machine=make_machine("cpu"), device="cpu")[0]
        return replace(planner, machine=make_machine(kind), budgets=dict.fromkeys(TIERS, 1 << 30), **changes)

    return planner_of


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("cache", ["device", "host"])
@pytest.mark.parametrize(("prompts", "tokens", "prefix"), [(2, 17, 16), (12, 200, 190), (6, 250, 16)])
def test_a_prefix_is_shared_only_where_that_is_predicted_faster_and_the_other_is_priced(
    kind: str, cache: str, prompts: int, tokens: int, prefix: int, planner_of: Callable[..., Planner]
) -> None:
    lengths = [Length(tokens, 6)] * prompts
    planner = planner_of(kind, wish=parse_wish([f"cache={cache}"]))
    shared, alone = (
        replace(planner, shares_prefixes=shares).plan(lengths, prefix=prefix if shares else 0)
        for shares in (True, False)
    )
    assert (shared.prefix, alone.prefix) == (prefix, 0)
    weighed = planner.plan(lengths, prefix=prefix)
    doubted = 3.8 if (kind, cache) == ("cuda", "host") else 1.0
    is_shared = shared.plan.seconds * doubted <= alone.plan.seconds
    assert weighed.prefix == (prefix if is_shared else 0)
    assert weighed.plan.phases == (shared if is_shared else alone).plan.phases
    (other,) = weighed.plan.alternatives
    assert other.seconds >= weighed.plan.seconds
    shared_where = "once, on the device" if cache == "device" else "once, away from the device"
    assert other.name == f"the first {prefix} tokens {'for each prompt' if is_shared else shared_where}"
    assert "instead" in explain(weighed.plan)


def test_both_outcomes_of_weighing_a_prefix_come_up(planner_of: Callable[..., Planner]) -> None:
    planner = planner_of("cpu")
    assert planner.plan([Length(200, 2)] * 12, prefix=190).prefix == 190
    assert (
        planner_of("cuda", wish=parse_wish(["cache=host"])).plan([Length(17, 60)] * 2, prefix=16).prefix == 0
    )


def test_beside_a_gpu_the_prefix_is_also_weighed_on_the_device(planner_of: Callable[..., Planner]) -> None:
    plan = planner_of("cuda").plan([Length(200, 6)] * 12, prefix=190)
    assert len(plan.plan.alternatives) == 2
    assert all(other.seconds >= plan.plan.seconds for other in plan.plan.alternatives)


def test_an_engine_whose_plan_keeps_a_prefix_for_each_answers_as_one_that_shares_it(
    start_engine: Callable[..., Engine], answers_of: Callable[..., list[list[int]]]
) -> None:
    asked = [Request(prompt=prompt, max_tokens=4, ignore_eos=True) for prompt in PROMPTS]
    answers = []
    for shares in (True, False, None):
        with start_engine("llama", share_prefixes=shares) as engine:
            answers.append(answers_of(engine, asked))
    assert answers[0] == answers[1] == answers[2]
