"""Data-parallel training over slow networks: relaxed averages of gradients or weights.

    model = wrap(model, optimizer, "bytegrad")                  # or, for PyTorch's DDP:
    ddp.register_comm_hook(HookState("bytegrad"), hook)

Source: BAGUA, arXiv 2107.01499. See docs/data_parallel.md.
"""

from capstan.data_parallel.algorithm import Algorithm
from capstan.data_parallel.asynchronous import AsyncAverage
from capstan.data_parallel.centralised import (
    ByteGrad,
    GradientAllReduce,
    OneBit,
    RandomKGradients,
    TopKGradients,
)
from capstan.data_parallel.checkpoint import load_latest, save_checkpoint
from capstan.data_parallel.ddp_hooks import HookState, hook
from capstan.data_parallel.decentralised import Decentralised
from capstan.data_parallel.local_sgd import DiLoCo, LocalSGD
from capstan.data_parallel.low_precision import LowPrecisionDecentralised
from capstan.data_parallel.names import ALGORITHMS, algorithm_from_name
from capstan.data_parallel.powersgd import PowerSGD
from capstan.data_parallel.qadam import QAdam, QAdamMomenta
from capstan.data_parallel.replica import Replica
from capstan.data_parallel.wrapping import wrap

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AsyncAverage",
    "ByteGrad",
    "Decentralised",
    "DiLoCo",
    "GradientAllReduce",
    "HookState",
    "LocalSGD",
    "LowPrecisionDecentralised",
    "OneBit",
    "PowerSGD",
    "QAdam",
    "QAdamMomenta",
    "RandomKGradients",
    "Replica",
    "TopKGradients",
    "algorithm_from_name",
    "hook",
    "load_latest",
    "save_checkpoint",
    "wrap",
]
