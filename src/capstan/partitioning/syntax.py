"""Functions read from their source: the returned value, sliced back to the row through names and branches.

The source counts only if it compiles to the very code that the function runs: a file may have changed since
it was imported.
"""

import ast
import builtins
import linecache
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import CodeType, FunctionType

from capstan.partitioning.purity import PURE_BUILTINS, pure_name
from capstan.partitioning.terms import SCALARS, Term, constant, term
from capstan.partitioning.tracing import ReadMember, Unreadable, keywords, method

_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.FloorDiv: "floordiv",
    ast.Div: "truediv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.BitAnd: "bitand",
    ast.BitOr: "bitor",
    ast.BitXor: "bitxor",
    ast.LShift: "lshift",
    ast.RShift: "rshift",
    ast.MatMult: "matmul",
}
_UNARY: dict[type[ast.unaryop], str] = {
    ast.USub: "neg",
    ast.UAdd: "pos",
    ast.Invert: "invert",
    ast.Not: "not",
}
_COMPARISONS: dict[type[ast.cmpop], tuple[str, bool]] = {
    ast.Eq: ("eq", False),
    ast.NotEq: ("ne", False),
    ast.Lt: ("lt", False),
    ast.LtE: ("le", False),
    ast.Gt: ("gt", False),
    ast.GtE: ("ge", False),
    ast.Is: ("is", False),
    ast.IsNot: ("is", True),
    ast.In: ("in", False),
    ast.NotIn: ("in", True),
}
_MOST_STEPS = 2000  # branches double what follows them
_CONVERSIONS = {-1: "", ord("s"): "!s", ord("r"): "!r", ord("a"): "!a"}
# What calls a function with terms: (function, terms of its arguments) -> term of its value.
ReadCall = Callable[[FunctionType, list[Term], dict[str, Term]], Term]


def read_source(
    function: FunctionType, bound: Mapping[str, Term], *, call: ReadCall, cls: type | None, member: ReadMember
) -> Term:
    """The term of what `function` returns when its arguments are `bound`.

    Raises:
        Unreadable: no source, or a form that is not read.
    """
    node = _definition(function)
    reader = _Reader(function, call=call, cls=cls, member=member)
    if isinstance(node, ast.Lambda):
        return reader.value(node.body, dict(bound))
    return reader.block(node.body, dict(bound))


class _Reader:
    def __init__(
        self, function: FunctionType, *, call: ReadCall, cls: type | None, member: ReadMember
    ) -> None:
        self._function = function
        self._call = call
        self._class = cls
        self._member = member
        self._steps_left = _MOST_STEPS

    def block(self, body: list[ast.stmt], names: dict[str, Term]) -> Term:
        """The value that a block returns; what follows an `if` belongs to both of its branches."""
        for place, step in enumerate(body):
            match step:
                case ast.Return(value=value):
                    return constant(None) if value is None else self.value(value, names)
                case ast.Assign(targets=[target], value=value):
                    self._assign(target, self.value(value, names), names)
                case ast.AnnAssign(target=ast.Name() as target, value=ast.expr() as value):
                    self._assign(target, self.value(value, names), names)
                case ast.If(test=test, body=then, orelse=otherwise):
                    rest = body[place + 1 :]
                    asked = self.value(test, names)
                    branches = [self.block([*each, *rest], dict(names)) for each in (then, otherwise)]
                    return term("if", asked, *branches)
                case ast.Pass() | ast.Expr(value=ast.Constant()):
                    continue
                case _:
                    raise Unreadable(f"has a statement that is not read: {ast.unparse(step)[:40]}")
        return constant(None)

    def _assign(self, target: ast.expr, value: Term, names: dict[str, Term]) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = value
        elif isinstance(target, ast.Tuple) and all(isinstance(each, ast.Name) for each in target.elts):
            # Unpacking fails on another number of parts, which taking an item does not.
            for number, each in enumerate(target.elts):
                self._assign(each, Term("unpack", f"{number}/{len(target.elts)}", (value,)), names)
        else:
            raise Unreadable("assigns to something other than a name")

    def value(self, node: ast.expr, names: dict[str, Term]) -> Term:
        """The term of an expression."""
        self._steps_left -= 1
        if self._steps_left < 0:
            raise Unreadable("has too many branches")
        match node:
            case ast.Constant(value=value) if type(value) in SCALARS:
                return constant(value)
            case ast.Name(id=name):
                return names[name] if name in names else self._free(name)
            case ast.Attribute(value=inner, attr=name):
                return self._attribute(inner, name, names)
            case ast.Subscript(value=inner, slice=ast.Slice() as cut):
                ends = [self._optional(each, names) for each in (cut.lower, cut.upper, cut.step)]
                return term("slice", self.value(inner, names), *ends)
            case ast.Subscript(value=inner, slice=key):
                return term("item", self.value(inner, names), self.value(key, names))
            case ast.Call():
                return self._called(node, names)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                kind = type(node).__name__.lower()
                return Term(kind, "", tuple(self.value(each, names) for each in parts))
            case ast.Set(elts=parts):
                terms = {self.value(each, names) for each in parts}
                return Term("set", "", tuple(sorted(terms, key=lambda each: each.identity)))
            case ast.Dict(keys=keys, values=values) if None not in keys:
                pairs = [each for pair in zip(keys, values, strict=True) for each in pair if each]
                return Term("dict", "", tuple(self.value(each, names) for each in pairs))
            case ast.JoinedStr(values=parts):
                return Term("format", "", tuple(self._formatted(each, names) for each in parts))
            case _:
                return self._operator(node, names)

    def _operator(self, node: ast.expr, names: dict[str, Term]) -> Term:
        match node:
            case ast.BinOp(left=left, op=sign, right=right):
                return term(_BINARY[type(sign)], self.value(left, names), self.value(right, names))
            case ast.UnaryOp(op=sign, operand=inner):
                return term(_UNARY[type(sign)], self.value(inner, names))
            case ast.BoolOp(op=sign, values=parts):
                kind = "and" if isinstance(sign, ast.And) else "or"
                return Term(kind, "", tuple(self.value(each, names) for each in parts))
            case ast.IfExp(test=test, body=then, orelse=otherwise):
                return term("if", *(self.value(each, names) for each in (test, then, otherwise)))
            case ast.Compare(left=left, ops=signs, comparators=others):
                terms = [self.value(each, names) for each in (left, *others)]
                pairs = [_compared(*each) for each in zip(signs, terms, terms[1:], strict=False)]
                return pairs[0] if len(pairs) == 1 else Term("and", "", tuple(pairs))
            case _:
                raise Unreadable(f"has an expression that is not read: {ast.unparse(node)[:40]}")

    def _optional(self, node: ast.expr | None, names: dict[str, Term]) -> Term:
        return constant(None) if node is None else self.value(node, names)

    def _formatted(self, node: ast.expr, names: dict[str, Term]) -> Term:
        if not isinstance(node, ast.FormattedValue):
            return self.value(node, names)
        given = [self.value(node.format_spec, names)] if node.format_spec is not None else []
        return Term("field", _CONVERSIONS[node.conversion], (self.value(node.value, names), *given))

    def _attribute(self, inner: ast.expr, name: str, names: dict[str, Term]) -> Term:
        if name.startswith("__"):
            raise Unreadable(f"asks for {name}")
        of = self.value(inner, names)
        if self._class is not None and of == Term("input", "0"):
            found = self._member(of, self._class, name)
            if isinstance(found, Term):
                return found
            if found is not None:
                raise Unreadable(f"handles the method {name} without calling it")
        return Term("attribute", name, (of,))

    def _called(self, node: ast.Call, names: dict[str, Term]) -> Term:
        if any(isinstance(each, ast.Starred) for each in node.args) or any(
            each.arg is None for each in node.keywords
        ):
            raise Unreadable("calls with unpacked arguments")
        given = [self.value(each, names) for each in node.args]
        named = {str(each.arg): self.value(each.value, names) for each in node.keywords}
        chain = _chain(node.func)
        if chain is not None and chain[0] not in names:
            return self._outside(chain, given, named)
        if not isinstance(node.func, ast.Attribute):
            raise Unreadable("calls a value")
        of = self.value(node.func.value, names)
        if self._class is not None and of == Term("input", "0"):
            found = self._member(of, self._class, node.func.attr)
            if callable(found):
                return found(*given, **named)
        return method(of, node.func.attr, given, named)

    def _outside(self, chain: list[str], given: list[Term], named: dict[str, Term]) -> Term:
        """A call of something that the function did not make itself."""
        name, *attributes = chain
        free = self._function.__code__.co_freevars
        if name in free:
            found = (self._function.__closure__ or ())[free.index(name)].cell_contents
            if attributes and type(found) in SCALARS and len(attributes) == 1:
                return method(constant(found), attributes[0], given, named)
        else:
            found = self._function.__globals__.get(name, getattr(builtins, name, None))
        known = pure_name(found, attributes)
        if isinstance(found, FunctionType) and not attributes and known is None:
            return self._call(found, given, named)
        if name not in self._function.__globals__ and name in PURE_BUILTINS and not attributes:
            return Term("call", name, (*given, *keywords(named)))
        if known is None:
            raise Unreadable(f"calls {'.'.join(chain)}")
        return Term("call", known, (*given, *keywords(named)))

    def _free(self, name: str) -> Term:
        """A name that is not the function's own: a constant of its closure, or one of Python's types."""
        free = self._function.__code__.co_freevars
        if name in free:
            value = (self._function.__closure__ or ())[free.index(name)].cell_contents
            if type(value) in SCALARS:
                return constant(value)
        elif name not in self._function.__globals__ and isinstance(getattr(builtins, name, None), type):
            return Term("builtin", name)
        raise Unreadable(f"reads {name}")


def _compared(sign: ast.cmpop, left: Term, right: Term) -> Term:
    kind, is_negated = _COMPARISONS[type(sign)]
    compared = term(kind, left, right)
    return term("not", compared) if is_negated else compared


def _chain(node: ast.expr) -> list[str] | None:
    """The names of `a.b.c`; None for anything else."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.insert(0, node.attr)
        node = node.value
    return [node.id, *attributes] if isinstance(node, ast.Name) else None


def _definition(function: FunctionType) -> ast.Lambda | ast.FunctionDef:
    """The syntax tree of a function, if it is certain which one that is."""
    code = function.__code__
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        tree, compiled = _parsed(text, code.co_filename)
    except (SyntaxError, ValueError) as error:
        raise Unreadable("has no source that can be read") from error
    if _fingerprint(code) not in compiled:
        raise Unreadable("has no source, or one that changed since it was imported")
    found = [node for node in tree if _first_line(node) == code.co_firstlineno and _named(node, code)]
    if len(found) > 1:
        found = [node for node in found if _spans(node, code)]
    if len(found) != 1:
        raise Unreadable("shares its line with others like it")
    return found[0]


@lru_cache(maxsize=32)
def _parsed(text: str, name: str) -> tuple[list[ast.Lambda | ast.FunctionDef], frozenset[str]]:
    tree = ast.parse(text)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda | ast.FunctionDef)]
    codes: list[CodeType] = [compile(text, name, "exec", dont_inherit=True)]
    for code in codes:
        codes.extend(each for each in code.co_consts if isinstance(each, CodeType))
    return nodes, frozenset(map(_fingerprint, codes))


def _fingerprint(code: CodeType) -> str:
    constants = [each for each in code.co_consts if not isinstance(each, CodeType)]
    names = (code.co_names, code.co_varnames, code.co_freevars)
    return f"{code.co_name} {code.co_firstlineno} {code.co_code.hex()} {constants!r} {names}"


def _first_line(node: ast.Lambda | ast.FunctionDef) -> int:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return min([node.lineno, *(each.lineno for each in decorators)])


def _named(node: ast.Lambda | ast.FunctionDef, code: CodeType) -> bool:
    return code.co_name == ("<lambda>" if isinstance(node, ast.Lambda) else node.name)


def _spans(node: ast.Lambda | ast.FunctionDef, code: CodeType) -> bool:
    """Whether the code's places in the source begin and end where the body of `node` does."""
    if not isinstance(node, ast.Lambda):
        return False
    body = node.body
    places = [each for each in code.co_positions() if None not in each and each[3] != each[2]]
    starts = [(first, column) for first, _, column, _ in places]
    ends = [(last, column) for _, last, _, column in places]
    here = ((body.lineno, body.col_offset), (body.end_lineno, body.end_col_offset))
    return bool(places) and (min(starts), max(ends)) == here
