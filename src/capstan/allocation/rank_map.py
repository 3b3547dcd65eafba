"""Which rank runs where: the file with which a job starts as planned, and the commands that start it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from capstan.allocation.layout import Layout
from capstan.errors import InputError

FORMAT = "capstan.rank-map"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RankMap:
    """The device of every rank, by name: rank = replica × stages + stage.

    `run` says how the step was planned (layers of each stage, schedule, micro-batches, bits) where it was.
    """

    stages: int
    devices: tuple[str, ...]
    run: dict[str, Any] | None = None

    @classmethod
    def of(cls, layout: Layout, names: Sequence[str], run: dict[str, Any] | None = None) -> "RankMap":
        """The map of a layout whose stages stand in pipeline order, as planners give it."""
        return cls(stages=layout.num_stages, devices=tuple(names[each] for each in layout.ranks), run=run)

    @property
    def replicas(self) -> int:
        return len(self.devices) // self.stages

    @property
    def pipeline_groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each replica in the order of stages: the groups of `capstan.pipelining.Pipeline`."""
        return tuple(
            tuple(range(replica * self.stages, (replica + 1) * self.stages))
            for replica in range(self.replicas)
        )

    @property
    def data_parallel_groups(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each stage, which exchange its gradients."""
        return tuple(tuple(range(stage, len(self.devices), self.stages)) for stage in range(self.stages))

    def to_json(self) -> str:
        ranks = [
            {"rank": rank, "host": host, "stage": rank % self.stages, "replica": rank // self.stages}
            for rank, host in enumerate(self.devices)
        ]
        record = {
            "format": FORMAT, "version": VERSION, "stages": self.stages, "replicas": self.replicas,
            "run": self.run, "ranks": ranks,
        }  # fmt: skip
        return json.dumps(record, indent=1) + "\n"

    def torchrun_lines(self, *, script: str = "train.py", port: int = 29500) -> tuple[str, ...]:
        """One command for each device, to be started on it; the first rank's is where all meet.

        A launcher for each rank, since torchrun numbers those of one launcher one after the other.
        """
        return tuple(
            f"{host}: torchrun --nnodes={len(self.devices)} --nproc-per-node=1 --node-rank={rank} "
            f"--master-addr={shlex.quote(self.devices[0])} --master-port={port} {script}"
            for rank, host in enumerate(self.devices)
        )


def read_rank_map(path: Path) -> RankMap:
    """The map in a file that `RankMap.to_json` wrote.

    Raises:
        InputError: the file cannot be read, has another format or version, or its ranks are not one for each
            stage and replica in their order, each on a device of its own.
    """
    from pydantic import BaseModel, ConfigDict, PositiveInt, StrictInt, StrictStr, ValidationError

    class Rank(BaseModel):
        model_config = ConfigDict(extra="forbid")
        rank: StrictInt
        host: StrictStr
        stage: StrictInt
        replica: StrictInt

    class File(BaseModel):
        model_config = ConfigDict(extra="forbid")
        format: Literal["capstan.rank-map"]
        version: Literal[1]
        stages: PositiveInt
        replicas: PositiveInt
        run: dict[str, Any] | None
        ranks: list[Rank]

    try:
        file = File.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The rank map {path} cannot be read: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path} is no rank map of version {VERSION}; {place}: {first['msg']}.") from error
    told = [(each.rank, each.stage, each.replica) for each in file.ranks]
    wanted = [(rank, rank % file.stages, rank // file.stages) for rank in range(file.stages * file.replicas)]
    if told != wanted:
        raise InputError(
            f"{path} should have the ranks 0 to {len(wanted) - 1} in order, of stage rank mod {file.stages} "
            f"and replica rank div {file.stages}, and has others."
        )
    devices = tuple(each.host for each in file.ranks)
    if len(set(devices)) < len(devices):
        raise InputError(f"{path} has a device twice; each holds one rank.")
    return RankMap(stages=file.stages, devices=devices, run=file.run)
