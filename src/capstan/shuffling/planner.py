"""What training on a file will cost: rates from a few blocks of it, bytes from its manifest.

An epoch reads every block once, and once more for each cut between streams. Its seconds are those of an epoch
over some of the blocks, scaled by rows: reading and steps overlap as far as the interpreter lets them, which
is measured, not assumed. Before the epochs one pass in stored order takes the statistics; without test rows
another one scores the model. The host holds two buffers at most: the one that is emitted and the one that
is read.
"""

import time
from dataclasses import asdict, dataclass

from capstan.errors import DoesNotFit
from capstan.hardware.free_memory import free_host_memory
from capstan.plans import Alternative, Choice, Phase, Plan, Traffic, bytes_text
from capstan.shuffling.clustering import GOOD, Clustering
from capstan.shuffling.examples import survey
from capstan.shuffling.linear_models import LinearModel
from capstan.shuffling.order import STRATEGIES, Order, Piece
from capstan.shuffling.reading import CONTENT, LINK, Account, Batches, Share, read_piece
from capstan.shuffling.sources import FileBlocks
from capstan.shuffling.training import COMPUTE, Training
from capstan.storage import Rows

_PROBED_BLOCKS, _PROBED_ROWS = 32, 8000


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds that a row takes: read and looked at in a plain pass; in an epoch as a whole, and there of the
    reading thread and of the steps. `row_bytes` is what it takes in memory."""

    pass_s_per_row: float
    epoch_s_per_row: float
    read_s_per_row: float
    compute_s_per_row: float
    row_bytes: float


class Sample:
    """Some blocks of a source, evenly apart: enough to measure with and to judge by.

    By default as many as have 8,000 rows, but 2 to 32.
    """

    def __init__(self, source: FileBlocks, count: int | None = None) -> None:
        filled = [block for block in range(source.num_blocks) if source.num_rows(block)]
        if count is None:
            wanted = -(-_PROBED_ROWS * len(filled) // sum(source.sizes))
            count = min(max(2, wanted), _PROBED_BLOCKS)
        count = min(count, len(filled))
        self._source = source
        self.blocks = [filled[at * len(filled) // count] for at in range(count)]
        source.read(self.blocks[0])  # what the first reading imports and sets up is not timed
        self.account, started = Account(), time.perf_counter()
        held = sum(column.nbytes for at in range(count) for column in self._counted(at).values())
        self.read_s = time.perf_counter() - started
        self.row_bytes = held / sum(self.num_rows(at) for at in range(count))
        self.fingerprint = source.fingerprint

    def _counted(self, at: int) -> Rows:
        return read_piece(
            self._source, Piece(block=self.blocks[at], rows=slice(0, self.num_rows(at))), self.account
        )

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def num_rows(self, block: int) -> int:
        return self._source.num_rows(self.blocks[block])

    def read(self, block: int) -> Rows:
        return self._source.read(self.blocks[block])


def measure_rates(sample: Sample, training: Training) -> Rates:
    """Run a pass and an epoch over a sample, with a model that is thrown away."""
    sizes = tuple(sample.num_rows(block) for block in range(sample.num_blocks))
    total, started = sum(sizes), time.perf_counter()
    examples = survey(
        sample, label=training.label, is_regression=training.model == "linear", features=training.features
    )
    pass_s = time.perf_counter() - started
    model = LinearModel.begin(training.model, examples.num_features, max(2, len(examples.classes)))
    order = Order(sizes=sizes, seed=0, buffer_blocks=max(1, len(sizes) // 4))
    compute_s, started = 0.0, time.perf_counter()
    with Batches(sample, Share(order=order, batch_size=training.batch_size)) as batches:
        for rows in batches:
            begun = time.perf_counter()
            model.step(examples.x(rows), examples.y(rows), 1e-9)
            compute_s += time.perf_counter() - begun
    return Rates(
        pass_s_per_row=pass_s / total,
        epoch_s_per_row=(time.perf_counter() - started) / total,
        read_s_per_row=batches.account.reading_s / total,
        compute_s_per_row=compute_s / total,
        row_bytes=sample.row_bytes,
    )


def plan_training(
    source: FileBlocks,
    training: Training,
    rates: Rates,
    *,
    test: FileBlocks | None = None,
    memory_bytes: int | None = None,
) -> Plan:
    """Seconds and bytes of the whole training; `memory_bytes` is granted, by default what is free.

    Raises:
        DoesNotFit: two buffers, and the test rows, do not fit in memory.
    """
    sizes = source.sizes
    order = training.share(sizes, 0).order
    num_rows, stored = order.num_rows, [source.size_bytes(block) for block in range(source.num_blocks)]
    reads = training.epochs * sum(int(n) * size for n, size in zip(order.block_reads(), stored, strict=True))
    rows = training.epochs * num_rows
    read_s, train_s = rows * rates.read_s_per_row, rows * rates.compute_s_per_row
    # A full shuffle's one buffer is read before the first step, and there is no next one.
    serial_s = max(rows * rates.epoch_s_per_row, read_s + train_s)
    epochs = Phase(
        name="epochs",
        seconds=serial_s if training.strategy == "full" else rows * rates.epoch_s_per_row,
        busy_s={LINK: read_s, COMPUTE: train_s},
        traffic=Traffic({(LINK, CONTENT): reads}),
        counts={"rows": rows},
    )
    judged = source if test is None else test
    phases = (_one_pass("statistics", source, rates), epochs, _one_pass("evaluation", judged, rates))
    held = int(_held_rows(order) * rates.row_bytes)
    if test is not None:
        held += int(sum(test.sizes) * rates.row_bytes)
    granted = free_host_memory().value if memory_bytes is None else memory_bytes
    if held > granted:
        raise DoesNotFit(
            f"Two buffers of {order.blocks_per_stream} blocks and the test rows take {bytes_text(held)}; "
            f"{bytes_text(granted)} are free. Take a smaller --buffer"
            + (" or --strategy corgipile." if training.strategy == "full" else ", or smaller blocks.")
        )
    seconds = sum(phase.seconds for phase in phases)
    return Plan(
        system="shuffling",
        title=f"{training.model}, {training.strategy}",
        machine="this machine",
        phases=phases,
        peak_bytes={"host": held},
        budget_bytes={"host": granted},
        choices=_choices(source, training, order),
        decision=asdict(training) | {"num_blocks": source.num_blocks, "num_rows": num_rows},
        bound=f"{'reading and decoding' if read_s >= train_s else 'training'} of every row in every epoch",
        alternatives=(_shuffled_first(seconds, num_rows * rates.read_s_per_row),),
    )


def _held_rows(order: Order) -> int:
    """Rows of two buffers, each as large as it gets; a full shuffle has one."""
    largest = sorted(order.sizes, reverse=True)
    if order.strategy == "full" or order.blocks_per_stream >= len(largest):
        return order.num_rows
    return 2 * sum(largest[: order.blocks_per_stream])


def _one_pass(name: str, source: FileBlocks, rates: Rates) -> Phase:
    rows = sum(source.sizes)
    stored = sum(source.size_bytes(block) for block in range(source.num_blocks))
    return Phase(
        name=name,
        seconds=rows * rates.pass_s_per_row,
        busy_s={LINK: rows * rates.pass_s_per_row},
        traffic=Traffic({(LINK, CONTENT): stored}),
        counts={"rows": rows},
    )


def _choices(source: FileBlocks, training: Training, order: Order) -> tuple[Choice, ...]:
    rows = sum(sorted(order.sizes, reverse=True)[: order.blocks_per_stream])
    return (
        Choice(name="strategy", value=training.strategy, reason=STRATEGIES[training.strategy]),
        Choice(
            name="blocks",
            value=f"{source.num_blocks:,} of up to {max(order.sizes):,} rows",
            reason="as the file has them"
            if source.num_blocks > 1
            else "the file is one block, so a buffer is the whole table: write it in smaller ones",
        ),
        Choice(name="buffer", value=f"{order.blocks_per_stream:,} blocks, {rows:,} rows at most"),
        Choice(name="statistics", value="one pass", reason="means, deviations and classes of all rows"),
    )


def _shuffled_first(seconds: float, passed_s: float) -> Alternative:
    """A shuffled copy in two passes that read and write all; writing is taken to be as fast as reading."""
    return Alternative(
        name="shuffle the file first, then read in order",
        seconds=seconds + 4 * passed_s,
        reason="two passes that read and write all come before the first step",
    )


def plan_epoch(source: FileBlocks, clustering: Clustering, sample: Sample) -> Plan:
    """What the doctor predicts: an epoch's reading with the advised buffer, and a full shuffle's."""
    stored = [source.size_bytes(block) for block in range(source.num_blocks)]
    rate = sample.read_s / max(1, sample.account.size_bytes)
    epoch_s, block_s = sum(stored) * rate, sample.read_s / sample.num_blocks
    buffer = clustering.advised_buffer
    order = Order(sizes=source.sizes, seed=0, buffer_blocks=buffer)
    return Plan(
        system="shuffling",
        title=f"one epoch of {clustering.num_rows:,} rows, reading only",
        machine="this machine",
        phases=(
            Phase(
                name="epoch",
                seconds=epoch_s,
                busy_s={LINK: epoch_s},
                traffic=Traffic({(LINK, CONTENT): sum(stored)}),
                counts={"rows": clustering.num_rows},
            ),
        ),
        peak_bytes={"host": int(_held_rows(order) * sample.row_bytes)},
        choices=(
            Choice(
                name="buffer",
                value=f"{buffer:,} of {source.num_blocks:,} blocks",
                reason=f"the fewest with {GOOD:g} effective rows"
                if buffer < source.num_blocks
                else "no fewer blocks are worth enough rows: the whole table",
            ),
        ),
        decision={"strategy": "corgipile", "buffer_blocks": buffer},
        bound="reading and decoding of every block once",
        alternatives=(
            _shuffled_first(epoch_s, epoch_s),
            Alternative(
                name="full shuffle by single rows",
                seconds=clustering.num_rows * block_s,
                reason="each row takes the reading of its block",
            ),
            Alternative(
                name="full shuffle in memory",
                seconds=epoch_s,
                reason=f"the table takes {bytes_text(clustering.num_rows * sample.row_bytes)}",
            ),
        ),
    )
