"""Integer programs: against brute force, and without a word on standard output."""

import doctest
import os
import sys
import threading
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import capstan.plans.programs
from capstan.errors import DoesNotFit
from capstan.plans import IntegerProgram

small = st.integers(-5, 5)


class Row(NamedTuple):
    terms: dict[str, int]
    is_equal: bool
    limit: int

    def holds(self, values: dict[str, float]) -> bool:
        total = sum(coefficient * values[name] for name, coefficient in self.terms.items())
        return abs(total - self.limit) <= TOLERANCE if self.is_equal else total <= self.limit + TOLERANCE


class Problem(NamedTuple):
    bounds: dict[str, tuple[int, int]]
    rows: list[Row]
    cost: dict[str, int]

    def program(self, *, continuous: tuple[str, ...] = ()) -> IntegerProgram:
        program = IntegerProgram()
        for name, (low, high) in self.bounds.items():
            program.variable(name, low=low, high=high, integer=name not in continuous)
        for row in self.rows:
            (program.equal if row.is_equal else program.at_most)(row.terms, row.limit)
        return program

    def total_cost(self, values: dict[str, float]) -> float:
        return sum(coefficient * values[name] for name, coefficient in self.cost.items())

    def is_satisfied(self, values: dict[str, float]) -> bool:
        inside = all(
            low - TOLERANCE <= values[name] <= high + TOLERANCE for name, (low, high) in self.bounds.items()
        )
        return inside and all(row.holds(values) for row in self.rows)

    def assignments(self):
        """Every integer point within the bounds."""
        ranges = [range(low, high + 1) for low, high in self.bounds.values()]
        for point in product(*ranges):
            yield dict(zip(self.bounds, point, strict=True))


# HiGHS allows each row and bound to be missed by 1e-6; coefficients of at most 5 times four variables
# can add such misses up to less than this.
TOLERANCE = 1e-4


@st.composite
def problems(draw, equalities: bool = True) -> Problem:
    names = ["w", "x", "y", "z"][: draw(st.integers(1, 4))]
    terms = st.dictionaries(st.sampled_from(names), small)
    bounds = {}
    for name in names:
        low = draw(st.integers(-3, 3))
        bounds[name] = (low, low + draw(st.integers(0, 4)))
    kinds = st.booleans() if equalities else st.just(False)
    rows = draw(st.lists(st.builds(Row, terms, kinds, st.integers(-8, 8)), max_size=3))
    return Problem(bounds, rows, draw(terms))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_optimum_is_that_of_brute_force_and_exactly_integral(problem):
    feasible = [values for values in problem.assignments() if problem.is_satisfied(values)]
    program = problem.program()
    if not feasible:
        with pytest.raises(DoesNotFit, match="no solution"):
            program.minimise(problem.cost)
        return
    solution = program.minimise(problem.cost)
    assert list(solution) == list(problem.bounds)
    assert all(isinstance(value, float) and value.is_integer() for value in solution.values())
    assert problem.is_satisfied(solution)
    # Costs are integers below 100, so a relative gap of 1e-4 leaves no room for a worse one.
    assert problem.total_cost(solution) == min(map(problem.total_cost, feasible))


def _best_with_continuous(problem: Problem, name: str) -> float | None:
    """The least cost when only `name` is continuous: brute force over the others, then interval ends."""
    low, high = problem.bounds[name]
    others = {other: bounds for other, bounds in problem.bounds.items() if other != name}
    best = None
    for values in Problem(others, [], {}).assignments():
        least, most = float(low), float(high)
        for row in problem.rows:
            slack = row.limit - sum(c * values[other] for other, c in row.terms.items() if other != name)
            slope = row.terms.get(name, 0)
            if slope > 0:
                most = min(most, slack / slope)
            elif slope < 0:
                least = max(least, slack / slope)
            elif slack < 0:
                least, most = 1.0, 0.0
        if least <= most + 1e-9:
            end = most if problem.cost.get(name, 0) < 0 else least
            cost = problem.total_cost({**values, name: end})
            best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=150, deadline=None)
@given(problems(equalities=False))
def test_a_mixed_program_is_solved_like_by_brute_force(problem):
    continuous = next(iter(problem.bounds))
    expected = _best_with_continuous(problem, continuous)
    program = problem.program(continuous=(continuous,))
    if expected is None:
        with pytest.raises(DoesNotFit):
            program.minimise(problem.cost, relative_gap=0.0)
        return
    solution = program.minimise(problem.cost, relative_gap=0.0)
    assert problem.is_satisfied(solution)
    assert all(value.is_integer() for name, value in solution.items() if name != continuous)
    assert problem.total_cost(solution) == pytest.approx(expected, abs=TOLERANCE)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_relaxed_program_is_never_worse_than_the_best_in_whole_numbers(problem):
    best = min(map(problem.total_cost, filter(problem.is_satisfied, problem.assignments())), default=None)
    try:
        relaxed = problem.program().minimise(problem.cost, relaxed=True)
    except DoesNotFit:
        assert best is None
        return
    assert problem.is_satisfied(relaxed)
    assert best is None or problem.total_cost(relaxed) <= best + TOLERANCE


def test_a_relaxed_program_goes_between_whole_numbers():
    program = _one_variable()
    program.at_most({"x": 2}, 5)
    assert program.minimise({"x": -1}) == {"x": 2.0}
    assert program.minimise({"x": -1}, relaxed=True) == {"x": 2.5}


def test_the_relative_gap_and_the_time_limit_reach_the_solver(monkeypatch):
    given_options = {}

    def solver(*, c, options, **_):
        given_options.update(options)
        return SimpleNamespace(x=[0.0] * len(c), message="")

    monkeypatch.setattr("scipy.optimize.milp", solver)
    _one_variable().minimise({"x": 1}, relative_gap=0.25, time_limit_s=7.0)
    assert given_options == {"mip_rel_gap": 0.25, "time_limit": 7.0}


def test_the_example_in_the_docstring_is_right():
    results = doctest.testmod(capstan.plans.programs)
    assert results.attempted >= 5
    assert results.failed == 0


def test_what_the_solver_misses_an_integer_by_is_rounded_away(monkeypatch):
    monkeypatch.setattr(
        "scipy.optimize.milp", lambda **_: SimpleNamespace(x=[1.9999999, 0.4999999], message="")
    )
    program = _one_variable()
    program.variable("share", high=1.0)
    assert program.minimise({"x": 1}) == {"x": 2.0, "share": 0.4999999}


def test_nothing_found_in_time_does_not_fit(monkeypatch):
    monkeypatch.setattr(
        "scipy.optimize.milp", lambda **_: SimpleNamespace(x=None, message="Time limit reached.")
    )
    with pytest.raises(DoesNotFit, match="Time limit reached"):
        _one_variable().minimise({"x": 1})


def _one_variable() -> IntegerProgram:
    program = IntegerProgram()
    program.variable("x", high=3, integer=True)
    return program


def _chattering(*, c, **_):
    """A solver that prints from C, past `sys.stdout`, while somebody flushes that."""
    sys.stdout.flush()
    os.write(1, b"chatter\n")
    return SimpleNamespace(x=[0.0] * len(c), message="")


def test_the_solvers_chatter_goes_to_standard_error(monkeypatch, capfd):
    monkeypatch.setattr("scipy.optimize.milp", _chattering)
    with os.fdopen(1, "w", closefd=False) as buffered:
        monkeypatch.setattr(sys, "stdout", buffered)
        print("before")  # still in the buffer when the solver starts
        _one_variable().minimise({"x": 1})
        print("after")
        monkeypatch.undo()
    captured = capfd.readouterr()
    assert captured.out == "before\nafter\n"
    assert captured.err == "chatter\n"


def test_nothing_of_the_real_solver_reaches_standard_output(capfd):
    program = IntegerProgram()
    for index in range(12):
        program.variable(f"x{index}", high=9, integer=index % 2 == 0)
    program.at_most({f"x{index}": index + 1 for index in range(12)}, 97)
    program.minimise({f"x{index}": -(index % 5) - 1 for index in range(12)})
    assert capfd.readouterr().out == ""


def test_standard_output_is_given_back_when_the_solver_fails(monkeypatch, capfd):
    def failing(**_):
        raise ValueError("broken solver")

    monkeypatch.setattr("scipy.optimize.milp", failing)
    num_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="broken solver"):
        _one_variable().minimise({"x": 1})
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_two_threads_that_solve_at_once_leave_standard_output_in_place(monkeypatch, capfd):
    """The first solve ends while the second is under way; unless solves exclude each other, that is."""
    second_began, first_ended = threading.Event(), threading.Event()

    def solver(*, c, **_):
        if threading.current_thread().name == "first":
            second_began.wait(timeout=0.3)  # never comes where solves exclude each other
        else:
            second_began.set()
            first_ended.wait(timeout=30)
        return SimpleNamespace(x=[0.0] * len(c), message="")

    def first():
        _one_variable().minimise({"x": 1})
        first_ended.set()

    monkeypatch.setattr("scipy.optimize.milp", solver)
    threads = [
        threading.Thread(target=first, name="first"),
        threading.Thread(target=lambda: _one_variable().minimise({"x": 1}), name="second"),
    ]
    kept = os.dup(1)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        os.write(1, b"after\n")
    finally:
        os.dup2(kept, 1)  # whatever happened, the tests that follow have their standard output
        os.close(kept)
    assert capfd.readouterr().out == "after\n"
