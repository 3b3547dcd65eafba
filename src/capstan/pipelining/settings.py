"""What a training run is told: the same on every rank, and kept with its checkpoints."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capstan.errors import InputError, UsageError, unknown_name
from capstan.pipelining.compression import GROUP_SIZE, Compression
from capstan.pipelining.decoder import decoder
from capstan.pipelining.pipeline import SCHEDULES

VOCABULARY = 256
_MAY_CHANGE = ("data", "epochs")  # between a run and the one that goes on with it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A decoder on the bytes of a text file, in stages.

    Args:
        data: the text; its last tenth is held out.
        stages: ranks, each with consecutive layers.
        forward_bits, backward_bits: of messages; None is full precision.
        direct: quantise activations themselves, not their changes.
        symmetric: grids with as many levels below 0 as above.
        stochastic: round without bias.
        batch, sequence: samples a step, and tokens a sample.
    """

    data: str
    stages: int = 2
    forward_bits: int | None = 3
    backward_bits: int | None = 6
    group_size: int = GROUP_SIZE
    direct: bool = False
    symmetric: bool = False
    stochastic: bool = False
    schedule: str = "1f1b"
    micro_batches: int = 4
    batch: int = 16
    sequence: int = 64
    dim: int = 64
    layers: int = 4
    heads: int = 4
    learning_rate: float = 2e-3
    clip: float = 1.0
    epochs: int = 10
    seed: int = 0
    patience_s: float = 600.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        for name in ("stages", "micro_batches", "batch", "sequence", "dim", "layers", "heads", "epochs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if self.stages < 2:
            raise UsageError("A pipeline has 2 stages or more, found 1: train in one process instead.")
        _ = self.compression

    @property
    def compression(self) -> Compression:
        """The bits as codecs."""
        return Compression.of_bits(
            forward_bits=self.forward_bits,
            backward_bits=self.backward_bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            stochastic=self.stochastic,
            changes=not self.direct,
        )

    def model(self) -> nn.Sequential:
        """The decoder, of random weights that depend on the seed only."""
        return decoder(
            vocabulary=VOCABULARY,
            sequence=self.sequence,
            dim=self.dim,
            num_layers=self.layers,
            num_heads=self.heads,
            seed=self.seed,
        )

    def samples(self) -> tuple[Tensor, Tensor]:
        """Samples of sequence + 1 tokens to train on, and those held out.

        Raises:
            InputError: there is no such file, or it is too short.
        """
        path = Path(self.data)
        if not path.is_file():
            raise InputError(f"There is no file {path}. Name a text file with --data.")
        text = torch.frombuffer(bytearray(path.read_bytes() or b"\0"), dtype=torch.uint8).long()
        count = (len(text) - 1) // self.sequence
        if count < 2:
            raise InputError(
                f"{path} has {len(text)} bytes; two samples of {self.sequence} tokens and what follows them "
                f"need {2 * self.sequence + 1}. Name a longer text or a shorter --sequence."
            )
        rows = text[: count * self.sequence + 1].unfold(0, self.sequence + 1, self.sequence)
        held_out = max(1, count // 10)
        return rows[:-held_out], rows[-held_out:]

    def batches(self, epoch: int, num_samples: int) -> Iterator[Tensor]:
        """Sample ids of each batch of an epoch, the last one as short as it comes."""
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch + 1)
        return iter(torch.randperm(num_samples, generator=generator).split(self.batch))

    def check_same(self, other: dict[str, Any], where: Path) -> None:
        """Refuse to go on with what was trained otherwise."""
        for name, value in asdict(self).items():
            if name not in _MAY_CHANGE and other.get(name) != value:
                raise InputError(
                    f"{where} was trained with {name}={other.get(name)}, and this run has {name}={value}. "
                    "Give the same settings, or another folder to begin anew."
                )
