"""A layer's decode step, recorded once and replayed: what the device does, without Python's part in it.

Python and torch's dispatcher need about a millisecond for a layer's fifty operations, and every other thread
of the process makes that longer. Behind a fast accelerator it is what a sweep waits for. A batch that decodes
does the same in every sweep, at the same places in memory; only what lies there changes. So each visit is
recorded when it is made for the second time, in two stretches with the attention between them, or in one
where the device attends rows that rest with it.

What a recorded stretch reads must keep its place: a batch's hidden states, its layers' arguments, queries,
new rows, and what attention found. A `Standing` holds those, for as long as the batch keeps its form.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from capstan.models.meta_model import LayerCall


class Tape(Protocol):
    """Work of the device between `begin` and `end`, which is recorded and not done until `replay`."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def replay(self) -> None: ...


NewTape = Callable[[], Tape]


class CudaTape:
    """A CUDA graph, recorded on the current stream, which must not be the default one."""

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def begin(self) -> None:
        # Other threads go on with their copies meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


def cuda_tapes() -> NewTape:
    """Tapes of one batch. They share the memory of intermediate values, since only one of them runs at a
    time, and nothing of it is needed by another. While recording, the allocator cannot fall back on memory
    that it keeps for others, so that is given back first."""
    torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaTape(pool)


# Where devices can record: what makes tapes for one batch.
TAPES: dict[str, Callable[[], NewTape]] = {"cuda": cuda_tapes}


class Cut(NamedTuple):
    """What passes from a visit's first stretch to attention on the device, and from there to its second."""

    query: Tensor
    rows: Tensor
    attended: Tensor


class Recording:
    """One visit: all of it, or stretches with the attention between them, which is done each time."""

    def __init__(self, new_tape: NewTape) -> None:
        self._new_tape = new_tape
        self._stretches: list[Tape] = []
        self._asides: list[Callable[[Any], None]] = []
        self.is_open = False

    def begin(self) -> None:
        """Start to record a stretch."""
        self._stretches.append(self._new_tape())
        self._stretches[-1].begin()
        self.is_open = True

    def end(self) -> None:
        """The stretch ends; it is done now."""
        self.is_open = False
        self._stretches[-1].end()
        self._stretches[-1].replay()

    def aside(self, step: Callable[[Any], None], visit: Any) -> None:
        """Do a step between two stretches, which is not recorded: it gets the visit that is under way."""
        self.end()
        self._asides.append(step)
        step(visit)
        self.begin()

    def abandon(self) -> None:
        """What went wrong in a stretch is raised elsewhere; the device must stop recording."""
        if self.is_open:
            self.is_open = False
            with suppress(RuntimeError):
                self._stretches[-1].end()

    def replay(self, visit: Any) -> None:
        """Do what was recorded, and what lies between."""
        for stretch, aside in zip_longest(self._stretches, self._asides):
            stretch.replay()
            if aside is not None:
                aside(visit)


class Standing:
    """What one batch's decode steps have at fixed places, from sweep to sweep."""

    def __init__(self, calls: Sequence[LayerCall], new_tape: NewTape) -> None:
        self.new_tape = new_tape
        copies: dict[int, Any] = {}

        def copy_of(value: Any) -> Any:
            if id(value) not in copies:
                copies[id(value)] = tree_map(lambda leaf: leaf.clone() if _is_tensor(leaf) else leaf, value)
            return copies[id(value)]

        self.calls = [
            LayerCall(
                tuple(copy_of(value) for value in call.args),
                {name: copy_of(value) for name, value in call.kwargs.items()},
            )
            for call in calls
        ]
        self._cuts: dict[Hashable, Cut] = {}
        self._seen: set[Hashable] = set()
        self._recordings: dict[Hashable, Recording] = {}

    def follows(self, calls: Sequence[LayerCall]) -> bool:
        """Whether this batch's calls of another sweep have the same form; then take over their contents."""
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        compared: set[tuple[int, ...]] = set()
        for old, new in zip(self.calls, calls, strict=True):
            # Most models hand all their layers the same arguments.
            same = tuple(id(value) for call in (old, new) for value in (*call.args, *call.kwargs.values()))
            if same in compared:
                continue
            compared.add(same)
            old_leaves, old_tree = tree_flatten(old)
            new_leaves, new_tree = tree_flatten(new)
            if old_tree != new_tree or not all(map(_is_alike, old_leaves, new_leaves)):
                return False
            pairs = zip(old_leaves, new_leaves, strict=True)
            copies |= {id(place): (place, value) for place, value in pairs if _is_tensor(place)}
        for place, value in copies.values():
            place.copy_(value)
        return True

    def places(self, query: Tensor, rows: Tensor, value_size: int) -> Cut:
        """Where a visit's query, rows and result always lie. Made at a visit that is not recorded: what is
        made while recording belongs to the tape."""
        key = (query.shape, rows.shape, value_size)
        if key not in self._cuts:
            attended = query.new_empty(*query.shape[:-1], value_size)
            self._cuts[key] = Cut(query.new_empty(query.shape), rows.new_empty(rows.shape), attended)
        return self._cuts[key]

    def recording(self, key: Hashable) -> Recording | None:
        """What was recorded of a visit."""
        return self._recordings.get(key)

    def is_known(self, key: Hashable) -> bool:
        """Whether a visit is made again; only then recording it is worth its time. Note it, too."""
        is_known = key in self._seen
        self._seen.add(key)
        return is_known

    def keep(self, key: Hashable, recording: Recording) -> None:
        self._recordings[key] = recording


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _is_alike(old: object, new: object) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return type(old) is type(new) and bool(old == new)
