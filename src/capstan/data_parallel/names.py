"""From an algorithm's name to the algorithm."""

from collections.abc import Callable

from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.asynchronous import AsyncAverage
from capstan.data_parallel.centralised import (
    ByteGrad,
    GradientAllReduce,
    OneBit,
    RandomKGradients,
    TopKGradients,
)
from capstan.data_parallel.decentralised import Decentralised
from capstan.data_parallel.local_sgd import DiLoCo, LocalSGD
from capstan.data_parallel.low_precision import LowPrecisionDecentralised
from capstan.data_parallel.powersgd import PowerSGD
from capstan.data_parallel.qadam import QAdamMomenta
from capstan.errors import unknown_name

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "gradient_allreduce": GradientAllReduce,
    "bytegrad": ByteGrad,
    "onebit": OneBit,
    "topk": TopKGradients,
    "randomk": RandomKGradients,
    "powersgd": PowerSGD,
    "qadam": QAdamMomenta,
    "decentralized": Decentralised,
    "low_precision_decentralized": LowPrecisionDecentralised,
    "async": AsyncAverage,
    "local_sgd": LocalSGD,
    "diloco": DiLoCo,
}
"""Name -> the algorithm with its default settings."""


def algorithm_from_name(name: str) -> Algorithm:
    """The algorithm of this name; an unknown one raises `UsageError` and suggests the nearest."""
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]()
