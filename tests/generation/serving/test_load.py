"""Many clients at once: nothing lost, nothing answered twice, nothing mixed up."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest

from capstan.generation import Engine, Request

CLIENTS = 64


def _body(index: int) -> dict[str, Any]:
    """Every request has a prompt of its own; most are of different lengths, some are sampled."""
    prompt = [2 + (index // 60**at) % 60 for at in range(3)] + [5 + index % 50] * (index % 9)
    return {
        "prompt": prompt,
        "max_tokens": 1 + index % 5,
        "temperature": 0.7 if index % 4 == 0 else 0.0,
        "seed": index,
        "n": 2 if index % 16 == 0 else 1,
        "ignore_eos": True,
    }


async def _ask_all(url: str, num_requests: int) -> dict[int, list[httpx.Response]]:
    answers: dict[int, list[httpx.Response]] = {index: [] for index in range(num_requests)}
    left = iter(range(num_requests))

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            for index in left:
                answers[index].append(await http.post("/v1/completions", json=_body(index)))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers


@pytest.mark.parametrize("num_requests", [200, pytest.param(2_000, marks=pytest.mark.slow)])
def test_requests_of_64_clients_are_each_answered_once_and_as_alone(
    serve: Callable[..., Any], serving_engine: Engine, num_requests: int
) -> None:
    with serve() as running:
        answers = asyncio.run(_ask_all(running.url, num_requests))
        num_finished = running.metric("sequences_finished_total")
        assert running.metric("sequences_running") == running.metric("sequences_waiting") == 0
        assert running.metric("sequences_dropped_total") == 0
    assert {len(each) for each in answers.values()} == {1}
    bodies = {index: each[0].json() for index, each in answers.items() if each[0].status_code == 200}
    assert len(bodies) == num_requests, Counter(each[0].status_code for each in answers.values())
    assert num_finished == sum(_body(index)["n"] for index in range(num_requests))
    assert len({body["id"] for body in bodies.values()}) == num_requests
    asked = [Request(**_body(index), id=str(index)) for index in range(num_requests)]
    for done in serving_engine.generate(asked):
        choices = bodies[int(done.id)]["choices"]
        assert [choice["text"] for choice in choices] == [answer.text for answer in done.answers]
        assert [choice["finish_reason"] for choice in choices] == ["length"] * len(done.answers)


def test_clients_that_leave_in_the_midst_of_it_cost_the_others_nothing(
    serve: Callable[..., Any], serving_engine: Engine
) -> None:
    async def ask_some(url: str) -> list[str | None]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:

            async def one(index: int) -> str | None:
                body = _body(index) | {"max_tokens": 30, "n": 1}
                asking = asyncio.create_task(http.post("/v1/completions", json=body))
                if index % 3 == 0:
                    await asyncio.sleep(0.002 * (index % 50))
                    asking.cancel()
                    await asyncio.wait([asking])
                    return None
                return str((await asking).json()["choices"][0]["text"])

            return list(await asyncio.gather(*(one(index) for index in range(300))))

    with serve() as running:
        texts = asyncio.run(ask_some(running.url))
        with running.http() as http:  # whoever waits behind all those who left
            assert http.post("/v1/completions", json=_body(1)).status_code == 200
        assert running.metric("sequences_running") == running.metric("sequences_waiting") == 0
    kept = {str(index): text for index, text in enumerate(texts) if text is not None}
    asked = [Request(**_body(int(index)) | {"max_tokens": 30, "n": 1}, id=index) for index in kept]
    assert {done.id: done.text for done in serving_engine.generate(asked)} == kept
