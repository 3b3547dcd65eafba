"""Visits recorded once and replayed: the same answers, and nothing recorded that cannot be."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from capstan.generation import Engine, Request
from capstan.generation.runtime.recording import Recording, Standing
from capstan.models.meta_model import LayerCall, MetaModel

PLACES = {
    "resting-on-device": "weights=device cache=device",
    "weights-arriving": "weights=host cache=device",
    "attended-on-host": "weights=host cache=host attention=host",
    "half-on-host": "weights=host cache=host attention=host:0.5,device:0.5",
    "crossing": "weights=host cache=host attention=device",
    "half-over-disk": "weights=disk cache=disk attention=host:0.5,device:0.5",
    "mixed": "weights=device:0.3,host:0.4,disk:0.3 cache=device:0.34,host:0.33,disk:0.33",
}


@pytest.fixture(scope="module")
def long_requests(requests: list[Request]) -> list[Request]:
    """Answers so long that visits are made again and again; one passes row 64, where the form changes."""
    longer = (7, 8, 50, 6, 9)
    return [replace(each, max_tokens=count) for each, count in zip(requests, longer, strict=True)]


@pytest.fixture(scope="module")
def long_answers(
    model_folder: Callable[[str], Path],
    open_reference: Callable[[Path], Any],
    long_requests: list[Request],
) -> Callable[[str], list[list[int]]]:
    def long_answers(name: str) -> list[list[int]]:
        reference = open_reference(model_folder(name))
        return [reference.greedy(each.prompt, each.max_tokens) for each in long_requests]

    return cache(long_answers)


@pytest.mark.covering(1)
@pytest.mark.usefixtures("stops")
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt-350m-like", "mixtral"], indirect=True)
@pytest.mark.parametrize("place", PLACES)
def test_replayed_visits_answer_as_transformers_does(
    family: str,
    place: str,
    tapes: Any,
    long_requests: list[Request],
    long_answers: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    force_shape: Callable[..., None],
    check_promises: Callable[[Engine], None],
) -> None:
    with start_engine(family, place=[PLACES[place] + " activations=device"]) as engine:
        for slots, batches in ((5, 1), (2, 3)):
            before = tapes.replays
            force_shape(slots=slots, batches=batches)
            assert answers_of(engine, long_requests) == long_answers(family)
            check_promises(engine)
            assert tapes.replays > before, "some visits were replayed"


@pytest.mark.usefixtures("stops")
@pytest.mark.parametrize("when", ["before attention", "after attention"])
@pytest.mark.parametrize("place", PLACES)
def test_layers_that_look_at_values_run_as_they_are_and_read_every_row_once(
    when: str,
    place: str,
    tapes: Any,
    long_requests: list[Request],
    long_answers: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
    force_shape: Callable[..., None],
    check_promises: Callable[[Engine], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_layer = MetaModel.layer

    def look(values: torch.Tensor) -> None:
        assert values.is_meta or float(values.abs().sum()) > 0

    def layer(self: MetaModel, index: int, hidden: torch.Tensor, call: Any) -> torch.Tensor:
        if when == "before attention":
            look(hidden)
        output = run_layer(self, index, hidden, call)
        if when == "after attention":
            look(output)
        return output

    monkeypatch.setattr(MetaModel, "layer", layer)
    with start_engine("llama", place=[PLACES[place] + " activations=device"]) as engine:
        for slots, batches in ((5, 1), (2, 3)):
            force_shape(slots=slots, batches=batches)
            assert answers_of(engine, long_requests) == long_answers("llama")
            check_promises(engine)
    assert tapes.replays == 0


def test_hidden_states_that_move_are_not_recorded(
    tapes: Any,
    long_requests: list[Request],
    long_answers: Callable[[str], list[list[int]]],
    start_engine: Callable[..., Engine],
    answers_of: Callable[..., list[list[int]]],
) -> None:
    with start_engine("llama", place=["weights=host cache=device activations=host"]) as engine:
        assert answers_of(engine, long_requests) == long_answers("llama")
    assert tapes.replays == 0


class TestStanding:
    CALL = LayerCall((torch.zeros(1, 3),), {"scale": 2.0})

    def _standing(self, tapes: Any) -> Standing:
        return Standing([self.CALL, self.CALL], tapes)

    def test_takes_over_contents_at_the_same_places(self, tapes: Any) -> None:
        standing = self._standing(tapes)
        first = standing.calls[0].args[0]
        assert first is standing.calls[1].args[0], "what layers share they go on sharing"
        new = LayerCall((torch.ones(1, 3),), {"scale": 2.0})
        assert standing.follows([new, new])
        assert standing.calls[0].args[0] is first
        assert first.eq(1).all()
        assert self.CALL.args[0].eq(0).all(), "the caller's own tensor is left alone"

    def test_layers_with_arguments_of_their_own_keep_them_apart(self, tapes: Any) -> None:
        calls = [LayerCall((torch.full((2,), float(layer)),), {}) for layer in range(3)]
        standing = Standing(calls, tapes)
        shared = torch.full((2,), 7.0)
        assert standing.follows([LayerCall((shared,), {})] * 3)
        assert all(call.args[0].eq(7).all() for call in standing.calls)

    @pytest.mark.parametrize(
        "other",
        [
            LayerCall((torch.zeros(1, 4),), {"scale": 2.0}),
            LayerCall((torch.zeros(1, 3, dtype=torch.float64),), {"scale": 2.0}),
            LayerCall((torch.zeros(1, 3),), {"scale": 3.0}),
            LayerCall((torch.zeros(1, 3),), {"shift": 2.0}),
            LayerCall((None,), {"scale": 2.0}),
        ],
    )
    def test_another_form_is_refused(self, tapes: Any, other: LayerCall) -> None:
        assert not self._standing(tapes).follows([other, other])

    def test_an_abandoned_stretch_is_closed(self, tapes: Any) -> None:
        recording = Recording(tapes)
        recording.begin()
        recording.abandon()
        value = torch.zeros(())
        value.add_(1)  # would be recorded
        assert not recording.is_open
        assert not recording._stretches[0]._operations  # type: ignore[attr-defined]
