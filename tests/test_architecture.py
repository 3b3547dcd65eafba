"""The house rules, read from the source: who may import whom, what is called how, what is never used."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "capstan"

SYSTEMS = frozenset(
    {
        "generation",
        "evaluation",
        "data_parallel",
        "pipelining",
        "allocation",
        "recommendation",
        "shuffling",
        "relations",
        "partitioning",
        "federation",
    }
)
# From the ground up. A room imports itself and the floors below, never a neighbour.
FLOORS = [
    {"errors"},
    {"hardware"},
    {"plans", "codecs"},
    {"transport", "storage"},
    {"models"},
    SYSTEMS,
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: height for height, floor in enumerate(FLOORS) for room in floor}


class Module(NamedTuple):
    """A module by its dotted name; the room is the part after `capstan`, empty for the package itself."""

    name: str
    is_package: bool
    text: str

    @property
    def room(self) -> str:
        return self.name.split(".")[1] if "." in self.name else ""

    @property
    def tree(self) -> ast.Module:
        return _parsed(self.text)


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _module(path: Path) -> Module:
    parts = ["capstan", *path.relative_to(SOURCE).with_suffix("").parts]
    is_package = parts[-1] == "__init__"
    return Module(".".join(parts[:-1] if is_package else parts), is_package, path.read_text(encoding="utf-8"))


PATHS = sorted(SOURCE.rglob("*.py"))
MODULES = {module.name: module for module in map(_module, PATHS)}
PACKAGES = sorted({".".join(["capstan", *path.relative_to(SOURCE).parent.parts]) for path in PATHS})


def _imported(module: Module) -> Iterator[str]:
    """Dotted names of what `module` imports: anywhere in it, inside functions and by string too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            yield from (each.value for each in node.args if isinstance(each, ast.Constant))


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    package = parts if module.is_package else parts[:-1]
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _called(node: ast.Call) -> str:
    """The function's name; of a method its own, whatever its object."""
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _forbidden_imports(module: Module) -> list[str]:
    """The imports of `module` that the import rule forbids."""
    if module.room and module.room not in FLOOR_OF:
        return [f"{module.name}: the room {module.room!r} is on no floor"]
    found = []
    for target in _imported(module):
        parts = target.split(".")
        if parts[0] != "capstan" or len(parts) == 1 or parts[1] == "__version__" or parts[1] == module.room:
            continue
        if FLOOR_OF.get(parts[1], len(FLOORS)) >= FLOOR_OF.get(module.room, 0):
            found.append(f"{module.name} imports {target}")
    return found


def test_there_is_source_to_check():
    assert {"capstan", "capstan.errors", "capstan.plans.plan", "capstan.storage.slab"} <= set(MODULES)


def test_the_import_rule_holds():
    assert [each for module in MODULES.values() for each in _forbidden_imports(module)] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("capstan.generation.engine", "from capstan.evaluation import run"),
        ("capstan.generation.engine", "import capstan.cli.probe"),
        ("capstan.generation.engine", "def late():\n    from capstan.federation.cut import Cut"),
        ("capstan.generation.engine", "if TYPE_CHECKING:\n    from capstan import relations"),
        ("capstan.generation.engine", "from ..shuffling import order"),
        ("capstan.generation.engine", "from .. import shuffling"),
        ("capstan.generation.engine", "import importlib\nimportlib.import_module('capstan.relations')"),
        ("capstan.models.meta_model", "from capstan.generation.attention.packed import decode_attention"),
        ("capstan.storage.checkpoint", "from capstan.models.meta_model import MetaModel"),
        ("capstan.storage.slab", "from capstan.transport import Lane"),
        ("capstan.transport.lanes", "from capstan.storage.slab import Slab"),
        ("capstan.plans.plan", "from capstan.codecs import Codec"),
        ("capstan.plans.plan", "from capstan.transport import Ledger"),
        ("capstan.hardware.machine", "from capstan.plans import Plan"),
        ("capstan.errors", "from capstan.hardware import Machine"),
        ("capstan", "from capstan.generation import Engine"),
        ("capstan.helpers.text", "import json"),
        ("capstan.generation.engine", "from capstan.newroom import x"),
    ],
)
def test_a_module_that_breaks_the_import_rule_is_found(name, text):
    assert len(_forbidden_imports(Module(name, is_package=False, text=text))) == 1


@pytest.mark.parametrize(
    ("name", "is_package", "text"),
    [
        ("capstan.cli.generate", False, "from capstan.generation import Engine\nimport capstan.hardware"),
        ("capstan.generation.engine", False, "from capstan import storage, __version__\nimport torch"),
        ("capstan.generation.engine", False, "from .weights import Weights\nfrom ..errors import UsageError"),
        ("capstan.generation", True, "from .engine import Engine\nfrom ..storage import Slab"),
        ("capstan.models.meta_model", False, "from capstan.storage import Checkpoint"),
        ("capstan.plans.plan", False, "from capstan.hardware import Machine\nimport capstan"),
    ],
)
def test_a_module_that_keeps_the_import_rule_is_not_accused(name, is_package, text):
    assert _forbidden_imports(Module(name, is_package, text)) == []


def test_no_module_or_class_has_a_name_that_says_nothing():
    empty = re.compile(r"(?i)(?:^|_|(?<=[a-z]))(utils?|helpers?|managers?|common|misc)(?:$|_|(?=[A-Z]))")
    assert [name for name in ("helpers", "io_utils", "CacheManager", "misc") if not empty.search(name)] == []
    classes = [
        node.name
        for module in MODULES.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    ]
    parts = {part for path in PATHS for part in path.relative_to(SOURCE).with_suffix("").parts}
    assert [name for name in [*sorted(parts), *classes] if empty.search(name)] == []


def test_no_source_file_is_longer_than_400_lines():
    lengths = {name: len(module.text.splitlines()) for name, module in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


_PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
_UNSAFE_ARGUMENTS = {
    ("shell", True),
    ("weights_only", False),
    ("allow_pickle", True),
    ("trust_remote_code", True),
}


def _dangers(module: Module) -> list[str]:
    """Ways to run what a file or a string says."""
    found = [target for target in _imported(module) if target.split(".")[0] in _PICKLES]
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
            found.append(f"{node.func.id}(")
        found += [
            f"{each.arg}={each.value.value}"
            for each in node.keywords
            if isinstance(each.value, ast.Constant) and (each.arg, each.value.value) in _UNSAFE_ARGUMENTS
        ]
    return [f"{module.name}: {each}" for each in found]


def test_nothing_runs_what_a_file_or_a_string_says():
    assert [each for module in MODULES.values() for each in _dangers(module)] == []


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "def f(x):\n    exec(x)",
        "import pickle",
        "def f(x):\n    from pickle import loads",
        "subprocess.run('ls', shell=True)",
        "torch.load(file, weights_only=False)",
        "numpy.load(file, allow_pickle=True)",
    ],
)
def test_a_module_that_would_run_what_a_file_says_is_found(text):
    assert len(_dangers(Module("capstan.plans.plan", is_package=False, text=text))) == 1


def test_a_models_eval_mode_is_not_taken_for_the_builtin():
    assert (
        _dangers(Module("capstan.plans.plan", is_package=False, text="model.eval()\nsession.exec(1)")) == []
    )


def _definition(name: str, module: Module, depth: int = 0) -> ast.AST | None:
    """The statement that binds `name` at the top of `module`, followed through its imports from Capstan."""
    assert depth < 10, f"{module.name}: {name} is imported in a circle"
    for node in _top_level(module.tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _imported_definition(alias.name, _absolute(module, node), depth)
    return None


def _imported_definition(name: str, source: str, depth: int) -> ast.AST | None:
    if f"{source}.{name}" in MODULES:
        return MODULES[f"{source}.{name}"].tree
    return _definition(name, MODULES[source], depth + 1) if source in MODULES else None


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for inner in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _top_level(getattr(node, inner, []))


def _public_names(package: Module) -> list[str] | None:
    node = _definition("__all__", package)
    return ast.literal_eval(node.value) if isinstance(node, ast.Assign) else None


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_has_a_docstring_and_public_names_that_exist(name):
    assert name in MODULES, "a folder without __init__.py"
    package = MODULES[name]
    assert ast.get_docstring(package.tree)
    public = _public_names(package)
    assert public, "no __all__"
    assert len(set(public)) == len(public)
    assert [each for each in public if _definition(each, package) is None] == []


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_function_and_class_has_a_docstring(name):
    public = {each: _definition(each, MODULES[name]) for each in _public_names(MODULES[name]) or []}
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    documented = {each: ast.get_docstring(node) for each, node in public.items() if isinstance(node, kinds)}
    assert [each for each, text in documented.items() if not text] == []


def test_names_that_are_not_there_or_not_documented_are_found():
    package = Module("capstan", is_package=True, text="from capstan.errors import Nothing\ndef silent(): ...")
    assert _definition("Nothing", package) is None
    assert _definition("nowhere", package) is None
    assert ast.get_docstring(_definition("silent", package)) is None


def test_every_extra_that_an_error_names_can_be_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        node.args[0].value
        for module in MODULES.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and _called(node) == "require_extra"
        and isinstance(node.args[0], ast.Constant)
    }
    assert named
    assert named <= set(project["optional-dependencies"])


_IMPORT_ONE_BY_ONE = """
import json, logging, os, signal, sys, threading, importlib

def effects():
    return {
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "log handlers": len(logging.root.handlers),
        "folder": os.getcwd(),
        "interrupt": str(signal.getsignal(signal.SIGINT)),
    }

report, seen, before = {}, set(sys.modules), effects()
for name in sys.argv[1:]:
    importlib.import_module(name)
    report[name] = sorted(set(sys.modules) - seen)
    seen = set(sys.modules)
after = effects()
report["effects"] = [name for name in before if before[name] != after[name]]
json.dump(report, sys.stdout)
"""
LIGHT = ("capstan", "capstan.errors", "capstan.plans", "capstan.hardware", "capstan.cli")


@pytest.fixture(scope="module")
def imports() -> dict[str, list[str]]:
    """For each light package the modules that its import adds, in a fresh interpreter; then `effects`."""
    command = [sys.executable, "-c", _IMPORT_ONE_BY_ONE, *LIGHT]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert run.stderr == ""
    return json.loads(run.stdout)


def test_importing_capstan_imports_nothing_else(imports):
    assert imports["capstan"] == ["capstan"]


def test_planning_describing_hardware_and_the_command_line_import_nothing_heavy(imports):
    heavy = {
        "torch",
        "transformers",
        "scipy",
        "safetensors",
        "tokenizers",
        "pyarrow",
        "fastapi",
        "matplotlib",
    }
    assert set(LIGHT[1:]) <= {module for name in LIGHT for module in imports[name]}
    assert {name: sorted(heavy & set(imports[name])) for name in LIGHT} == {name: [] for name in LIGHT}


# Third-party packages that the import of a room may bring.
TORCH = {"torch", "torchgen", "numpy", "opt_einsum", "tqdm", "typing_extensions"}
ROOMS = {
    "capstan.evaluation": {"numpy", "yaml"},
    "capstan.data_parallel": {*TORCH, "rich"},
    "capstan.generation": {*TORCH, "rich", "greenlet", "psutil"},
}
# What torch imports late, and takes longer than torch itself: its compiler, sharded tensors.
LATE = {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "sympy"}
_IMPORT_ONE = """
import importlib, json, sys
before = set(sys.modules)
importlib.import_module(sys.argv[1])
files = {name: getattr(sys.modules[name], "__file__", None) or "" for name in set(sys.modules) - before}
json.dump(files, sys.stdout)
"""


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_little_more_than_torch(room):
    # transformers, which builds models and is imported when there is one to build, takes as long as torch;
    # torch's compiler takes longer.
    command = [sys.executable, "-c", _IMPORT_ONE, room]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    files = json.loads(run.stdout)
    assert LATE & set(files) == set()
    packages = {name.partition(".")[0] for name, file in files.items() if "site-packages" in file}
    # Compiled parts of packages may be modules at the top: _csparsetools, cython_runtime.
    assert {name for name in packages if not name.startswith("_")} - {"capstan"} <= ROOMS[room]


def test_import_has_no_effect(imports):
    assert imports["effects"] == []
