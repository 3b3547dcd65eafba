"""A thin face for integer linear programs: named variables, solved by HiGHS through scipy."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from threading import Lock

import numpy as np

from capstan.errors import DoesNotFit

Terms = Mapping[str, float]


# File descriptors belong to the whole process: one solver at a time moves them.
_DESCRIPTOR = Lock()


@contextmanager
def _solver_speaks_on_standard_error() -> Iterator[None]:
    """HiGHS 1.12 prints a debugging line straight to file descriptor 1, where a command's JSON belongs."""
    with _DESCRIPTOR:
        sys.stdout.flush()
        kept = os.dup(1)
        try:
            os.dup2(2, 1)
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


@dataclass
class IntegerProgram:
    """Minimise a linear cost over named variables under linear constraints.

    >>> program = IntegerProgram()
    >>> program.variable("apples", high=4, integer=True)
    >>> program.variable("pears", high=4, integer=True)
    >>> program.at_most({"apples": 2, "pears": 1}, 5)
    >>> program.minimise({"apples": -3, "pears": -1})
    {'apples': 2.0, 'pears': 1.0}
    """

    _bounds: dict[str, tuple[float, float, bool]] = field(default_factory=dict)
    _rows: list[tuple[Terms, float, float]] = field(default_factory=list)

    def variable(self, name: str, *, low: float = 0.0, high: float = inf, integer: bool = False) -> None:
        """Declare a variable between `low` and `high`."""
        assert name not in self._bounds, f"variable {name!r} declared twice"
        self._bounds[name] = (low, high, integer)

    def at_most(self, terms: Terms, limit: float) -> None:
        """Require sum(coefficient * variable) <= limit."""
        self._rows.append((dict(terms), -inf, limit))

    def equal(self, terms: Terms, value: float) -> None:
        """Require sum(coefficient * variable) == value."""
        self._rows.append((dict(terms), value, value))

    def minimise(
        self, cost: Terms, *, relative_gap: float = 1e-4, time_limit_s: float = 2.0, relaxed: bool = False
    ) -> dict[str, float]:
        """Solve to within `relative_gap` of the optimum; integer variables come back exactly integral, or
        anywhere between integers when the program is `relaxed`, which is solved several times faster.

        Raises:
            DoesNotFit: no assignment satisfies the constraints, or none was found in `time_limit_s`.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        names = list(self._bounds)
        column = {name: index for index, name in enumerate(names)}

        def dense(terms: Terms) -> np.ndarray:
            row = np.zeros(len(names))
            for name, coefficient in terms.items():
                row[column[name]] += coefficient
            return row

        constraints = []
        if self._rows:
            matrix = np.stack([dense(terms) for terms, _, _ in self._rows])
            lows = [low for _, low, _ in self._rows]
            highs = [high for _, _, high in self._rows]
            constraints.append(LinearConstraint(matrix, lows, highs))
        with _solver_speaks_on_standard_error():
            solution = milp(
                c=dense(cost),
                integrality=[int(integer and not relaxed) for _, _, integer in self._bounds.values()],
                bounds=Bounds(
                    [low for low, _, _ in self._bounds.values()],
                    [high for _, high, _ in self._bounds.values()],
                ),
                constraints=constraints,
                options={"time_limit": time_limit_s, "mip_rel_gap": relative_gap},
            )
        if solution.x is None:
            raise DoesNotFit(f"The integer program has no solution: {solution.message}")
        values = dict(zip(names, map(float, solution.x), strict=True))
        return {
            name: float(round(value)) if self._bounds[name][2] and not relaxed else value
            for name, value in values.items()
        }
