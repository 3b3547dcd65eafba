"""A layout: which devices hold which stage. The hand-made ones, and reading one from a file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capstan.allocation.pair_seconds import Numbers
from capstan.errors import InputError, UsageError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One group of devices for each stage, by 0-based number: the data-parallel group of that stage.

    Stages stand in pipeline order where a planner made the layout, and then device r of each group belongs to
    replica r, so that `ranks` starts pipelines along the chosen links.
    """

    groups: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        groups = tuple(tuple(int(device) for device in group) for group in self.groups)
        object.__setattr__(self, "groups", groups)
        if not groups or not groups[0]:
            raise UsageError("A layout needs at least one group of at least one device.")
        sizes = sorted({len(group) for group in groups})
        if len(sizes) > 1:
            raise UsageError(
                f"The groups of a layout hold as many devices each, but these hold {sizes[0]} to {sizes[-1]}."
            )
        devices = [device for group in groups for device in group]
        twice = sorted({device for device in devices if devices.count(device) > 1})
        if twice:
            raise UsageError(f"A layout holds each device once, but device {twice[0]} comes twice.")
        if sorted(devices) != list(range(len(devices))):
            missing = min(set(range(len(devices))) - set(devices))
            raise UsageError(
                f"A layout holds every device, but of {len(devices)} (numbered from 0) device {missing} is "
                "missing. Leave devices out of the cluster, not out of the layout."
            )

    @property
    def num_stages(self) -> int:
        return len(self.groups)

    @property
    def num_replicas(self) -> int:
        return len(self.groups[0])

    @property
    def ranks(self) -> tuple[int, ...]:
        """The device of each rank, replica by replica: rank = replica × stages + stage."""
        return tuple(group[replica] for replica in range(self.num_replicas) for group in self.groups)

    @property
    def array(self) -> Numbers:
        """(stages, replicas) device numbers."""
        return np.array(self.groups, dtype=np.intp)

    @classmethod
    def from_array(cls, groups: Numbers) -> "Layout":
        return cls(groups=tuple(tuple(group) for group in groups.tolist()))


def contiguous(num_devices: int, *, stages: int) -> Layout:
    """Device d in group d div replicas: neighbours share a stage."""
    return Layout.from_array(np.arange(num_devices).reshape(stages, -1))


def strided(num_devices: int, *, stages: int) -> Layout:
    """Device d in group d mod stages: neighbours hold different stages, each place is spread over all."""
    return Layout.from_array(np.arange(num_devices).reshape(-1, stages).T)


def layout_to_dict(layout: Layout, names: Sequence[str]) -> dict[str, Any]:
    """`{"groups": [[name, …], …]}`, which `read_layout` reads."""
    return {"groups": [[names[device] for device in group] for group in layout.groups]}


def read_layout(path: Path, names: Sequence[str]) -> Layout:
    """The layout in a JSON file `{"groups": [[device, …], …]}`, devices by 0-based number or by name.

    Raises:
        InputError: the file cannot be read, is no such object, names a device that the cluster has not, or
            holds a device twice, not at all, or in groups of different sizes.
    """
    from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, ValidationError

    class LayoutFile(BaseModel):
        model_config = ConfigDict(extra="forbid")
        groups: list[list[StrictInt | StrictStr]]

    try:
        groups = LayoutFile.model_validate_json(Path(path).read_text(encoding="utf-8")).groups
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The layout file {path} cannot be read: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f'{path} should hold a layout {{"groups": [[device, …], …]}} with devices by number or name; '
            f"{place}: {first['msg']}."
        ) from error
    try:
        layout = Layout(groups=tuple(_numbers(group, names) for group in groups))
        if layout.num_stages * layout.num_replicas != len(names):
            raise UsageError(
                f"The layout holds {layout.num_stages * layout.num_replicas} devices, the cluster has "
                f"{len(names)}."
            )
    except UsageError as error:
        raise InputError(f"{path} holds no layout of this cluster. {error}") from error
    return layout


def _numbers(group: Iterable[int | str], names: Sequence[str]) -> tuple[int, ...]:
    position = {name: number for number, name in enumerate(names)}
    numbers = []
    for device in group:
        number = position.get(device) if isinstance(device, str) else device
        if number is None:
            raise unknown_name("device", str(device), names)
        if not 0 <= number < len(names):
            raise UsageError(f"There is no device {number}; the cluster has 0 to {len(names) - 1}.")
        numbers.append(number)
    return tuple(numbers)
