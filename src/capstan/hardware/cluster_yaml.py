"""The YAML form of a cluster, checked by pydantic so that an error names the field and what it should be."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from capstan.errors import InputError, UsageError
from capstan.hardware.cluster import Cluster, Matrix
from capstan.hardware.machine import Device

MOST_ERRORS_SHOWN = 5


def _no_bool(value: Any) -> Any:
    # YAML reads yes, no, on and off as truth values, which pydantic would take for 1 and 0.
    if isinstance(value, bool):
        raise ValueError("should be a number, not a truth value")
    return value


# A text such as "1e9" is a number too: YAML 1.1 wants 1.0e+9 and reads the shorter form as a text.
Number = Annotated[float, BeforeValidator(_no_bool)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _DeviceFacts(_Strict):
    kind: str
    memory_bytes: Annotated[int, BeforeValidator(_no_bool)]
    matmul_flops_per_s: dict[str, Number] = {}
    memory_bandwidth_bytes_per_s: Number
    identity: str = ""


class _ClusterFile(_Strict):
    format: Literal["capstan.cluster"]
    version: Literal[1]
    machines: list[str]
    latency_s: list[list[Number | None]]
    bandwidth_bytes_per_s: list[list[Number | None]]
    devices: dict[str, _DeviceFacts] = {}


def read_cluster(text: str, *, source: str) -> Cluster:
    """The cluster that `text` describes. `source` names the text in errors."""
    try:
        # The parser in C where PyYAML has it: two matrices of 64 machines are 8192 numbers.
        record = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return _cluster_of(_ClusterFile.model_validate(record))
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not YAML: {error}") from error
    except ValidationError as error:
        raise InputError(f"{source} describes no cluster. {_account(error)}") from error
    except UsageError as error:
        raise InputError(f"{source} describes no possible cluster. {error}") from error


def write_cluster(cluster: Cluster) -> str:
    """The text that `read_cluster` reads; the diagonal is null, because nothing is sent there."""
    record = {
        "format": "capstan.cluster",
        "version": 1,
        "machines": list(cluster.names),
        "latency_s": _rows(cluster.latency_s),
        "bandwidth_bytes_per_s": _rows(cluster.bandwidth_bytes_per_s),
        "devices": {name: _facts(device) for name, device in cluster.devices.items()},
    }
    return yaml.safe_dump(record, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)


def _cluster_of(file: _ClusterFile) -> Cluster:
    return Cluster(
        names=tuple(file.machines),
        latency_s=file.latency_s,  # type: ignore[arg-type]  # the diagonal may be None until it is replaced
        bandwidth_bytes_per_s=file.bandwidth_bytes_per_s,  # type: ignore[arg-type]
        devices={name: Device(name=name, **facts.model_dump()) for name, facts in file.devices.items()},
    )


def _rows(matrix: Matrix) -> list[list[float | None]]:
    return [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]


def _facts(device: Device) -> dict[str, Any]:
    facts = dict(vars(device))
    # The key under which the facts stand is the machine's name.
    del facts["name"]
    return facts


def _account(error: ValidationError) -> str:
    problems = error.errors()
    lines = [
        f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}"
        for problem in problems[:MOST_ERRORS_SHOWN]
    ]
    more = len(problems) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "") + "."
