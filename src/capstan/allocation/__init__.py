"""allocation: which device computes which tasklet in a slow, uneven network?

    plan = plan_allocation(scenario("worldwide"), stages=8)
    print(explain(plan.plan))
    plan.layout.groups

Source: DT-FM, Decentralized Training of Foundation Models in Heterogeneous Environments, arXiv 2206.01288.
"""

from capstan.allocation.cost import CostModel, Costs
from capstan.allocation.layout import Layout, contiguous, read_layout, strided
from capstan.allocation.pair_seconds import PairSeconds, pair_seconds
from capstan.allocation.task import COST_MODELS, Tasklet, TrainingTask

__all__ = [
    "COST_MODELS",
    "CostModel",
    "Costs",
    "Layout",
    "PairSeconds",
    "Tasklet",
    "TrainingTask",
    "contiguous",
    "pair_seconds",
    "read_layout",
    "strided",
]
