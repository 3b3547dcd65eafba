"""Derivatives of expressions as expressions. The derivative of an einsum is an einsum:

    out = einsum("ij,jk->ik", a, b)   and   d = dL/dout
    dL/da = einsum("ik,jk->ij", d, b)   dL/db = einsum("ik,ij->jk", d, a)

A label of one operand that nothing else has was summed alone; its derivative repeats along it, which is
an einsum with ones. A label that an operand names twice reads its diagonal, where the derivative goes.
"""

import string
from collections.abc import Mapping, Sequence

import numpy as np

from capstan.errors import InputError, UsageError
from capstan.relations.elementwise import elementwise_named
from capstan.relations.expression import (
    Add,
    Einsum,
    Elementwise,
    Expression,
    Ones,
    Tensor,
    add,
    einsum,
    in_order,
)
from capstan.relations.semirings import SUM_PRODUCT


def gradient(
    output: Expression, with_respect_to: Sequence[Expression], *, upstream: Expression | None = None
) -> tuple[Expression, ...]:
    """The derivative of the sum of `output`'s elements, weighted by `upstream`, to each of the nodes.

    Raises:
        UsageError: a node is not part of the output, or `upstream` has another shape than the output.
        InputError: something on the way has no derivative here: another semiring than sum-product, an
            operand broadcast by `...`, or a function without one.
    """
    nodes = in_order(output)
    missing = [node for node in with_respect_to if all(node is not each for each in nodes)]
    if missing:
        raise UsageError(
            f"{missing[0].label!r} is no part of the expression, so there is no derivative to it."
        )
    start = upstream or Ones(size=output.shape, like=output)
    if start.shape != output.shape:
        raise UsageError(f"upstream has shape {start.shape}, but the output has {output.shape}.")
    wanted = {id(node) for node in with_respect_to}
    needed: set[int] = set()
    for node in nodes:
        if id(node) in wanted or any(id(each) in needed for each in node.operands):
            needed.add(id(node))
    parts: dict[int, list[Expression]] = {id(output): [start]}
    totals: dict[int, Expression] = {}
    for node in reversed(nodes):
        if id(node) not in needed or id(node) not in parts:
            continue
        totals[id(node)] = add(*parts[id(node)])
        for at, operand in enumerate(node.operands):
            if id(operand) in needed:
                parts.setdefault(id(operand), []).append(_to_operand(node, at, totals[id(node)]))
    return tuple(totals[id(node)] for node in with_respect_to)


def _to_operand(node: Expression, at: int, upstream: Expression) -> Expression:
    match node:
        case Add():
            return upstream
        case Elementwise():
            return _through_map(node, upstream)
        case Einsum():
            return _through_einsum(node, at, upstream)
    raise AssertionError(f"no such node: {node.label}")


def _through_map(node: Elementwise, upstream: Expression) -> Expression:
    if node.map.derivative is None:
        raise InputError(f"{node.map.name} has no derivative here.")
    slope = Elementwise(map=elementwise_named(node.map.derivative), of=node.of)
    letters = string.ascii_letters[: len(node.shape)]
    return einsum(f"{letters},{letters}->{letters}", upstream, slope)


def _through_einsum(node: Einsum, at: int, upstream: Expression) -> Expression:
    if node.semiring != SUM_PRODUCT:
        raise InputError(f"Only sum-product einsums have a derivative, not {node.semiring.name}.")
    if any(node.subscripts.squeezed):
        raise InputError("The derivative of an operand that '...' broadcasts is not there yet.")
    inputs, output = node.subscripts.inputs, node.subscripts.output
    term = inputs[at]
    others = [each for place, each in enumerate(node.operands) if place != at]
    names = [each for place, each in enumerate(inputs) if place != at]
    operands: list[Expression] = [upstream, *others]
    terms = [output, *names]
    once = "".join(dict.fromkeys(term))
    alone = "".join(label for label in once if label not in "".join(terms))
    sizes = node.subscripts.sizes
    if alone:
        operands.append(Ones(size=tuple(sizes[label] for label in alone), like=node))
        terms.append(alone)
    target = once
    if once != term:
        target, more = _spread_diagonal(term, sizes, "".join(terms), node)
        operands += [each for _, each in more]
        terms += [name for name, _ in more]
    return einsum(f"{','.join(terms)}->{target}", *operands)


def _spread_diagonal(
    term: str, sizes: Mapping[str, int], used: str, like: Expression
) -> tuple[str, list[tuple[str, Expression]]]:
    """Fresh names for repeated labels, tied to the first by identity matrices."""
    fresh = iter(letter for letter in string.ascii_letters if letter not in used + term)
    target = ""
    ties: list[tuple[str, Expression]] = []
    for label in term:
        if label not in target:
            target += label
            continue
        other = next(fresh)
        ties.append((label + other, _identity(sizes[label], like)))
        target += other
    return target, ties


def _identity(size: int, like: Expression) -> Tensor:
    if like.library == "torch":
        import torch

        return Tensor(name="identity", data=torch.eye(size, dtype=getattr(torch, like.dtype)))
    return Tensor(name="identity", data=np.eye(size, dtype=like.dtype))
