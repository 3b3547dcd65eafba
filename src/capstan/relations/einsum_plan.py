"""An einsum over tiled relations as a logical plan.

Each contraction of two operands becomes one join and one aggregation,

    Σ_(output labels, add) ( ⋈_(shared labels, the same einsum on tiles) (left, right) )

because cutting every label into parts commutes with multiplying and adding.

Source: Tensor Relational Algebra, arXiv 2009.00524; EinDecomp, arXiv 2410.02682.
"""

import numpy as np

from capstan.errors import InputError
from capstan.relations.kernels import EinsumKernel, KeyFunction, KeyPredicate
from capstan.relations.logical import Aggregation, Filter, Join, Logical, ReKey, Source, project
from capstan.relations.semirings import SUM_PRODUCT, Semiring
from capstan.relations.subscripts import Step, contraction_steps, parse_subscripts
from capstan.relations.tensor_relation import Key, RelationType, TensorRelation

_UNITS = {"prod": 1, "sum": 0, "and": True}


def einsum_plan(text: str, *operands: TensorRelation, semiring: Semiring = SUM_PRODUCT) -> Logical:
    """The logical plan of an einsum whose operands are cut along their dimensions, as by `from_array`.

    A label must be cut alike wherever it occurs. Missing tiles count as absent: zeros of a sum-product,
    minus infinity of max-plus.

    Raises:
        UsageError: the text is no einsum of that many operands.
        InputError: shapes, tilings, dtypes or the semiring do not fit together.
    """
    for number, relation in enumerate(operands, start=1):
        _check_grid(number, relation.type)
    shapes = [_shape(relation.type) for relation in operands]
    parsed = parse_subscripts(text, shapes)
    if any(parsed.squeezed):
        raise InputError(f"{text!r} broadcasts a dimension of size 1, which a tiled relation does not.")
    values: list[tuple[Logical, str]] = []
    _check_equal_tiles(text, [each.type for each in operands], parsed.inputs)
    for number, (relation, labels) in enumerate(zip(operands, parsed.inputs, strict=True), start=1):
        values.append((_diagonal(Source(name=f"operand {number}", relation=relation), labels), labels))
    for step in contraction_steps(parsed):
        values.append((_step_plan(step, [values[at][0] for at in step.inputs], semiring), step.output))
    return values[-1][0]


def _shape(type_: RelationType) -> tuple[int, ...]:
    return tuple(count * size for count, size in zip(type_.frontier, type_.bound, strict=True))


def _check_grid(number: int, type_: RelationType) -> None:
    if type_.key_arity != type_.rank:
        raise InputError(
            f"Operand {number} has keys of {type_.key_arity} components and tensors of {type_.rank} "
            "dimensions; an einsum needs one component a dimension, as TensorRelation.from_array makes."
        )


def _check_equal_tiles(text: str, types: list[RelationType], terms: tuple[str, ...]) -> None:
    tiles: dict[str, int] = {}
    for number, (type_, labels) in enumerate(zip(types, terms, strict=True), start=1):
        for label, size in zip(labels, type_.bound, strict=True):
            if tiles.setdefault(label, size) != size:
                raise InputError(
                    f"In {text!r}, label {label!r} is cut into tiles of {tiles[label]}, "
                    f"but of {size} in operand {number}. Cut it alike everywhere."
                )


def _diagonal(plan: Logical, labels: str) -> Logical:
    """Of an operand that names a label twice, only the keys on the diagonal, each component once."""
    kept = tuple(labels.index(label) for label in dict.fromkeys(labels))
    if len(kept) == len(labels):
        return plan
    twins = tuple((labels.index(label), at) for at, label in enumerate(labels))

    def on_diagonal(*key: int) -> bool:
        return all(key[first] == key[at] for first, at in twins)

    predicate = KeyPredicate(name="diagonal", reads=tuple(range(len(labels))), function=on_diagonal)
    return ReKey(
        input=Filter(input=plan, predicate=predicate),
        function=KeyFunction(name=f"keep {list(kept)}", function=lambda key: project(key, kept)),
    )


def _step_plan(step: Step, inputs: list[Logical], semiring: Semiring) -> Logical:
    left, left_labels = inputs[0], step.labels[0]
    if len(inputs) == 2:
        right, right_labels = inputs[1], step.labels[1]
    else:
        right, right_labels = Source(name="one", relation=_unit(left.type, semiring)), ""
    left_names, right_names = "".join(dict.fromkeys(left_labels)), "".join(dict.fromkeys(right_labels))
    shared = [label for label in left_names if label in right_names]
    joined = Join(
        left=left,
        right=right,
        left_keys=tuple(left_names.index(label) for label in shared),
        right_keys=tuple(right_names.index(label) for label in shared),
        kernel=EinsumKernel(subscripts=f"{left_labels},{right_labels}->{step.output}", semiring=semiring),
    )
    names = left_names + "".join(label for label in right_names if label not in shared)
    return Aggregation(
        input=joined, group_by=tuple(names.index(label) for label in step.output), fold=semiring.add
    )


def _unit(type_: RelationType, semiring: Semiring) -> TensorRelation:
    """One tuple that changes nothing it is joined with."""
    value = _UNITS[semiring.multiply]
    key: Key = ()
    if type_.library == "torch":
        import torch

        return TensorRelation.from_items([(key, torch.tensor(value, dtype=getattr(torch, type_.dtype)))])
    return TensorRelation.from_items([(key, np.asarray(value, dtype=type_.dtype))])
