"""Attention over rows in host memory equals the formula, computed here in float64 from the decoded rows."""

import gc
import os
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capstan.codecs import Cast, Codec, GroupQuantised, Identity
from capstan.errors import DoesNotFit
from capstan.generation.attention import host_attention
from capstan.generation.attention.host_attention import Seats, attend_on_host, reads_in_place
from capstan.generation.attention.row_format import RowFormat
from capstan.hardware import compiler
from capstan.models.attention_geometry import AttentionGeometry

needs_compiler = pytest.mark.skipif(compiler._compiler() is None, reason="there is no C compiler")


class Heads(NamedTuple):
    """How many key heads, queries of each, and their sizes."""

    key: int = 2
    per_key: int = 1
    key_size: int = 64
    value_size: int = 64


def _grouped(num_bits: int, group_size: int) -> Codec:
    return GroupQuantised(num_bits=num_bits, group_size=group_size)


# Queries' dtype, codec, heads. Together: every kind of row with every number of queries of a key head.
KINDS: dict[str, tuple[torch.dtype, Codec, Heads]] = {
    "float32": (torch.float32, Identity(), Heads(per_key=1, key_size=16, value_size=16)),
    "float32 in several runs of heads": (torch.float32, Identity(), Heads(key=20, per_key=1)),
    "float16": (torch.float16, Identity(), Heads(per_key=2, value_size=32)),
    "bfloat16": (torch.bfloat16, Identity(), Heads(per_key=3, key_size=32, value_size=48)),
    "float16 for float32": (torch.float32, Cast(dtype=torch.float16), Heads(per_key=4)),
    "bfloat16 for float32": (torch.float32, Cast(dtype=torch.bfloat16), Heads(per_key=8, key_size=128)),
    "float32 for float16": (torch.float16, Cast(dtype=torch.float32), Heads(key=1, per_key=16)),
    "8 bits in 16s": (torch.float32, _grouped(8, 16), Heads(per_key=2, key_size=48, value_size=16)),
    "8 bits in 32s": (torch.bfloat16, _grouped(8, 32), Heads(per_key=1, key_size=32)),
    "8 bits in 64s": (torch.float16, _grouped(8, 64), Heads(key=3, per_key=16)),
    "4 bits in 16s": (torch.float32, _grouped(4, 16), Heads(per_key=3, key_size=16, value_size=48)),
    "4 bits in 32s": (torch.float16, _grouped(4, 32), Heads(per_key=8, value_size=32)),
    "4 bits in 64s": (torch.bfloat16, _grouped(4, 64), Heads(key=3, per_key=4, value_size=128)),
    "4 bits in 64s, 11 queries": (torch.float32, _grouped(4, 64), Heads(per_key=11)),
}


def _layout(kind: str, **rules: float | None) -> RowFormat:
    dtype, codec, heads = KINDS[kind]
    geometry = AttentionGeometry(
        num_query_heads=heads.key * heads.per_key,
        num_key_heads=heads.key,
        key_size=heads.key_size,
        value_size=heads.value_size,
        scaling=heads.key_size**-0.5,
        **rules,
    )
    return RowFormat(geometry=geometry, codec=codec, dtype=dtype, device_type="cpu")


@dataclass
class Scene:
    """Sequences in a region whose every other byte is 255: as a row, NaN throughout."""

    layout: RowFormat
    query: Tensor
    rows: list[Tensor]  # of each sequence, [rows, row bytes]
    region: Tensor
    seats: Seats
    prefix: Tensor | None
    news: Tensor | None

    @classmethod
    def of(
        cls, layout: RowFormat, ends: list[int], *, shared: int = 0, news: bool = False, seed: int = 0
    ) -> "Scene":
        """Each sequence in a slot of its own, in no order, with idle slots between them."""
        geometry = layout.geometry
        chance = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=chance).to(layout.dtype)

        def encoded(count: int) -> Tensor:
            key, value = (
                random(count, geometry.num_key_heads, size)
                for size in (geometry.key_size, geometry.value_size)
            )
            return layout.encode(key, value)

        rows = [encoded(end) for end in ends]
        prefix = rows[0][:shared]
        for each in rows:
            each[:shared] = prefix
        num_slots, capacity = len(ends) + 2, max(ends) - shared + 3
        slots = torch.randperm(num_slots, generator=chance)[: len(ends)].tolist()
        region = torch.full((num_slots, capacity, layout.row_bytes), 255, dtype=torch.uint8)
        for slot, each in zip(slots, rows, strict=True):
            own = each[shared : len(each) - news]
            region[slot, : len(own)] = own
        return cls(
            layout=layout,
            query=random(len(ends), geometry.num_query_heads, geometry.key_size),
            rows=rows,
            region=region,
            seats=Seats.of(slots, ends),
            prefix=prefix if shared else None,
            news=torch.stack([each[-1] for each in rows]) if news else None,
        )

    def attended(self, *, threads: int = 1, layout: RowFormat | None = None) -> Tensor:
        layout = layout or self.layout
        shape = (len(self.rows), layout.geometry.num_query_heads, layout.geometry.value_size)
        out = torch.full(shape, torch.nan, dtype=self.query.dtype)
        attend_on_host(
            self.query,
            self.region,
            layout,
            self.seats,
            out=out,
            prefix=self.prefix,
            new_rows=self.news,
            threads=threads,
        )
        return out

    def wanted(self) -> Tensor:
        """The formula, in float64."""
        geometry = self.layout.geometry
        is_plain = self.layout.is_plain
        exact = self.layout if is_plain else replace(self.layout, dtype=torch.float32)
        found = []
        for query, rows in zip(self.query.double(), self.rows, strict=True):
            seen = rows if geometry.sliding_window is None else rows[-geometry.sliding_window :]
            keys, values = (part[0].double() for part in exact.decode(seen[None]))
            grouped = query.unflatten(0, (geometry.num_key_heads, -1))
            scores = torch.einsum("hqd,rhd->hqr", grouped, keys) * geometry.scaling
            if geometry.softcap is not None:
                scores = geometry.softcap * (scores / geometry.softcap).tanh()
            found.append(torch.einsum("hqr,rhd->hqd", scores.softmax(-1), values).flatten(0, 1))
        return torch.stack(found)


def _is_near(found: Tensor, wanted: Tensor) -> bool:
    """Up to 128 roundings of 2**-24 of numbers of up to 5, in the scores and again in the sum of values:
    2 * 128 * 5 * 2**-24 = 8e-5; and one of the result to its dtype, of which eps is twice the error."""
    eps = torch.finfo(found.dtype).eps / 2 if found.dtype.itemsize == 2 else 0.0
    return torch.allclose(found.double(), wanted, rtol=eps, atol=8e-5, equal_nan=True)


@st.composite
def scenes(draw: st.DrawFn, kind: str) -> Scene:
    shared = draw(st.sampled_from([0, 0, 1, 5, 16, 21]))
    news = draw(st.booleans())
    least = max(1, shared + news)
    ends = draw(st.lists(st.integers(least, least + 40), min_size=1, max_size=4))
    layout = _layout(
        kind,
        # Windows of one row, that begin inside the shared rows, after them, and before everything.
        sliding_window=draw(st.sampled_from([None, 1, 3, 16, 24, 1000])),
        softcap=draw(st.sampled_from([None, None, 0.5, 30.0])),
    )
    return Scene.of(layout, ends, shared=shared, news=news, seed=draw(st.integers(0, 2**32)))


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@given(st.data(), st.sampled_from([1, 2, 5]))
@settings(max_examples=25, deadline=None)
def test_rows_in_place_are_attended_as_the_formula_says_and_only_new_rows_are_written(kind, data, threads):
    scene = data.draw(scenes(kind))
    assert reads_in_place(scene.layout, scene.query.dtype)
    expected = scene.region.clone()
    if scene.news is not None:
        shared = 0 if scene.prefix is None else len(scene.prefix)
        for slot, rows in zip(scene.seats.slots.tolist(), scene.rows, strict=True):
            expected[slot, len(rows) - shared - 1] = rows[-1]
    assert _is_near(scene.attended(threads=threads), scene.wanted())
    assert torch.equal(scene.region, expected)


@pytest.fixture
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a C compiler."""
    caches = host_attention._kernel, compiler._compiled
    for each in caches:
        each.cache_clear()
    monkeypatch.setattr(compiler, "_compiler", lambda: None)
    yield
    for each in caches:
        each.cache_clear()


@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shared", "window", "softcap"), [(0, None, None), (5, 9, 30.0), (21, 40, None)])
@pytest.mark.parametrize("news", [False, True])
def test_without_a_compiler_the_result_is_the_same_to_rounding(kind, shared, window, softcap, news):
    layout = _layout(kind, sliding_window=window, softcap=softcap)
    assert not reads_in_place(layout, layout.dtype)
    scene = Scene.of(layout, [shared + 1, shared + 17, shared + 30], shared=shared, news=news)
    expected = scene.region.clone()
    if scene.news is not None:
        for slot, rows in zip(scene.seats.slots.tolist(), scene.rows, strict=True):
            expected[slot, len(rows) - shared - 1] = rows[-1]
    # Rows, scores and weights are in the queries' dtype here: scores of up to 5, off by 5 eps / 2, change
    # weights by so much of themselves, and values of up to 5 by 5 times that; the rest is less.
    limit = 16 * torch.finfo(layout.dtype).eps + 8e-5
    assert (scene.attended().double() - scene.wanted()).abs().max() <= limit
    assert torch.equal(scene.region, expected)


@pytest.mark.covering(1)
@pytest.mark.usefixtures("_no_kernel")
@pytest.mark.parametrize("place", ["cache=device", "cache=host attention=host", "cache=disk attention=host"])
@pytest.mark.parametrize("family", ["llama", "gemma2"], indirect=True)
def test_without_a_compiler_jobs_answer_as_transformers_does_and_keep_their_promises(
    place, family, requests, expected, start_engine, answers_of, force_shape, check_promises
):
    force_shape(slots=2, batches=2)
    with start_engine(family, place=["weights=host", place]) as engine:
        assert answers_of(engine, requests) == expected(family)
        check_promises(engine)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind):
    scene = Scene.of(_layout(kind), [1, 33, 50, 16, 47], shared=1)
    alone = scene.attended(threads=1)
    assert not alone.isnan().any()
    for threads in (2, 3, 5):
        assert torch.equal(scene.attended(threads=threads), alone)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_very_large_scores_give_the_values_of_the_highest_without_overflow(kind, softcap):
    scene = Scene.of(_layout(kind, softcap=softcap), [20, 33])
    # So large that of each query's scores one is far above the others, or as much below; for float32, scores
    # reach 1e36, of which exp would be infinite 1e34 times over.
    scene.query *= 1e36 if scene.query.dtype == torch.float32 else 3e3
    found, wanted = scene.attended(), scene.wanted()
    assert not found.isnan().any()
    assert _is_near(found, wanted)


@pytest.mark.covering(2)
@needs_compiler
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("row", [0, 15, 16, 18])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_a_number_that_is_not_finite_goes_where_the_formula_has_it_and_nowhere_else(kind, row, part, number):
    layout = _layout(kind)
    scene = Scene.of(layout, [19, 19])
    slot = scene.seats.slots[0]
    element = 3 + (layout.key_bytes // layout.dtype.itemsize if part == "value" else 0)
    for rows in (scene.region[slot], scene.rows[0]):
        rows[row].view(layout.dtype)[element] = number
    found, wanted = scene.attended(), scene.wanted()
    # Of the first sequence, the queries of the first key head; of a value, the one element.
    assert not wanted[1].isnan().any()
    assert not wanted.isfinite().all() or (part == "key" and number != torch.nan)
    assert _is_near(found, wanted)


@needs_compiler
def test_rows_are_attended_in_a_part_of_a_larger_region_and_in_no_simple_order():
    layout = _layout("float32")
    scene = Scene.of(layout, [9, 30], news=True)
    wanted = scene.wanted()
    whole = torch.full((len(scene.region), 70, layout.row_bytes), 255, dtype=torch.uint8)
    whole[:, 7 : 7 + scene.region.shape[1]] = scene.region
    across = scene.region.transpose(0, 1).contiguous().transpose(0, 1)  # rows of one slot lie far apart
    for scene.region in (whole[:, 7:], across):
        assert _is_near(scene.attended(), wanted)
        for slot, rows in zip(scene.seats.slots.tolist(), scene.rows, strict=True):
            assert torch.equal(scene.region[slot, len(rows) - 1], rows[-1])


NOT_DONE = {
    "sizes that are no multiple of 16": (torch.float32, Identity(), Heads(per_key=2, key_size=24)),
    "groups that are no multiple of 16": (torch.float32, _grouped(8, 8), Heads(per_key=2)),
    "heads smaller than a group": (torch.float32, _grouped(4, 64), Heads(key_size=32, value_size=32)),
    "3 bits": (torch.float32, _grouped(3, 64), Heads()),
    "symmetric groups": (torch.float32, replace(_grouped(8, 64), symmetric=True), Heads()),
    "other scales": (torch.float32, replace(_grouped(8, 64), scale_dtype=torch.float32), Heads()),
    "8-bit floats": (torch.float32, Cast(dtype=torch.float8_e4m3fn), Heads()),
    "float64": (torch.float64, Identity(), Heads()),
}


@pytest.mark.parametrize("kind", NOT_DONE)
def test_what_cannot_be_read_in_place_is_decoded_and_gives_the_same(kind, monkeypatch):
    monkeypatch.setitem(KINDS, kind, NOT_DONE[kind])
    layout = _layout(kind, sliding_window=20)
    assert not reads_in_place(layout, layout.dtype)
    scene = Scene.of(layout, [4, 37, 16], shared=2, news=True)
    assert _is_near(scene.attended(), scene.wanted())


@needs_compiler
def test_calls_from_several_threads_at_once_are_right():
    scenes = [Scene.of(_layout(kind), [3, 40, 17, 64], seed=seed) for seed, kind in enumerate(KINDS)]
    alone = [scene.attended() for scene in scenes]

    def repeatedly(index: int) -> bool:
        scene = scenes[index % len(scenes)]
        threads = 1 + index % 5
        return all(
            torch.equal(scene.attended(threads=threads), alone[index % len(scenes)]) for _ in range(20)
        )

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(repeatedly, range(5 * len(scenes))))


@needs_compiler
def test_in_a_child_made_by_fork_attention_works_although_its_threads_are_gone():
    scene = Scene.of(_layout("float16"), [40] * 6)
    wanted = scene.attended(threads=4)  # from here on, there are threads that wait for work
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of just this
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # a child that hangs ends by this
        is_right = all(torch.equal(scene.attended(threads=4), wanted) for _ in range(20))
        os._exit(0 if is_right else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(scene.attended(threads=4), wanted)


def test_no_memory_for_scratch_is_told(monkeypatch):
    scene = Scene.of(_layout("float32"), [3])
    monkeypatch.setattr(host_attention, "_kernel", lambda *_: lambda _: 1)
    with pytest.raises(DoesNotFit, match="The host has no memory left for attention. Lower --host-memory"):
        scene.attended()
