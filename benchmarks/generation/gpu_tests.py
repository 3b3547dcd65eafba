"""Run every test that needs a CUDA device, and record how it went: CI has none, so this says when they passed.

    python benchmarks/generation/gpu_tests.py --record generation-parity-h200
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import write_record

from capstan.hardware import this_machine

ROOT = Path(__file__).parents[2]


def run_tests() -> dict[str, Counter[str]]:
    """Outcomes by test file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        outcomes: dict[str, Counter[str]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcome = kinds.pop() if kinds else "passed"
            outcomes.setdefault(case.get("classname", "?"), Counter())[outcome] += 1
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", default=None, help="name of the record to write")
    options = parser.parse_args()
    outcomes = run_tests()
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
            outcomes={name: dict(count) for name, count in outcomes.items()},
        )
    return 0 if passed == total else 1


if __name__ == "__main__":
    sys.exit(main())
