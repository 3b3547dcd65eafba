"""Who sits where and when: every sequence is computed once and in order, and no slot stays idle."""

from collections import Counter, defaultdict

from hypothesis import given
from hypothesis import strategies as st

from capstan.generation.planning.batching import BatchShape, Block, BlockShape, InFlight, Length, shape_for
from capstan.generation.planning.memory import extent_of
from capstan.generation.runtime.arrivals import open_lengths
from capstan.generation.runtime.block_schedule import zigzag
from capstan.generation.runtime.visits import Visit

lengths_of_jobs = st.lists(st.builds(Length, st.integers(1, 30), st.integers(1, 8)), min_size=1, max_size=16)
counts = st.integers(1, 5)


def _sweeps(block: Block, finish: dict[int, int] | None = None):
    """Play a block to its end; sequence s is reported as finished after sweep `finish[s]` of its own."""
    seen = defaultdict(int)
    while works := block.sweep():
        yield works
        running = [work.sequence for batch in works for chunk in batch.chunks for work in chunk.works]
        for sequence in running:
            seen[sequence] += 1
        block.finish([each for each in running if (finish or {}).get(each) == seen[each]])
        block.advance()


@given(lengths_of_jobs, counts, counts, st.integers(1, 64))
def test_every_token_is_computed_exactly_once_and_in_order(lengths, slots, batches, chunk_tokens):
    shape = shape_for(lengths, slots=slots, batches=batches, chunk_tokens=chunk_tokens)
    block, done, seats = Block(shape, lengths), defaultdict(list), {}
    for works in _sweeps(block):
        taken = set()
        for index, chunks in works:
            for chunk in chunks:
                for work in chunk.works:
                    assert (index, work.slot) not in taken, "one sequence in a slot"
                    taken.add((index, work.slot))
                    assert seats.setdefault(work.sequence, (index, work.slot)) == (index, work.slot)
                    assert work.slot < shape.batches[index].slots
                    assert work.end <= shape.batches[index].capacity
                    done[work.sequence] += range(work.start, work.end)
                    whole = work.start == 0 and work.count == lengths[work.sequence].prompt
                    assert whole if chunk.is_prefill else work.start > 0 and work.count == 1
    assert done == {index: list(range(length.cached)) for index, length in enumerate(lengths)}
    assert block.unfinished() == []
    assert block.num_running == block.num_waiting == 0


@given(lengths_of_jobs, counts, counts, st.integers(1, 64))
def test_a_chunk_of_prompts_exceeds_its_limit_only_when_one_prompt_alone_does(
    lengths, slots, batches, chunk_tokens
):
    shape = shape_for(lengths, slots=slots, batches=batches, chunk_tokens=chunk_tokens)
    for works in _sweeps(Block(shape, lengths)):
        for _, chunks in works:
            assert sum(not chunk.is_prefill for chunk in chunks) <= 1
            for chunk in chunks:
                if chunk.is_prefill:
                    assert chunk.num_tokens <= chunk_tokens or len(chunk.works) == 1


@given(lengths_of_jobs, counts, counts, st.dictionaries(st.integers(0, 15), st.integers(1, 8)))
def test_while_anybody_waits_every_slot_is_busy(lengths, slots, batches, finish):
    shape = shape_for(lengths, slots=slots, batches=batches, chunk_tokens=64)
    block = Block(shape, lengths)
    for _ in _sweeps(block, finish):
        assert block.num_running == shape.num_slots or block.num_waiting == 0


@given(lengths_of_jobs, counts, counts, st.dictionaries(st.integers(0, 15), st.integers(1, 8)))
def test_a_sequence_that_ends_early_is_computed_no_further_and_the_others_to_their_end(
    lengths, slots, batches, finish
):
    shape = shape_for(lengths, slots=slots, batches=batches, chunk_tokens=64)
    num_done = defaultdict(int)
    for works in _sweeps(Block(shape, lengths), finish):
        for _, chunks in works:
            for chunk in chunks:
                for work in chunk.works:
                    num_done[work.sequence] += 1
    assert num_done == {
        index: min(length.new, finish.get(index, length.new)) for index, length in enumerate(lengths)
    }


def test_a_slot_that_becomes_free_is_taken_in_the_next_sweep_while_the_others_go_on():
    block = Block(
        BlockShape(batches=(BatchShape(slots=2, capacity=9),), chunk_tokens=8),
        [Length(prompt=4, new=6), Length(prompt=3, new=6), Length(prompt=2, new=6)],
    )
    block.sweep()
    block.finish([0])
    assert block.num_running == 1
    ((_, chunks),) = block.sweep()
    assert [(chunk.is_prefill, [work.sequence for work in chunk.works]) for chunk in chunks] == [
        (False, [1]),
        (True, [2]),
    ]


@given(lengths_of_jobs, counts, counts)
def test_a_block_for_a_job_has_no_slot_too_many_and_room_for_everybody(lengths, slots, batches):
    shape = shape_for(lengths, slots=slots, batches=batches, chunk_tokens=8)
    assert shape.num_slots == min(len(lengths), slots * batches)
    assert all(0 < batch.slots <= slots for batch in shape.batches)
    ordered = sorted((length.cached for length in lengths), reverse=True)
    assert [batch.capacity for batch in shape.batches] == ordered[: shape.num_slots : slots]


@given(lengths_of_jobs, counts, counts)
def test_halving_a_block_ends_at_one_slot_and_keeps_room_for_the_longest(lengths, slots, batches):
    shape = shape_for(lengths, slots=slots, batches=batches, chunk_tokens=8)
    while (smaller := shape.halved()) is not None:
        assert 1 <= smaller.num_slots < shape.num_slots
        assert max(batch.slots for batch in smaller.batches) <= max(batch.slots for batch in shape.batches)
        assert smaller.batches[0].capacity == shape.batches[0].capacity
        shape = smaller
    assert shape.num_slots == 1


@given(st.integers(1, 12), st.lists(st.integers(0, 8), unique=True))
def test_zigzag_visits_every_layer_of_every_batch_once_and_a_layer_for_all_batches_before_the_next(
    num_layers, batches
):
    visits = zigzag(num_layers, batches)
    assert visits == [Visit(layer, batch) for layer in range(num_layers) for batch in batches]


@given(
    st.integers(4, 40),
    counts,
    counts,
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 39), st.integers(1, 39)), max_size=40),
    st.sets(st.integers(0, 39)),
)
def test_in_an_open_block_all_who_join_are_computed_within_the_tokens_planned_for(
    longest, slots, batches, joining, leaving
):
    """`joining`: at which sweep, prompt and new tokens. `leaving`: who is dropped a sweep after joining."""
    planned = open_lengths(longest, slots * batches)
    shape = shape_for(planned, slots=slots, batches=batches, chunk_tokens=longest)
    extent = extent_of(shape, planned)
    block = Block(shape, [], most=InFlight(extent.sweep_tokens, extent.batch_tokens))
    waiting = [
        (at, Length(min(prompt, longest - 1), max(1, min(new, longest - prompt))))
        for at, prompt, new in sorted(joining)
    ]
    who, computed, dropped, num_joined = {}, Counter(), {}, 0
    expected = dict(enumerate(length.new for _, length in waiting))
    for sweep in range(10_000):
        gone = [number for number, index in who.items() if index in leaving and sweep > dropped[index]]
        block.finish(gone)
        for number in gone:
            del expected[who.pop(number)]
        while waiting and waiting[0][0] <= sweep:
            number = block.join(waiting.pop(0)[1])
            assert number not in who
            who[number], dropped[num_joined] = num_joined, sweep
            num_joined += 1
        works = block.sweep()
        if not works and not waiting:
            break
        in_batches = [sum(chunk.num_tokens for chunk in work.chunks) for work in works]
        assert sum(in_batches) <= extent.sweep_tokens
        assert all(count <= extent.batch_tokens for count in in_batches)
        for work in (each for _, chunks in works for chunk in chunks for each in chunk.works):
            computed[who[work.sequence]] += 1
        for number in block.advance():
            del who[number]
    assert not who
    assert {index: computed[index] for index in expected} == expected
    assert len(block._lengths) <= max(1, len(joining))
