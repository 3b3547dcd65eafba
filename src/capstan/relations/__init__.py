"""relations: tensor computations as relational algebra, planned and run within a memory budget.

A `TensorRelation` maps integer keys to equally shaped tensors. Logical operators (`Join`, `Aggregation`, …)
say what to compute; they are typed when they are built, and `evaluate` computes them the obvious way.
"""

from capstan.relations.einsum_plan import einsum_plan
from capstan.relations.kernels import ArrayMap, EinsumKernel, ElementwiseKernel, KeyFunction, KeyPredicate
from capstan.relations.logical import Aggregation, Concat, Filter, Join, ReKey, Source, Tile, Transform
from capstan.relations.reference import evaluate
from capstan.relations.semirings import SEMIRINGS, Semiring
from capstan.relations.tensor_relation import RelationType, TensorRelation

__all__ = [
    "SEMIRINGS",
    "Aggregation",
    "ArrayMap",
    "Concat",
    "EinsumKernel",
    "ElementwiseKernel",
    "Filter",
    "Join",
    "KeyFunction",
    "KeyPredicate",
    "ReKey",
    "RelationType",
    "Semiring",
    "Source",
    "TensorRelation",
    "Tile",
    "Transform",
    "einsum_plan",
    "evaluate",
]
