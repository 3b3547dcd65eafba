"""Random einsums for the property tests: labels, sizes, tilings and integer-valued operands.

Values are small integers in float64, so that every order of summation gives the same bits.
"""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

LABELS = "abcde"


class RandomEinsum(NamedTuple):
    """An einsum, the arrays it is of, and for every label (size, tile)."""

    text: str
    arrays: list[np.ndarray]
    tiles: dict[str, int]

    @property
    def operand_tiles(self) -> list[tuple[int, ...]]:
        terms = self.text.partition("->")[0].split(",")
        return [tuple(self.tiles[label] for label in term) for term in terms]


@st.composite
def einsums(draw, *, most_operands=5, repeats=True, integers=True):
    count = draw(st.integers(1, most_operands))
    labels = LABELS[: draw(st.integers(1, 5))]
    terms = draw(
        st.lists(
            st.text(alphabet=labels, max_size=3)
            if repeats
            else st.lists(st.sampled_from(labels), unique=True, max_size=3).map("".join),
            min_size=count,
            max_size=count,
        )
    )
    known = sorted(set("".join(terms)))
    output = "".join(draw(st.permutations(known))[: draw(st.integers(0, min(3, len(known))))])
    counts = {label: draw(st.integers(1, 3)) for label in LABELS}
    tiles = {label: draw(st.integers(1, 2)) for label in LABELS}
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shapes = [tuple(counts[label] * tiles[label] for label in term) for term in terms]
    arrays = [
        rng.integers(-3, 4, shape).astype(np.float64) if integers else rng.standard_normal(shape)
        for shape in shapes
    ]
    return RandomEinsum(f"{','.join(terms)}->{output}", [np.asarray(each) for each in arrays], tiles)


def dense_semiring(text, arrays, add, multiply):
    """The einsum by the definition: every operand spread over all labels, multiplied, folded."""
    left, _, output = text.partition("->")
    terms = left.split(",")
    labels = output + "".join(sorted(set("".join(terms)) - set(output)))
    total = None
    for term, array in zip(terms, arrays, strict=True):
        once = "".join(dict.fromkeys(term))
        diagonal = np.einsum(f"{term}->{''.join(sorted(once, key=labels.index))}", array)
        spread = diagonal[tuple(slice(None) if label in once else None for label in labels)]
        total = spread if total is None else multiply(total, spread)
    sizes = {}
    for term, array in zip(terms, arrays, strict=True):
        sizes.update(zip(term, array.shape, strict=True))
    total = np.broadcast_to(total, [sizes[label] for label in labels])
    return add.reduce(total, axis=tuple(range(len(output), len(labels))))
