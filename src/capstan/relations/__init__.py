"""relations: tensor computations as relational algebra, planned and run within a memory budget.

A `TensorRelation` maps integer keys to equally shaped tensors. Logical operators (`Join`, `Aggregation`, …)
say what to compute; they are typed when they are built, and `evaluate` computes them the obvious way.
`optimise` turns them into physical operators with a site, and `einsum` builds expressions that `compute` runs
within a memory budget and `plan_for_devices` cuts over devices.
"""

from capstan.relations.computing import Computed, compute, compute_with_accounts, prepare
from capstan.relations.derivatives import gradient
from capstan.relations.device_plan import DevicePlan, plan_for_devices
from capstan.relations.einsum_plan import einsum_plan
from capstan.relations.elementwise import ELEMENTWISE
from capstan.relations.expression import Expression, add, apply, einsum, open_tensor, tensor
from capstan.relations.kernels import ArrayMap, EinsumKernel, ElementwiseKernel, KeyFunction, KeyPredicate
from capstan.relations.local_operators import (
    LocalAggregate,
    LocalConcat,
    LocalFilter,
    LocalJoin,
    LocalMap,
    LocalTile,
)
from capstan.relations.logical import Aggregation, Concat, Filter, Join, ReKey, Source, Tile, Transform
from capstan.relations.optimiser import OptimisedPlan, compile_default, optimise
from capstan.relations.physical import (
    Broadcast,
    Everywhere,
    PartitionedBy,
    Placed,
    Shuffle,
)
from capstan.relations.reference import evaluate
from capstan.relations.semirings import SEMIRINGS, Semiring
from capstan.relations.site_engine import run_on_sites
from capstan.relations.tensor_relation import RelationType, TensorRelation

__all__ = [
    "ELEMENTWISE",
    "SEMIRINGS",
    "Aggregation",
    "ArrayMap",
    "Broadcast",
    "Computed",
    "Concat",
    "DevicePlan",
    "EinsumKernel",
    "ElementwiseKernel",
    "Everywhere",
    "Expression",
    "Filter",
    "Join",
    "KeyFunction",
    "KeyPredicate",
    "LocalAggregate",
    "LocalConcat",
    "LocalFilter",
    "LocalJoin",
    "LocalMap",
    "LocalTile",
    "OptimisedPlan",
    "PartitionedBy",
    "Placed",
    "ReKey",
    "RelationType",
    "Semiring",
    "Shuffle",
    "Source",
    "TensorRelation",
    "Tile",
    "Transform",
    "add",
    "apply",
    "compile_default",
    "compute",
    "compute_with_accounts",
    "einsum",
    "einsum_plan",
    "evaluate",
    "gradient",
    "open_tensor",
    "optimise",
    "plan_for_devices",
    "prepare",
    "run_on_sites",
    "tensor",
]
