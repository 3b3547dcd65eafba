"""Keys out of Python functions: traced, else read from source, else opaque; never guessed.

    read_key(lambda o: o["url"].split("/")[2].lower())

gives a `Key` whose identity is that of any other function which computes the same in the same steps.
"""

import functools
import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import FunctionType, MemberDescriptorType
from typing import Any

from capstan.errors import UsageError
from capstan.partitioning.purity import Footprint, footprint
from capstan.partitioning.syntax import read_source
from capstan.partitioning.terms import SCALARS, Term, constant, row
from capstan.partitioning.tracing import Symbol, Unreadable, to_term

_DEEPEST = 20


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a key function computes.

    `identity` is equal for functions known to compute the same. `term` is None where the function is opaque:
    then the identity is of its code, closure and what it calls, and it can only be used as a materialised
    column. `level` says how it was read: "traced", "source" or "opaque"; `reasons` why not otherwise. Where
    `is_reusable` is false (it reads a clock, chance, the outside, or code that is not known) no layout may be
    matched with it.
    """

    identity: str
    level: str
    term: Term | None
    is_reusable: bool
    reasons: tuple[str, ...] = ()
    function: Callable[[Any], Hashable] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.term) if self.term is not None else f"opaque {self.identity}"

    @property
    def parts(self) -> frozenset[str]:
        """Identities of all steps of the computation that depend on the row: what functions may share."""
        steps = () if self.term is None else self.term.walk()
        return frozenset(each.identity for each in steps if each.has_input and each.kind != "input")


def read_key(key: Callable[[Any], Any] | property | str, *, of: type | None = None) -> Key:
    """Read what a key function computes from its row.

    Args:
        key: a function of one row, a property, `operator.itemgetter`, a `functools.partial`, or the name of a
            column. Attributes, items and methods of Python's own types (`split`, `get`, `date`) are taken for
            what they are there.
        of: the class of the row. Its methods and properties are read through, so that a changed body is
            another key; without it, methods of one's own classes are opaque.

    Source: Lachesis, arXiv 2006.16529, lambda terms.
    Differs: a method's identity is its body, not its name; functions are read, not written in terms.

    Raises:
        UsageError: it is not callable with one row, or its value does not depend on the row.
    """
    if isinstance(key, str):
        name = key
        key = lambda each: each[name]  # noqa: E731
    if isinstance(key, property):
        key = key.fget  # type: ignore[assignment]
    if isinstance(key, functools.cached_property):
        key = key.func
    if not callable(key):
        raise UsageError(f"A key is a function of a row or a column's name, not a {type(key).__name__}.")
    reader = _Inliner(of)
    try:
        term = reader.read(key)
    except Unreadable as reason:
        return _opaque(key, str(reason), of)
    if not term.has_input:
        raise UsageError(f"The key {term} is the same for every row; give a function that uses its row.")
    return Key(
        identity=term.identity,
        level="source" if reader.used_source else "traced",
        term=term,
        is_reusable=True,
        reasons=tuple(reader.reasons),
        function=key,
    )


class _Inliner:
    """Reads one function, and those that it calls, with terms for arguments."""

    def __init__(self, of: type | None) -> None:
        self._class = None if of is None or of.__module__ == "builtins" else of
        self._depth = 0
        self.used_source = False
        self.reasons: list[str] = []

    def read(self, key: Callable[..., Any]) -> Term:
        fixed: dict[str, Term] = {}
        if isinstance(key, functools.partial):
            if key.args or not all(type(each) in SCALARS for each in key.keywords.values()):
                raise Unreadable("has arguments bound that are not constants by name")
            fixed = {name: constant(value) for name, value in key.keywords.items()}
            key = key.func
        if type(key).__module__ == "operator":  # itemgetter, attrgetter: C code that calls the symbol
            return to_term(key(Symbol(row())))
        if not isinstance(key, FunctionType):
            raise Unreadable(f"is a {type(key).__name__}, not a function written in Python")
        if self._class is not None and _makes_up_members(self._class):
            raise Unreadable(f"is of {self._class.__name__}, which computes its attributes")
        return self.call(key, [row()], fixed)

    def call(self, function: FunctionType, given: list[Term], named: dict[str, Term]) -> Term:
        """The term of a function's value for these arguments."""
        look = footprint(function)
        if look.unstable or look.opaque:
            # What is only unknown by name may be a method of the row's class, which is looked up as it comes.
            known = self._class is not None and all("whose body is not known" in each for each in look.opaque)
            if not known:
                raise Unreadable("; ".join(look.opaque))
        self._depth += 1
        if self._depth > _DEEPEST:
            raise Unreadable("calls itself, or too deeply")
        try:
            bound = _bind(function, given, named)
            if look.untraceable:
                self.reasons.extend(look.untraceable)
                return self._from_source(function, bound)
            try:
                return self._traced(function, given, named)
            except Unreadable as reason:
                self.reasons.append(str(reason))
            except Exception as error:
                self.reasons.append(f"fails on a symbol: {type(error).__name__}")
            return self._from_source(function, bound)
        finally:
            self._depth -= 1

    def _traced(self, function: FunctionType, given: list[Term], named: dict[str, Term]) -> Term:
        symbols = [self._symbol(each) for each in given]
        return to_term(function(*symbols, **{name: self._symbol(each) for name, each in named.items()}))

    def _from_source(self, function: FunctionType, bound: dict[str, Term]) -> Term:
        self.used_source = True
        return read_source(function, bound, call=self.call, cls=self._class, member=self.member)

    def _symbol(self, of: Term) -> Symbol:
        return Symbol(of, self._class, self.member) if of == row() else Symbol(of)

    def member(self, of: Term, cls: type, name: str) -> Term | Callable[..., Term] | None:
        """A member of the row: the term of a property, what reads a method; None for a plain field."""
        found = inspect.getattr_static(cls, name, None)
        if isinstance(found, property) and isinstance(found.fget, FunctionType):
            return self.call(found.fget, [of], {})
        if isinstance(found, functools.cached_property) and isinstance(found.func, FunctionType):
            return self.call(found.func, [of], {})
        if isinstance(found, staticmethod) and isinstance(found.__func__, FunctionType):
            function = found.__func__
            return lambda *given, **named: self.call(function, list(given), named)
        if isinstance(found, FunctionType):
            own = found
            return lambda *given, **named: self.call(own, [of, *given], named)
        if not _is_field(cls, name):
            raise Unreadable(f"uses {cls.__name__}.{name}, which is not read")
        return None


def _is_field(cls: type, name: str) -> bool:
    """Whether a member lies in the row itself: its class does not know it, or only declares it."""
    found = inspect.getattr_static(cls, name, None)
    declared = any(name in vars(base).get("__annotations__", {}) for base in cls.__mro__)
    is_slot = isinstance(found, MemberDescriptorType) or type(found).__name__ == "_tuplegetter"
    return found is None or is_slot or (declared and isinstance(found, SCALARS))


def _makes_up_members(cls: type) -> bool:
    """Whether a class answers for its attributes or items by code of its own."""
    own = ("__getattr__", "__getattribute__", "__getitem__")
    return any(isinstance(inspect.getattr_static(cls, name, None), FunctionType) for name in own)


def _bind(function: FunctionType, given: list[Term], named: dict[str, Term]) -> dict[str, Term]:
    try:
        bound = inspect.signature(function).bind(*given, **named)
    except TypeError as error:
        raise UsageError(f"A key is a function of one row; {function.__qualname__}: {error}.") from error
    bound.apply_defaults()
    terms = {}
    for name, value in bound.arguments.items():
        if not isinstance(value, Term) and type(value) not in SCALARS:
            raise Unreadable("takes a variable number of arguments")
        terms[name] = value if isinstance(value, Term) else constant(value)
    return terms


def _opaque(key: Callable[..., Any], reason: str, of: type | None) -> Key:
    function = key.func if isinstance(key, functools.partial) else key
    if not isinstance(function, FunctionType):
        name = f"{type(key).__module__}.{type(key).__qualname__}"
        look = Footprint(
            opaque=(),
            unstable=(f"its code is not Python: {name}",),
            untraceable=(),
            names=frozenset(),
            digest=name,
        )
    else:
        look = footprint(function)
    bound = repr((key.args, sorted(key.keywords.items()))) if isinstance(key, functools.partial) else ""
    unstable = list(look.unstable)
    if of is not None and of.__module__ != "builtins":
        # The digest is of the function, not of what the row's class computes for it.
        unstable += [f"uses {of.__name__}.{each}" for each in sorted(look.names) if not _is_field(of, each)]
        unstable += [f"{of.__name__} computes its attributes"] if _makes_up_members(of) else []
    return Key(
        identity=Term("opaque", look.digest, (constant(bound),)).identity,
        level="opaque",
        term=None,
        is_reusable=not unstable,
        reasons=tuple(dict.fromkeys([reason, *unstable])),
        function=key,
    )
