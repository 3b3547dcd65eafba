"""Batches that stop inside their attention and are resumed: the same answers, bytes and memory."""

from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

from capstan.generation import Engine, Request

HALF = "attention=host:0.5,device:0.5"
PLACES = {
    "attended-on-host": "weights=host cache=host attention=host",
    "half-on-host": f"weights=host cache=host {HALF}",
    "crossing": "weights=host cache=host attention=device",
    "attended-over-disk": "weights=disk cache=disk attention=host",
    "half-over-disk": f"weights=disk cache=disk {HALF}",
    "crossing-from-disk": "weights=device cache=disk attention=device",
    "mixed": "weights=device:0.3,host:0.4,disk:0.3 cache=device:0.34,host:0.33,disk:0.33 " + HALF,
}
# Slots in a batch, batches. Five sequences wait, so the second refills a slot.
SHAPES = ((2, 3), (1, 4))


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> list[str]:
    """A placement by hand with which batches stop."""
    return [PLACES[request.param] + " activations=device"]


@pytest.fixture(params=[2, 3])
def ring_slots(request: pytest.FixtureRequest, force_ring: Callable[[int], None]) -> None:
    """Engines have room for so many streamed layers."""
    force_ring(request.param)


@pytest.mark.covering(2)
@pytest.mark.usefixtures("ring_slots")
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"], indirect=True)
def test_batches_that_stop_answer_as_transformers_does_and_every_byte_was_predicted(
    family: str,
    place: list[str],
    stops: list[int],
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    force_shape: Callable[..., None],
    check_promises: Callable[[Engine], None],
) -> None:
    with start_engine(family, place=place) as engine:
        for slots, batches in SHAPES:
            stops.clear()
            force_shape(slots=slots, batches=batches)
            assert answers_of(engine, requests) == expected(family)
            check_promises(engine)
            assert max(stops) >= 2, "several batches were stopped at a time"


@pytest.mark.covering(1)
@pytest.mark.usefixtures("ring_slots")
@pytest.mark.parametrize("name", ["half-on-host", "half-over-disk", "mixed"])
@pytest.mark.parametrize("weight_bits", [16, 4])
def test_batches_that_stop_compute_the_same_numbers_with_weights_in_fewer_bits(
    name: str,
    weight_bits: int,
    stops: list[int],
    requests: list[Request],
    model_folder: Callable[[str], Path],
    open_engine: Callable[..., Engine],
    force_shape: Callable[..., None],
    check_promises: Callable[[Engine], None],
) -> None:
    asked = [Request(prompt=each.prompt, max_tokens=each.max_tokens, logprobs=0) for each in requests]
    force_shape(slots=1, batches=4)
    outcomes = []
    for place in ("weights=device cache=device", PLACES[name] + " activations=device"):
        with open_engine(model_folder("llama"), weight_bits=weight_bits, place=[place]) as engine:
            outcomes.append({each.id: each.answers[0].logprobs for each in engine.generate(asked)})
            check_promises(engine)
        assert bool(stops) == (len(outcomes) == 2), (
            "with everything on the device there is nothing to stop for"
        )
    # The same operations on the same numbers, whenever they came: equal bit for bit.
    assert outcomes[1] == outcomes[0]


@pytest.mark.covering(1)
@pytest.mark.usefixtures("ring_slots")
def test_two_jobs_in_turns_on_one_engine_do_not_meet(
    stops: list[int],
    place: list[str],
    requests: list[Request],
    expected: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    force_shape: Callable[..., None],
) -> None:
    def answers(engine: Engine, order: list[int]) -> Iterator[tuple[int, list[int]]]:
        for completion in engine.generate([requests[index] for index in order]):
            yield order[int(completion.id)], list(completion.answers[0].tokens)

    with start_engine("llama", place=place) as engine:
        force_shape(slots=1, batches=3)
        jobs = answers(engine, [0, 1, 2, 3, 4]), answers(engine, [4, 2, 0])
        pairs = list(zip_longest(*jobs))
    for position, count in enumerate((5, 3)):
        found = dict(pair[position] for pair in pairs if pair[position] is not None)
        assert len(found) == count
        assert all(tokens == expected("llama")[index] for index, tokens in found.items())
    assert stops
