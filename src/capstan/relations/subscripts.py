"""Einsum notation: what each operand's dimensions are called, what stays, and in which order to contract."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from capstan.errors import InputError, UsageError, require_extra

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Subscripts:
    """A parsed einsum: one string of labels per operand, the output's labels, the size of every label.

    `squeezed` names, per operand, the dimensions of size 1 that an ellipsis broadcasts; they are dropped
    before anything is contracted.
    """

    inputs: tuple[str, ...]
    output: str
    sizes: Mapping[str, int]
    squeezed: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        return f"{','.join(self.inputs)}->{self.output}"

    @property
    def output_shape(self) -> Shape:
        return tuple(self.sizes[label] for label in self.output)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One contraction of one or two values. Values are numbered: operands first, then results in order."""

    inputs: tuple[int, ...]
    labels: tuple[str, ...]
    output: str
    result: int
    sizes: Mapping[str, int] = field(repr=False)

    def __str__(self) -> str:
        return f"{','.join(self.labels)}->{self.output}"

    def num_elements(self, labels: str) -> int:
        return prod(self.sizes[label] for label in labels)

    @property
    def num_products(self) -> int:
        """Scalar multiplications."""
        return self.num_elements("".join(dict.fromkeys("".join(self.labels) + self.output)))


def parse_subscripts(text: str, shapes: Sequence[Shape]) -> Subscripts:
    """Read `"ij,jk->ik"` against the operands' shapes.

    Without `->` the output has the labels that occur once, in alphabetical order, as in NumPy. `...`
    stands for any dimensions, broadcast against each other from the right; other labels are never
    broadcast, because a dimension of size 1 is more often a mistake.

    Raises:
        UsageError: the text is no einsum, or has another number of operands than `shapes`.
        InputError: a shape does not fit its labels, or two sizes of one label differ.
    """
    compact = text.replace(" ", "")
    left, arrow, output = compact.partition("->")
    terms = left.split(",")
    _check_characters(text, [*terms, *([output] if arrow else [])])
    if len(terms) != len(shapes):
        raise UsageError(f"{text!r} names {len(terms)} operands, but {len(shapes)} were given.")
    spread = _ellipsis_rank(text, terms, shapes)
    fresh = [letter for letter in string.ascii_letters if letter not in compact][:spread]
    if len(fresh) < spread:
        raise UsageError(f"{text!r} uses too many labels: 52 letters are all there are.")
    dots = "".join(fresh)
    full = [
        term.replace("...", dots[spread - (len(shape) - len(term) + 3) :]) if "..." in term else term
        for term, shape in zip(terms, shapes, strict=True)
    ]
    sizes = _sizes(text, full, shapes, dots)
    if not arrow:
        once = sorted(label for label in set("".join(full)) if "".join(full).count(label) == 1)
        output = dots + "".join(label for label in once if label not in dots)
    elif "..." in output:
        output = output.replace("...", dots)
    elif dots:
        raise UsageError(f"{text!r} has '...' on the left but not on the right; name what is summed.")
    _check_output(text, output, full)
    squeezed = tuple(
        tuple(at for at, (label, size) in enumerate(zip(term, shape, strict=True)) if size != sizes[label])
        for term, shape in zip(full, shapes, strict=True)
    )
    inputs = tuple(
        "".join(label for at, label in enumerate(term) if at not in dropped)
        for term, dropped in zip(full, squeezed, strict=True)
    )
    return Subscripts(inputs=inputs, output=output, sizes=sizes, squeezed=squeezed)


def _check_characters(text: str, terms: Sequence[str]) -> None:
    for term in terms:
        letters = term.replace("...", "", 1)
        if letters and not (letters.isascii() and letters.isalpha()):
            raise UsageError(
                f"{text!r} is no einsum: {term!r} may hold letters and one '...'. "
                "Write for example 'ij,jk->ik'."
            )


def _ellipsis_rank(text: str, terms: Sequence[str], shapes: Sequence[Shape]) -> int:
    rank = 0
    for number, (term, shape) in enumerate(zip(terms, shapes, strict=True), start=1):
        dotted = "..." in term
        named = len(term) - 3 * dotted
        if len(shape) < named or (not dotted and len(shape) != named):
            raise InputError(
                f"Operand {number} of {text!r} has {len(shape)} dimensions {tuple(shape)}, "
                f"but {term!r} names {'at least ' if dotted else ''}{named}."
            )
        rank = max(rank, (len(shape) - named) if dotted else 0)
    return rank


def _sizes(text: str, terms: Sequence[str], shapes: Sequence[Shape], broadcast: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for number, (term, shape) in enumerate(zip(terms, shapes, strict=True), start=1):
        for label, size in zip(term, shape, strict=True):
            known = sizes.get(label, size)
            if known != size and not (label in broadcast and 1 in (known, size)):
                name = "a dimension of '...'" if label in broadcast else f"label {label!r}"
                raise InputError(
                    f"In {text!r}, {name} has size {known}, but operand {number} with shape "
                    f"{tuple(shape)} gives it {size}."
                )
            sizes[label] = max(known, size)
    return sizes


def _check_output(text: str, output: str, terms: Sequence[str]) -> None:
    known = set("".join(terms))
    for label in output:
        if label not in known:
            raise UsageError(
                f"In {text!r}, the output's label {label!r} occurs in no operand. "
                f"Known: {', '.join(sorted(known)) or 'none'}."
            )
        if output.count(label) > 1:
            raise UsageError(f"In {text!r}, the output names {label!r} twice.")


def contraction_steps(subscripts: Subscripts) -> tuple[Step, ...]:
    """Contractions of at most two operands that compute the einsum, in an order with few multiplications.

    One or two operands need no order; of more, opt_einsum chooses it.

    Raises:
        MissingExtra: three operands or more, and opt_einsum is not installed.
    """
    names = dict(enumerate(subscripts.inputs))
    waiting = list(names)
    steps: list[Step] = []
    for group in _path(subscripts):
        chosen = [waiting[at] for at in group]
        waiting = [value for value in waiting if value not in chosen]
        while chosen:
            pair, chosen = chosen[:2], chosen[2:]
            rest = [names[value] for value in [*waiting, *chosen]]
            is_last = not rest
            output = (
                subscripts.output if is_last else _kept([names[v] for v in pair], rest, subscripts.output)
            )
            step = Step(
                inputs=tuple(pair),
                labels=tuple(names[value] for value in pair),
                output=output,
                result=len(names),
                sizes=subscripts.sizes,
            )
            names[step.result] = output
            steps.append(step)
            if not chosen:
                waiting.append(step.result)
            else:
                chosen.insert(0, step.result)
    return tuple(steps)


def _kept(pair: Sequence[str], rest: Sequence[str], output: str) -> str:
    wanted = set("".join(rest) + output)
    return "".join(label for label in dict.fromkeys("".join(pair)) if label in wanted)


def _path(subscripts: Subscripts) -> list[tuple[int, ...]]:
    if len(subscripts.inputs) <= 2:
        return [tuple(range(len(subscripts.inputs)))]
    require_extra("relations", "opt_einsum")
    import opt_einsum

    shapes = [tuple(subscripts.sizes[label] for label in term) for term in subscripts.inputs]
    path, _ = opt_einsum.contract_path(str(subscripts), *shapes, shapes=True, optimize="auto")
    return [tuple(group) for group in path]
