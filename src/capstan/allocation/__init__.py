"""allocation: which device computes which tasklet in a slow, uneven network?

    found = plan_allocation(scenario("worldwide"), stages=8)
    found.cost_s, found.layout.groups, found.layout.ranks
    print(explain(found.plan))

    step = plan_step(scenario("worldwide"))     # under a simulator: compute, micro-batches, overlap, memory

Source: DT-FM, Decentralized Training of Foundation Models in Heterogeneous Environments, arXiv 2206.01288.
"""

from capstan.allocation.annealing import search_annealing
from capstan.allocation.cluster_files import read_cluster_file
from capstan.allocation.cost import CostModel, Costs
from capstan.allocation.evolution import Evolution, search_evolution
from capstan.allocation.exhaustive import search_all
from capstan.allocation.gantt import gantt_svg
from capstan.allocation.globe import regions_on_a_globe
from capstan.allocation.layout import Layout, contiguous, layout_to_dict, read_layout, strided
from capstan.allocation.messages import Interfaces
from capstan.allocation.pair_seconds import PairSeconds, pair_seconds
from capstan.allocation.planner import SEARCHES, Allocation, evaluate_layout, plan_allocation
from capstan.allocation.rank_map import RankMap, read_rank_map
from capstan.allocation.replanning import Replan, replan
from capstan.allocation.step_planner import StepAllocation, plan_step
from capstan.allocation.step_simulation import SCHEDULES, StepSimulation, StepTask, simulate_step
from capstan.allocation.task import COST_MODELS, Tasklet, TrainingTask
from capstan.allocation.training_step import UNKNOWN_FLOPS_PER_S, Bits

__all__ = [
    "COST_MODELS",
    "SCHEDULES",
    "SEARCHES",
    "UNKNOWN_FLOPS_PER_S",
    "Allocation",
    "Bits",
    "CostModel",
    "Costs",
    "Evolution",
    "Interfaces",
    "Layout",
    "PairSeconds",
    "RankMap",
    "Replan",
    "StepAllocation",
    "StepSimulation",
    "StepTask",
    "Tasklet",
    "TrainingTask",
    "contiguous",
    "evaluate_layout",
    "gantt_svg",
    "layout_to_dict",
    "pair_seconds",
    "plan_allocation",
    "plan_step",
    "read_cluster_file",
    "read_layout",
    "read_rank_map",
    "regions_on_a_globe",
    "replan",
    "search_all",
    "search_annealing",
    "search_evolution",
    "simulate_step",
    "strided",
]
