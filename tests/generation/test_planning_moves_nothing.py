"""Planning needs no runtime: whatever it imports moves no tensor and pauses no layer."""

import ast
from pathlib import Path

import capstan.generation

ROOM = Path(capstan.generation.__file__).parent


def imports_of(module: str) -> set[str]:
    """Dotted names that a module of the room imports, inside functions too."""
    path = ROOM.joinpath(*module.split(".")[2:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else node.module for name in names}
    return found


def is_module(name: str) -> bool:
    path = ROOM.parents[1].joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def reached_from(modules: set[str]) -> set[str]:
    """The modules and all that they import, through the whole room; other packages by name only."""
    reached, waiting = set(), set(modules)
    while waiting:
        module = waiting.pop()
        reached.add(module)
        if module.startswith("capstan.generation."):
            waiting |= imports_of(module) - reached
    return reached


def test_planning_imports_neither_runtime_nor_greenlet():
    planning = {f"capstan.generation.planning.{path.stem}" for path in (ROOM / "planning").glob("[!_]*.py")}
    assert len(planning) > 10
    reached = reached_from(planning)
    assert {"torch", "capstan.generation.model", "capstan.generation.attention.packed"} <= reached
    assert {name for name in reached if name.startswith("capstan.generation.runtime")} == set()
    assert {name for name in reached if name.partition(".")[0] == "greenlet"} == set()


def test_the_runtime_reaches_greenlet():
    assert "greenlet" in reached_from({"capstan.generation.runtime.job"})
