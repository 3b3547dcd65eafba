"""The folders of tests of a room and of the floors and rooms that its package imports.

    python tests/rooms.py generation

Without a room: nothing, which to pytest means all tests.
"""

import ast
import sys
from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "capstan"


def imported_by(package: str) -> set[str]:
    """The packages of capstan that a package names in imports, at the top of a file or inside a function."""
    found = set()
    for path in [*(SOURCE / package).rglob("*.py"), *SOURCE.glob(f"{package}.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found |= {name.split(".")[1] for name in names if name.startswith("capstan.")}
    return found


def stands_on(room: str) -> set[str]:
    """The room, and every package that it needs, however indirectly."""
    found, new = set(), {room}
    while new:
        found |= new
        new = set().union(*map(imported_by, new)) - found
    return found


def main() -> int | str:
    if len(sys.argv) < 2:
        return 0
    rooms = sorted(path.name for path in TESTS.iterdir() if any(path.glob("test_*.py")))
    room = sys.argv[1]
    if room not in rooms:
        return f"There is no room {room!r}. There are: {', '.join(rooms)}."
    everywhere = sorted(TESTS.glob("test_*.py"))
    folders = [TESTS / each for each in sorted(stands_on(room)) if each in rooms]
    print(*(path.relative_to(TESTS.parent) for path in (*folders, *everywhere)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
