"""What a function touches besides its row, read from its bytecode before anything is called.

Tracing calls a function, so what has effects must be known before; and a name may be bound to anything, so a
global is followed to the object that it means now.
"""

import builtins
import dis
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

from capstan.partitioning.terms import SCALARS

# Methods of Python's own types that only compute. What is not here may do anything, and its name is not its
# body: such a method is read only where its class is given.
PURE_METHODS = frozenset(
    """capitalize casefold center count decode encode endswith expandtabs find format get hex index isalnum
    isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join
    ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip
    split splitlines startswith strip swapcase title translate upper zfill bit_count bit_length is_integer
    date time weekday isoweekday isocalendar isoformat toordinal timetuple strftime total_seconds
    group groups groupdict start end span items keys values""".split()
)
# Methods that change their object and do nothing else: of local lists and dicts they are harmless.
_LOCAL_CHANGES = frozenset("append extend add update setdefault sort reverse insert".split())
PURE_BUILTINS = frozenset(
    """abs all any bool bytes chr dict divmod enumerate filter float frozenset int len list map max min ord
    pow range reversed round set sorted str sum tuple zip isinstance format""".split()
)
# Functions whose value depends on their arguments alone.
PURE_MODULES: dict[str, frozenset[str]] = {
    "math": frozenset("ceil floor trunc sqrt log log2 log10 exp gcd hypot fabs isnan isfinite".split()),
    "re": frozenset("match search fullmatch sub split findall I IGNORECASE A ASCII M MULTILINE".split()),
    "datetime": frozenset("date datetime timedelta fromisoformat strptime".split()),
    "operator": frozenset("itemgetter attrgetter".split()),
    "unicodedata": frozenset(["normalize"]),
    "zlib": frozenset("crc32 adler32".split()),
}
_EFFECTS = {
    "STORE_GLOBAL": "sets a global",
    "DELETE_GLOBAL": "deletes a global",
    "STORE_DEREF": "sets a variable of its closure",
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_SUBSCR": "sets an item",
    "DELETE_SUBSCR": "deletes an item",
    "STORE_SLICE": "sets a slice",
    "IMPORT_NAME": "imports while it runs",
}
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a function reads and does: reasons against reading it, keeping it, calling it."""

    opaque: tuple[str, ...]
    unstable: tuple[str, ...]
    untraceable: tuple[str, ...]
    names: frozenset[str]
    digest: str


def footprint(function: FunctionType) -> Footprint:
    """Look through a function and the plain functions that it calls.

    `opaque`: why no term may stand for it. `unstable`: why two runs, or two versions, of it may differ
    without its digest showing it, so that no stored layout may be matched with it. `untraceable`: why
    calling it with a symbol would not show all that it does. `names`: globals and attributes that it uses.
    """
    look = _Look()
    look.function(function)
    return Footprint(
        opaque=tuple(dict.fromkeys(look.opaque + look.unstable)),
        unstable=tuple(dict.fromkeys(look.unstable)),
        untraceable=tuple(dict.fromkeys(look.untraceable)),
        names=frozenset(look.names),
        digest=hashlib.sha256("\n".join(look.digested).encode()).hexdigest()[:16],
    )


class _Look:
    def __init__(self) -> None:
        self.opaque: list[str] = []
        self.unstable: list[str] = []
        self.untraceable: list[str] = []
        self.digested = [f"python {sys.version_info[0]}.{sys.version_info[1]}"]
        self.names: set[str] = set()
        self._seen: set[int] = set()

    def function(self, function: FunctionType) -> None:
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        if function.__code__.co_flags & _SUSPENDS:
            self.unstable.append("is a generator or coroutine")
        for code in _codes(function.__code__):
            self._code(code)
        self._outside(function)
        for name, value in [
            *zip(function.__code__.co_freevars, _cells(function), strict=True),
            *((f"default {number}", value) for number, value in enumerate(function.__defaults__ or ())),
            *(function.__kwdefaults__ or {}).items(),
        ]:
            self._value(name, value)

    def _code(self, code: CodeType) -> None:
        self.names.update(code.co_names)
        # A set prints in another order in another process.
        constants = [
            sorted(map(repr, each)) if isinstance(each, frozenset) else each
            for each in code.co_consts
            if not isinstance(each, CodeType)
        ]
        self.digested.append(f"{code.co_code.hex()} {constants!r} {code.co_names} {code.co_varnames}")
        if code.co_exceptiontable:
            self.untraceable.append("catches exceptions")
        own = set(code.co_cellvars)
        if any(name.startswith("__") for name in code.co_names):
            self.untraceable.append("asks an object about itself")
        from_globals = {step.offset for chain in _global_chains(code) for step in chain}
        for step in dis.get_instructions(code):
            if step.offset in from_globals:
                continue
            if step.opname in _EFFECTS and not (step.opname == "STORE_DEREF" and step.argval in own):
                self.opaque.append(_EFFECTS[step.opname])
                if step.opname not in {"STORE_SUBSCR", "STORE_SLICE"}:
                    self.unstable.append(_EFFECTS[step.opname])
            if step.opname == "IS_OP" or step.opname.endswith("_NONE"):
                self.untraceable.append("asks whether something is None or identical")
            if step.opname.startswith("MATCH_"):
                self.untraceable.append("matches patterns")
            if step.opname == "BINARY_OP" and "=" in step.argrepr:
                self.untraceable.append("changes a value in place")
            if _is_method(step) and step.argval not in PURE_METHODS | _LOCAL_CHANGES:
                self.unstable.append(f"calls .{step.argval}(), whose body is not known")
            elif _is_method(step) and step.argval in _LOCAL_CHANGES:
                self.opaque.append(f"calls .{step.argval}(), which changes its object")

    def _outside(self, function: FunctionType) -> None:
        """Follow the globals that the function reads."""
        chains = [chain for code in _codes(function.__code__) for chain in _global_chains(code)]
        for name, *attributes in [[step.argval for step in chain] for chain in chains]:
            found = function.__globals__.get(name, getattr(builtins, name, None))
            self.untraceable.append(f"uses {name}")
            if found is None and name not in function.__globals__:
                self.unstable.append(f"reads {name}, which does not exist")
            elif getattr(builtins, name, None) is found and name not in function.__globals__:
                if name not in PURE_BUILTINS and not _is_exception(found):
                    self.unstable.append(f"calls {name}()")
            elif (known := pure_name(found, attributes)) is not None:
                self.digested.append(f"{name} is {known}")
            elif isinstance(found, FunctionType) and not attributes:
                self._value(name, found)
            elif isinstance(found, SCALARS) or (
                isinstance(found, re.Pattern) and PURE_MODULES["re"].issuperset(attributes)
            ):
                self.opaque.append(f"reads the global {name}")
                self._value(name, found)
            else:
                self.unstable.append(f"reads the global {'.'.join([name, *attributes])}")

    def _value(self, name: str, value: object) -> None:
        if isinstance(value, FunctionType):
            self.untraceable.append(f"calls {name}")
            self.digested.append(f"{name} is the function")
            self.function(value)
        elif isinstance(value, (*SCALARS, re.Pattern)):
            self.digested.append(f"{name} = {type(value).__name__} {value!r}")
        else:
            self.unstable.append(f"reads {name}, a {type(value).__name__} that may change")


def pure_name(found: object, attributes: list[str]) -> str | None:
    """The full name of a known function of its arguments alone: "re.match"; None for anything else."""
    module, name = _full_name(found)
    path = [*filter(None, [name]), *attributes]
    known = PURE_MODULES.get(module, frozenset())
    return ".".join([module, *path]) if path and set(path) <= known else None


def _full_name(found: object) -> tuple[str, str]:
    if isinstance(found, ModuleType):
        return found.__name__, ""
    if not isinstance(found, type | FunctionType | BuiltinFunctionType):
        return "", ""  # an instance has its class's module: re's, of a compiled pattern
    return str(getattr(found, "__module__", "") or ""), str(getattr(found, "__qualname__", "") or "")


def _is_exception(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, BaseException)


def _is_method(step: dis.Instruction) -> bool:
    if step.opname == "LOAD_METHOD":
        return True
    # From 3.12 on methods are loaded by LOAD_ATTR with its lowest bit set.
    return sys.version_info >= (3, 12) and step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _cells(function: FunctionType) -> list[object]:
    values: list[object] = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not bound yet
            values.append(NotImplemented)
    return values


def _global_chains(code: CodeType) -> Iterator[list[dis.Instruction]]:
    """The steps by which each global is read, with the attributes taken from it at once: re, match."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in {"PRECALL", "CACHE"}]
    for place, step in enumerate(steps):
        if step.opname not in {"LOAD_GLOBAL", "LOAD_NAME"}:
            continue
        chain = [step]
        for after in steps[place + 1 :]:
            if after.opname not in {"LOAD_ATTR", "LOAD_METHOD"}:
                break
            chain.append(after)
        yield chain
