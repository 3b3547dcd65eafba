"""A training job as YAML, checked by pydantic so that an error names the field and what it should be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from capstan.errors import InputError
from capstan.federation.partition import balanced_batches
from capstan.federation.schedule import Settings
from capstan.federation.sparsifiers import RandomTopK, Sparsifier, Threshold, TopK
from capstan.federation.traffic import DeviceLink
from capstan.federation.wire import Wire

_MOST_ERRORS_SHOWN = 5


def _no_bool(value: Any) -> Any:
    # YAML reads yes, no, on and off as truth values, which pydantic would take for 1 and 0.
    if isinstance(value, bool):
        raise ValueError("should be a number, not a truth value")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
Whole = Annotated[int, BeforeValidator(_no_bool)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GeneratedData(_Strict):
    """Patterns in noise, see `generate_samples`."""

    samples: Whole = Field(default=2000, ge=2)
    features: Whole = Field(default=64, ge=1)
    classes: Whole = Field(default=10, ge=2)
    noise: Number = Field(default=1.0, ge=0)
    seed: Whole = Field(default=0, ge=0)


class DataConfig(_Strict):
    """A file, or what to generate; a share of each label is kept for testing."""

    path: Path | None = None
    inputs: str | None = None
    label: str | None = None
    generate: GeneratedData | None = None
    scale: Number = 1.0
    test_fraction: Number = Field(default=0.3, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.generate is None):
            raise ValueError("give either path or generate")
        return self


class ModelConfig(_Strict):
    """The layers; those before `cut` lie on devices, and those from `head` on, in the U-shape, do so too."""

    layers: list[str | dict[str, Any]] = Field(min_length=2)
    cut: Whole = Field(ge=1)
    head: Whole | None = None

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if not self.cut < (self.head or len(self.layers)) <= len(self.layers):
            raise ValueError(f"wanted cut < head <= {len(self.layers)} layers")
        return self


class BatchTotal(_Strict):
    """See `balanced_batches`."""

    total: Whole = Field(ge=1)


class DevicesConfig(_Strict):
    """How many devices, what lies on each, and how many samples each takes at once.

    `batch` is one number for all, one for each device, or `{total: 64}`: in proportion to their samples.
    """

    count: Whole = Field(ge=1)
    batch: Whole | list[Whole] | BatchTotal = 8
    partition: Literal["iid", "labels", "dirichlet"] = "iid"
    alpha: Number = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _a_batch_each(self) -> Self:
        if isinstance(self.batch, BatchTotal):
            return self
        sizes = self.batch if isinstance(self.batch, list) else [self.batch]
        if min(sizes, default=0) < 1 or (isinstance(self.batch, list) and len(sizes) != self.count):
            raise ValueError(f"wanted one batch of at least 1, or {self.count} of them")
        return self

    def batches(self, sizes: Sequence[int]) -> list[int]:
        """The batch of each device, which have `sizes` samples."""
        if isinstance(self.batch, BatchTotal):
            return balanced_batches(sizes, self.batch.total)
        return self.batch if isinstance(self.batch, list) else [self.batch] * self.count


class WireConfig(_Strict):
    """See `Wire`. `keep` 1 sends everything; `threshold` replaces `keep`."""

    keep: Number = Field(default=0.1, gt=0, le=1)
    per: Literal["sample", "tensor"] = "sample"
    alpha: Number | None = Field(default=None, ge=0, le=1)
    threshold: Number | None = Field(default=None, ge=0)
    index: Literal["bitmap", "packed", "elias-fano", "rice"] = "elias-fano"
    values: Literal["float32", "float16", "int8"] = "float16"
    downlink: Literal["support", "top-k", "dense"] = "support"
    error_feedback: bool = False

    @model_validator(mode="after")
    def _one_sparsifier(self) -> Self:
        if self.alpha is not None and (self.threshold is not None or self.per == "tensor"):
            raise ValueError("alpha is of a random top-k per sample: leave out threshold and per")
        if self.threshold is not None and "keep" in self.model_fields_set:
            raise ValueError("give either keep or threshold")
        return self

    def wire(self) -> Wire:
        """What these settings mean."""
        sparsifier: Sparsifier | None = TopK(keep=self.keep, per=self.per)
        if self.threshold is not None:
            sparsifier = Threshold(above=self.threshold)
        elif self.alpha is not None:
            sparsifier = RandomTopK(keep=self.keep, alpha=self.alpha)
        elif self.keep == 1:
            sparsifier = None
        return Wire(
            sparsifier=sparsifier,
            downlink=self.downlink,
            index=self.index,
            value_type=self.values,
            has_error_feedback=self.error_feedback,
        )


class TrainingConfig(_Strict):
    """See `Settings`; `average_every: epoch` is once an epoch."""

    algorithm: Literal["fedavg", "split", "splitfed-v1", "splitfed-v2", "joint", "u-shaped"] = "joint"
    epochs: Whole = Field(default=5, ge=1)
    learning_rate: Number = 0.05
    momentum: Number = 0.9
    average_every: Annotated[Whole, Field(ge=1)] | Literal["epoch"] = 1
    fraction_train: Number = 1.0
    quorum: Number = 1.0
    loss_rate: Number = 0.0
    seed: Whole = Field(default=0, ge=0)

    def settings(self) -> Settings:
        """What these settings mean."""
        told = self.model_dump(exclude={"epochs", "average_every"})
        every = None if self.average_every == "epoch" else self.average_every
        return Settings(**told, average_every=every)


class LinkConfig(_Strict):
    """The network that seconds on links are predicted for."""

    up_bytes_per_s: Number = Field(default=1e6, gt=0)
    down_bytes_per_s: Number = Field(default=1e6, gt=0)
    round_trip_s: Number = Field(default=0.05, ge=0)

    def link(self) -> DeviceLink:
        """What these settings mean."""
        return DeviceLink(**self.model_dump())


class SessionsConfig(_Strict):
    """How long devices of their own may take for a task, and how long their server waits for them."""

    deadline_s: Number = Field(default=60.0, gt=0)
    rejoin_s: Number = Field(default=300.0, gt=0)


class JobConfig(_Strict):
    """All of a job."""

    data: DataConfig
    model: ModelConfig
    devices: DevicesConfig
    wire: WireConfig = WireConfig()
    training: TrainingConfig = TrainingConfig()
    link: LinkConfig = LinkConfig()
    sessions: SessionsConfig = SessionsConfig()


def read_config(path: Path) -> JobConfig:
    """The job that a YAML file describes; its data file is looked for beside it.

    Raises:
        InputError: the file is not there, or a field is not what it should be.
    """
    if not path.is_file():
        raise InputError(f"There is no configuration {path}.")
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = JobConfig.model_validate(record)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        raise InputError(f"{path} describes no job. {_account(error)}") from error
    if config.data.path is not None and not config.data.path.is_absolute():
        data = config.data.model_copy(update={"path": path.parent / config.data.path})
        config = config.model_copy(update={"data": data})
    return config


def _account(error: ValidationError) -> str:
    problems = error.errors()
    lines = [
        f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}"
        for problem in problems[:_MOST_ERRORS_SHOWN]
    ]
    more = len(problems) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "") + "."
