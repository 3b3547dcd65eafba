"""The YAML of `capstan recommend train`: which columns, which tables, which network."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from capstan.errors import InputError, UsageError, unknown_name
from capstan.recommendation.optimizers import OPTIMIZERS, RowOptimizer

DENSE_OPTIMIZERS = ("sgd", "adam", "adagrad")


def row_optimizer(told: Mapping[str, Any]) -> RowOptimizer:
    """The optimizer of `{"kind": "adagrad", "lr": 0.01, ...}`.

    Raises:
        UsageError: an unknown kind or setting.
    """
    settings = dict(told)
    kind = settings.pop("kind", "adagrad")
    if kind not in OPTIMIZERS:
        raise unknown_name("optimizer", str(kind), OPTIMIZERS)
    known = [field.name for field in fields(OPTIMIZERS[kind])]
    for name, value in settings.items():
        if name not in known:
            raise unknown_name(f"setting of {kind}", name, known)
        if name == "betas":
            settings[name] = tuple(value)
    try:
        return OPTIMIZERS[kind](**settings)
    except TypeError as error:
        raise UsageError(f"The settings of {kind} must be numbers: {error}.") from error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


def _mapping(told: Any) -> Any:
    return {} if told is None else told  # `age:` with nothing behind it


class SlotSettings(_Strict):
    """One slot: IDs of `column`, and the table of their embeddings."""

    column: str | None = None
    dim: Annotated[int, Field(ge=1)] = 16
    pooling: Literal["sum", "mean", "sqrt"] = "sum"
    optimizer: dict[str, Any] = {"kind": "adagrad"}
    capacity: Annotated[int, Field(ge=1)] | None = None
    evict: Literal["lru", "lfu"] | None = None
    admit_from: Annotated[int, Field(ge=1, le=255)] = 1
    initial: tuple[float, float] = (-0.01, 0.01)


class NetworkSettings(_Strict):
    """Layers over the embeddings, over the dense columns, and over both; then one number, the logit."""

    slots: tuple[Annotated[int, Field(ge=1)], ...] = ()
    dense: tuple[Annotated[int, Field(ge=1)], ...] = ()
    top: tuple[Annotated[int, Field(ge=1)], ...] = (256, 128)
    activation: Literal["relu", "none"] = "relu"
    batch_norm: bool = False


class DenseOptimizerSettings(_Strict):
    """torch's optimizer of the network."""

    kind: Literal["sgd", "adam", "adagrad"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class RecommenderConfig(_Strict):
    """All of it. `embedding` holds what every slot has unless it says otherwise."""

    label: str
    positive: str | None = None
    dense: tuple[str, ...] = ()
    slots: dict[str, Annotated[SlotSettings, BeforeValidator(_mapping)]]
    network: NetworkSettings = NetworkSettings()
    optimizer: DenseOptimizerSettings = DenseOptimizerSettings()

    def column_of(self, slot: str) -> str:
        """The column that holds a slot's IDs."""
        return self.slots[slot].column or slot

    @property
    def columns(self) -> list[str]:
        """Every column that is read."""
        return list(dict.fromkeys([self.label, *self.dense, *map(self.column_of, self.slots)]))


def config_of(told: Any, *, where: str = "The configuration") -> RecommenderConfig:
    """A checked configuration from plain data.

    Raises:
        InputError, UsageError: what is wrong, and where.
    """
    if not isinstance(told, dict):
        raise InputError(
            f"{where} must have label, slots and so on at its top, but it is {type(told).__name__}."
        )
    told = dict(told)
    shared, slots = told.pop("embedding", None) or {}, told.get("slots")
    if not isinstance(shared, dict):
        raise InputError(f"{where}: embedding must be settings as slots have, but it is {shared!r}.")
    if isinstance(slots, list):
        slots = dict.fromkeys(slots)
    if isinstance(slots, dict):
        told["slots"] = {
            name: shared | own if isinstance(own, dict) else own or shared for name, own in slots.items()
        }
    try:
        config = RecommenderConfig.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise InputError(
            f"{where}: {place}: {first['msg']}, but found {str(first['input'])[:60]!r}."
        ) from error
    if not config.slots:
        raise InputError(f"{where} names no slots.")
    if config.network.dense and not config.dense:
        raise InputError(f"{where} gives the network dense layers, but names no dense columns.")
    for settings in config.slots.values():
        row_optimizer(settings.optimizer)
    return config


def read_config(path: Path) -> RecommenderConfig:
    """The configuration in a YAML file.

    Raises:
        InputError, UsageError: the file is not there, not YAML, or not a configuration.
    """
    import yaml

    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}.") from error
    return config_of(told, where=str(path))
