"""What a training run is told: the same on every rank, and kept with its checkpoints."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capstan.errors import InputError, UnsupportedModel, UsageError, unknown_name
from capstan.models import Stage, StageCut, cut_causal_lm, load_stage
from capstan.pipelining.compression import GROUP_SIZE, Compression
from capstan.pipelining.decoder import decoder
from capstan.pipelining.dropout import configured_rates
from capstan.pipelining.pipeline import SCHEDULES
from capstan.pipelining.texts import byte_tokens, model_tokens, rows_of

VOCABULARY = 256
_MAY_CHANGE = ("data", "held_out", "epochs")  # between a run and the one that goes on with it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A language model on the tokens of a text file, in stages.

    Args:
        data: a text, or JSON lines with a `text` each.
        held_out: another, whose loss is told after each epoch; without it the last tenth of `data`.
        model: a folder with a causal language model in Hugging Face format, which is fine-tuned on its
            tokenizer's tokens; without it a decoder of `dim`, `layers` and `heads` is trained on bytes.
        stages: ranks, each with consecutive layers.
        forward_bits, backward_bits: of messages; None is full precision.
        direct: quantise activations themselves, not their changes.
        symmetric: grids with as many levels below 0 as above.
        midrise: those, without a level at 0.
        stochastic: round without bias.
        batch, sequence: samples a step, and tokens a sample.
    """

    data: str
    held_out: str | None = None
    model: str | None = None
    stages: int = 2
    forward_bits: int | None = 3
    backward_bits: int | None = 6
    group_size: int = GROUP_SIZE
    direct: bool = False
    symmetric: bool = False
    midrise: bool = False
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
        for name in ("learning_rate", "clip", "patience_s"):
            if not 0 < getattr(self, name) < inf:
                raise UsageError(f"{name} must be a number above 0, found {getattr(self, name)}.")
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
            midrise=self.midrise,
            stochastic=self.stochastic,
            changes=not self.direct,
        )

    @cached_property
    def cuts(self) -> tuple[StageCut, ...]:
        """How the model in a folder is cut; nothing for the decoder.

        Raises:
            InputError: it has not so many positions.
            UnsupportedModel: it applies dropout.
            UsageError, InputError, UnsupportedModel: see `capstan.models.cut_causal_lm`.
        """
        if self.model is None:
            return ()
        cuts = cut_causal_lm(Path(self.model), self.stages)
        positions = cuts[0].max_positions
        if positions is not None and positions < self.sequence:
            raise InputError(
                f"The model in {self.model} has positions for {positions} tokens, and samples have "
                f"{self.sequence}. Give a shorter --sequence."
            )
        from transformers import AutoConfig

        rates = configured_rates(AutoConfig.from_pretrained(self.model, local_files_only=True))
        if rates:
            raise UnsupportedModel(
                f"The model in {self.model} applies dropout: {rates}. In stages it would not be what one "
                "process draws, and changes of activations would never become small. Set these keys of its "
                "config.json to 0."
            )
        return cuts

    def stage(self, rank: int) -> nn.Sequential | Stage:
        """What a rank's pipeline is made of: the whole decoder, or its own stage of the model."""
        return self.decoder() if self.model is None else load_stage(Path(self.model), self.cuts[rank])

    def decoder(self) -> nn.Sequential:
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
            InputError: there is no such file, it is too short, or it cannot be read as tokens.
        """
        if self.held_out is not None:
            return self._rows(self.data, at_least=1), self._rows(self.held_out, at_least=1)
        rows = self._rows(self.data, at_least=2)
        num_held_out = max(1, len(rows) // 10)
        return rows[:-num_held_out], rows[-num_held_out:]

    def _rows(self, name: str, *, at_least: int) -> Tensor:
        path = Path(name)
        if self.model is None:
            tokens = byte_tokens(path)
        else:
            tokens = model_tokens(path, Path(self.model), self.cuts[0].table_shape[0])
        return rows_of(tokens, self.sequence, at_least=at_least, path=path)

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
