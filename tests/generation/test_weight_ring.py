"""The stream of weights: what is taken is right and in order, whatever still moves and whatever fails."""

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from capstan.errors import InputError
from capstan.generation import plan_for
from capstan.generation.model import Model
from capstan.generation.planning.placement import TIERS, Tier
from capstan.generation.planning.resources import DISK_TO_HOST, HOST_TO_DEVICE
from capstan.generation.runtime.weights import WeightStore
from capstan.hardware import Machine
from capstan.plans import Traffic
from capstan.storage import DiskSlab
from capstan.transport import Ledger

BOUND_S = 60.0
# Which tier the n-th tensor rests on.
PLACES: dict[str, Callable[[int], Tier]] = {
    "device": lambda _: "device",
    "host": lambda _: "host",
    "disk": lambda _: "disk",
    "mixed": lambda index: TIERS[index % 3],
    "the later units on disk": lambda index: "host" if index < 12 else "disk",
}


class Stream:
    """A store with its weights loaded, and what ought to come out of it."""

    def __init__(
        self, model: Model, store: WeightStore, place: Callable[[int], Tier], ledger: Ledger
    ) -> None:
        from safetensors.torch import load_file

        self.store, self.num_units = store, len(model.manifest.units)
        self._units, self._ledger = model.manifest.units, ledger
        self._tiers = {name: place(index) for index, name in enumerate(model.manifest.placeable)}
        self._saved = load_file(model.folder / "model.safetensors")

    def is_right(self, unit: int, tensors: dict[str, Tensor]) -> bool:
        """Whether these are the unit's tensors, sent through their codecs."""
        if list(tensors) != [tensor.name for tensor in self._units[unit]]:
            return False
        return all(
            torch.equal(tensors[each.name], each.codec.decode(each.codec.encode(self._saved[each.name])))
            for each in self._units[unit]
        )

    def sweep(self) -> None:
        """Take every unit and release it."""
        for unit in range(self.num_units):
            assert self.is_right(unit, self.store.take(unit))
            self.store.release()

    def has_counted(self, units: list[int]) -> bool:
        """Whether the ledger has the bytes of just these units."""
        away = [each for unit in units for each in self._units[unit] if self._tiers[each.name] != "device"]
        read = [each for each in away if self._tiers[each.name] == "disk"]
        return self._ledger.traffic == Traffic(
            {
                (HOST_TO_DEVICE, "weights"): sum(each.stored_bytes for each in away),
                (DISK_TO_HOST, "weights"): sum(each.stored_bytes for each in read),
            }
        )

    def wait(self) -> None:
        """Until the next unit is there."""
        deadline_s = time.monotonic() + BOUND_S
        while not self.store.has_arrived():
            assert time.monotonic() < deadline_s
            time.sleep(0.001)


@pytest.fixture(scope="module", params=[None, 4], ids=["exact", "4-bits"])
def model(request: pytest.FixtureRequest, model_folder: Callable[[str], Path], machine: Machine) -> Model:
    """A tiny model of three layers and a head, with its weights as they are or in 4 bits."""
    folder = model_folder("llama")
    return plan_for(folder, machine=machine, device="cpu", weight_bits=request.param)[0].model


@pytest.fixture
def open_stream(model: Model, scratch: Path) -> Callable[..., Any]:
    """`open_stream("disk", ring_slots=3)`: a stream of the model's weights from there."""

    @contextmanager
    def open_stream(place: str, *, ring_slots: int = 3) -> Iterator[Stream]:
        ledger = Ledger()
        with DiskSlab(scratch, 1 << 20) as disk, torch.inference_mode():
            store = WeightStore(
                model.manifest,
                {name: PLACES[place](index) for index, name in enumerate(model.manifest.placeable)},
                ring_slots=ring_slots,
                checkpoint=model.checkpoint,
                sources=model.sources,
                device=torch.device("cpu"),
                disk=disk,
                ledger=ledger,
            )
            try:
                for _ in store.load():
                    pass
                yield Stream(model, store, PLACES[place], ledger)
            finally:
                store.close()
                model.checkpoint.close()

    return open_stream


def _delayed(function: Callable[..., None]) -> Callable[..., None]:
    def after_a_while(*args: Any) -> None:
        time.sleep(0.002)
        function(*args)

    return after_a_while


@pytest.mark.parametrize("slow", ["_read_all", "_copy_all"])
@pytest.mark.parametrize("ring_slots", [2, 3])
@pytest.mark.parametrize("place", PLACES)
def test_units_come_in_order_and_stay_right_until_they_are_released(
    place: str,
    ring_slots: int,
    slow: str,
    open_stream: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WeightStore, slow, _delayed(getattr(WeightStore, slow)))
    with open_stream(place, ring_slots=ring_slots) as stream:
        held: deque[tuple[int, dict[str, Tensor]]] = deque()
        for sweeps_to_come in (2, 2, 1):
            stream.store.expect(sweeps=sweeps_to_come)
            for unit in range(stream.num_units):
                if len(held) == ring_slots - 1:
                    assert stream.is_right(*held.popleft())
                    stream.store.release()
                held.append((unit, stream.store.take(unit)))
        assert all(stream.is_right(*each) for each in held)
        assert stream.has_counted(3 * list(range(stream.num_units)))


def test_a_units_bytes_are_counted_when_it_is_taken_and_when_it_had_arrived_for_nothing(
    open_stream: Callable[..., Any],
) -> None:
    with open_stream("mixed") as stream:
        stream.store.expect(sweeps=1)
        stream.wait()
        assert stream.has_counted([])
        stream.store.take(0)
        assert stream.has_counted([0])
        stream.store.forget()
        assert stream.has_counted([0, 1, 2])  # three slots: these had arrived
        stream.store.expect(sweeps=1)  # from the first unit on
        stream.sweep()
        assert stream.has_counted([0, 1, 2, *range(stream.num_units)])


@pytest.mark.parametrize("ring_slots", [2, 3])
@pytest.mark.parametrize("place", ["host", "disk", "mixed"])
def test_units_of_the_next_sweep_arrive_early_only_if_there_is_one(
    place: str, ring_slots: int, open_stream: Callable[..., Any]
) -> None:
    with open_stream(place, ring_slots=ring_slots) as stream:
        once = list(range(stream.num_units))
        stream.store.expect(sweeps=1)
        stream.sweep()
        stream.store.forget()
        assert stream.has_counted(once)
        stream.store.expect(sweeps=2)
        stream.sweep()
        assert stream.has_counted(2 * once)
        stream.store.forget()
        assert stream.has_counted([*once, *once, *once[:ring_slots]])


def test_a_unit_has_arrived_when_its_last_byte_has(
    open_stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, copy_all = Event(), WeightStore._copy_all

    def gated(*args: Any) -> None:
        copy_all(*args)
        assert gate.wait(BOUND_S)

    monkeypatch.setattr(WeightStore, "_copy_all", gated)
    with open_stream("disk") as stream:
        assert stream.store.has_arrived(), "nothing is expected"
        stream.store.expect(sweeps=1)
        assert not stream.store.has_arrived()
        gate.set()
        stream.wait()
        stream.sweep()
        assert stream.store.has_arrived()


@pytest.mark.parametrize(("ring_slots", "is_alone"), [(2, True), (3, False)])
def test_a_decoded_unit_must_be_alone_where_there_is_room_for_one(
    ring_slots: int, is_alone: bool, model: Model, open_stream: Callable[..., Any]
) -> None:
    is_decoded = any(not each.is_plain for unit in model.manifest.units for each in unit)
    with open_stream("host", ring_slots=ring_slots) as stream:
        assert stream.store.must_be_alone == (is_alone and is_decoded)


@pytest.mark.parametrize("ring_slots", [2, 3])
@pytest.mark.parametrize("failing", [1, 8, 20, 28, 40])
def test_a_read_error_ends_a_sweep_and_after_forgetting_it_the_next_one_is_right(
    failing: int, ring_slots: int, open_stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, calls = os.preadv, iter(range(1, 1000))

    def read(*args: Any) -> int:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*args)

    with open_stream("disk", ring_slots=ring_slots) as stream:

        def two_sweeps() -> None:
            for sweeps in (2, 1):
                stream.store.expect(sweeps=sweeps)
                stream.sweep()

        monkeypatch.setattr(os, "preadv", read)
        with pytest.raises(InputError, match="failed: Input/output error"):
            two_sweeps()
        with suppress(InputError):  # told already
            stream.store.forget()
        two_sweeps()
        stream.store.forget()
