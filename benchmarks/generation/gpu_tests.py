"""Run every test that needs a CUDA device, and record how it went: CI has none.

python benchmarks/generation/gpu_tests.py --workers 10 --record generation-gpu-tests

Only files that have such tests are collected, so that the machine needs what they import and no more.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from capstan.hardware import this_machine
from record import RECORDS, write_record

ROOT = Path(__file__).parents[2]


def run_tests(workers: int) -> dict[str, Counter[str]]:
    """Outcomes by test file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Warnings are errors only for the pinned versions: where the GPU is, others may be installed.
        options = ["-m", "gpu", "-q", "-W", "default", "--tb=short", f"--junitxml={report}"]
        options += ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
        files = [
            str(path)
            for path in sorted((ROOT / "tests").rglob("test_*.py"))
            if "mark.gpu" in path.read_text()
        ]
        subprocess.run([sys.executable, "-m", "pytest", *files, *options], cwd=ROOT, check=False)
        outcomes: dict[str, Counter[str]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcome = kinds.pop() if kinds else "passed"
            outcomes.setdefault(case.get("classname", "?"), Counter())[outcome] += 1
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", default=None, help="name of the record to write")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--folder-of-records", type=Path, default=RECORDS)
    options = parser.parse_args()
    outcomes = run_tests(options.workers)
    passed = sum(count["passed"] for count in outcomes.values())
    total = sum(sum(count.values()) for count in outcomes.values())
    print(f"{passed} of {total} passed")
    if options.record:
        write_record(
            options.record,
            claim="every test that needs a CUDA device passes, greedy parity with transformers among them",
            machine=this_machine(),
            figures={"passed": {"value": passed, "unit": "tests"}, "run": {"value": total, "unit": "tests"}},
            bound={"formula": "all of them", "value": total},
            bars={"all pass": {"goal": total, "reached": passed, "holds": passed == total}},
            folder=options.folder_of_records,
            outcomes={name: dict(count) for name, count in outcomes.items()},
        )
    return 0 if passed == total else 1


if __name__ == "__main__":
    sys.exit(main())
