"""Symbolic tracing: call a function with a symbol that writes down what is done with it.

What a symbol cannot write down, it refuses: its truth, its length, its iteration, its text. Then the function
is read from its source. What a symbol would not notice (`is None`, `isinstance`, a caught exception) is found
in the bytecode before, by `purity.footprint`.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from capstan.partitioning.purity import PURE_METHODS
from capstan.partitioning.terms import SCALARS, Term, constant, term

# How a member of a class is read: from the term of its object, the class, the member's name.
ReadMember = Callable[[Term, type, str], "Term | Callable[..., Term] | None"]


class Unreadable(BaseException):
    """Not for users: a function cannot be read this way. No `except Exception` of theirs catches it."""


class Symbol:
    """A value that is not known. Operators, attributes, items and known methods give further symbols."""

    __slots__ = ("_capstan_class", "_capstan_read", "_capstan_term")

    def __init__(self, of: Term, cls: type | None = None, read: ReadMember | None = None) -> None:
        self._capstan_term = of
        self._capstan_class = cls
        self._capstan_read = read

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise Unreadable(f"asks for {name}")
        if self._capstan_class is not None and self._capstan_read is not None:
            member = self._capstan_read(self._capstan_term, self._capstan_class, name)
            if isinstance(member, Term):
                return Symbol(member)
            if member is not None:
                return lambda *given, **named: Symbol(member(*map(to_term, given), **_terms(named)))
        return Symbol(Term("attribute", name, (self._capstan_term,)))

    def __getitem__(self, key: object) -> "Symbol":
        if isinstance(key, slice):
            parts = (key.start, key.stop, key.step)
            return Symbol(term("slice", self._capstan_term, *map(to_term, parts)))
        return Symbol(term("item", self._capstan_term, to_term(key)))

    def __call__(self, *given: object, **named: object) -> "Symbol":
        of = self._capstan_term
        if of.kind != "attribute":
            raise Unreadable("calls a value")
        return Symbol(method(of.operands[0], of.name, list(map(to_term, given)), _terms(named)))

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise Unreadable("needs the value, not only what it is computed from")

    __bool__ = __len__ = __iter__ = __next__ = __contains__ = __hash__ = _refuse
    __int__ = __float__ = __index__ = __complex__ = __str__ = __repr__ = __format__ = _refuse
    __bytes__ = __enter__ = __exit__ = __await__ = __setitem__ = __delitem__ = __reversed__ = _refuse
    __round__ = __abs__ = __divmod__ = __rdivmod__ = __trunc__ = __floor__ = __ceil__ = _refuse


def method(of: Term, name: str, given: list[Term], named: dict[str, Term]) -> Term:
    """A call of a method of one of Python's own types.

    Raises:
        Unreadable: it is not a method that only computes.
    """
    if name not in PURE_METHODS:
        raise Unreadable(f"calls .{name}(), whose body is not known")
    return term("method", of, *given, *keywords(named), name=name)


def keywords(named: dict[str, Term]) -> list[Term]:
    """Arguments by name, in one order."""
    return [Term("keyword", name, (named[name],)) for name in sorted(named)]


def to_term(value: object) -> Term:
    """What a traced function returned or passed on.

    Raises:
        Unreadable: neither a symbol, nor a plain constant, nor a tuple or list of these.
    """
    if isinstance(value, Symbol):
        return value._capstan_term
    if type(value) in SCALARS:
        return constant(value)
    if type(value) in (tuple, list):
        return Term(type(value).__name__, "", tuple(map(to_term, value)))  # type: ignore[call-overload]
    raise Unreadable(f"handles a {type(value).__name__}")


def _terms(named: dict[str, object]) -> dict[str, Term]:
    return {name: to_term(value) for name, value in named.items()}


_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "floordiv": "floordiv", "truediv": "truediv"}
_BINARY |= {"mod": "mod", "pow": "pow", "and": "bitand", "or": "bitor", "xor": "bitxor"}
_BINARY |= {"lshift": "lshift", "rshift": "rshift", "matmul": "matmul"}


def _forward(kind: str) -> Callable[[Symbol, object], Symbol]:
    return lambda self, other: Symbol(term(kind, self._capstan_term, to_term(other)))


def _backward(kind: str) -> Callable[[Symbol, object], Symbol]:
    return lambda self, other: Symbol(term(kind, to_term(other), self._capstan_term))


def _alone(kind: str) -> Callable[[Symbol], Symbol]:
    return lambda self: Symbol(term(kind, self._capstan_term))


for _name, _kind in _BINARY.items():
    setattr(Symbol, f"__{_name}__", _forward(_kind))
    setattr(Symbol, f"__r{_name}__", _backward(_kind))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Symbol, f"__{_name}__", _forward(_name))
for _name in ("neg", "pos", "invert"):
    setattr(Symbol, f"__{_name}__", _alone(_name))
