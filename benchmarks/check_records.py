"""Check that every record is complete, that its bars hold, and that every figure in a document has one.

A document quotes a record by its name in parentheses after the figure: `61 tokens/s (record: NAME)`. A bar
that does not hold carries `accepted`, the reason. Exit code 1 and a list of what is missing otherwise.
Records of code that has changed since are named, too: that is a hint, not a failure.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"
FIELDS = (
    "claim",
    "command",
    "date",
    "commit",
    "tree",
    "machine",
    "versions",
    "figures",
    "peers",
    "bound",
    "bars",
)
_QUOTE = re.compile(r"\(record: ([a-z0-9.-]+)\)")
# A speed, a ratio or a share of something measured is a claim; sizes that a reader chooses are not.
_FIGURE = re.compile(r"\d[\d,.]*\s*(?:tokens/s|samples/s|rows/s|GB/s|TFLOP/s|× (?:faster|slower))")


def incomplete_records() -> Iterator[str]:
    """Records that lack a field, or whose bars do not hold."""
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text())
        missing = [field for field in FIELDS if field not in record]
        if missing:
            yield f"{path.name} lacks {', '.join(missing)}"
        for name, bar in record.get("bars", {}).items():
            if not {"goal", "reached", "holds"} <= bar.keys():
                yield f"{path.name}: bar {name!r} lacks goal, reached or holds"
            elif not bar["holds"] and not str(bar.get("accepted", "")).strip():
                yield (
                    f"{path.name}: bar {name!r} does not hold ({bar['reached']}, wanted {bar['goal']}). "
                    "Reach it, or give the reason as `accepted`"
                )


def outdated_records() -> Iterator[str]:
    """Records that measured other code than what stands here now of the room that they are named for."""
    for path in sorted(RECORDS.glob("*.json")):
        tree = json.loads(path.read_text()).get("tree", "")
        room = room_of(path.stem)
        same = subprocess.run(
            ["git", "diff", "--quiet", tree, "HEAD:src", "--", f"capstan/{room}"],
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        if same.returncode:
            yield f"{path.name} is older than {room}"


def room_of(name: str) -> str:
    """The room that a record speaks of: its name begins with it."""
    rooms = [each.name for each in (ROOT / "src" / "capstan").iterdir() if each.is_dir()]
    return next((room for room in rooms if name.startswith(room.replace("_", "-"))), "")


def unbacked_figures() -> Iterator[str]:
    """Lines of README and docs that quote a measured figure without a record."""
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]:
        for number, line in enumerate(_prose(document), start=1):
            where = f"{document.relative_to(ROOT)}:{number}"
            quoted = _QUOTE.findall(line)
            for name in quoted:
                if not (RECORDS / f"{name}.json").exists():
                    yield f"{where} quotes the record {name!r}, which does not exist"
            if _FIGURE.search(line) and not quoted:
                yield f"{where} states {_FIGURE.search(line)[0]!r} without a record"  # type: ignore[index]


def _prose(document: Path) -> Iterator[str]:
    """The document's lines, those inside code blocks blanked: they show output, with the command above."""
    inside = False
    for line in document.read_text().splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        yield "" if inside else line


def main() -> int:
    problems = [*incomplete_records(), *unbacked_figures()]
    for problem in problems:
        print(problem)
    for hint in outdated_records():
        print(f"note: {hint}")
    print(f"{len(list(RECORDS.glob('*.json')))} records, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
