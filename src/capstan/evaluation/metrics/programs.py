"""Running a program that a model wrote: apart, with limits on time and memory.

It happens in another process, in an empty folder, without writing to files or starting processes. That is no
wall against ill will. A program counts as done only where it says the word that it is told for the end: one
that ends itself before, with `exit()`, has not passed.
"""

import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 3.0
_MEMORY_LIMIT_BYTES = 2 << 30
_LONGEST_INTEGER = 100_000  # digits: the tests of APPS have integers that Python else refuses to read

# What is run beside the program, which stands in a file of its own so that nothing precedes its first line.
_RUNNER = f"""
import json, os, resource
told = json.load(open("told.json"))
os.remove("told.json")  # what is run must not find the word there
program = open("program.py").read()
for kind, most in (
    (resource.RLIMIT_AS, {_MEMORY_LIMIT_BYTES}), (resource.RLIMIT_CPU, 1 + int(told["seconds"])),
    (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0),
):
    resource.setrlimit(kind, (most, most))
scope = {{"__name__": told["name"]}}
try:
    exec(compile(program, "program.py", "exec"), scope)
except SystemExit:
    if not told["may_exit"]:
        raise
if told["check"]:
    exec(compile(told["check"], "check.py", "exec"), {{**scope, "told": told}})
os.write(2, told["word"].encode())  # what is printed may be kept back until the process ends
"""


def printed_by(
    program: str,
    *,
    given: str = "",
    check: str = "",
    case: Any = None,
    may_exit: bool = False,
    timeout_s: float = TIME_LIMIT_S,
) -> str | None:
    """What a program prints, or None if it fails, ends too early, takes too long or too much memory.

    Args:
        given: its standard input.
        check: more of the program, run after it, which finds `case` as `told["case"]`; then the program is
            imported, as it were, and not the main one.
        may_exit: whether a program that ends itself has come to its end.
    """
    word = secrets.token_hex(16)
    told: dict[str, Any] = {
        "word": word,
        "check": check,
        "case": case,
        "may_exit": may_exit,
        "seconds": timeout_s,
    }
    with tempfile.TemporaryDirectory() as folder:
        told["name"] = "program" if check else "__main__"
        (Path(folder) / "told.json").write_text(json.dumps(told))
        (Path(folder) / "program.py").write_bytes(program.encode(errors="surrogatepass"))
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-X", f"int_max_str_digits={_LONGEST_INTEGER}", "-c", _RUNNER],
                input=given.encode(errors="surrogatepass"),
                capture_output=True,
                timeout=timeout_s,
                cwd=folder,
                # numpy's threads would be processes, of which there may be none.
                env={"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
    has_ended = done.returncode == 0 and word.encode() in done.stderr
    return done.stdout.decode(errors="replace") if has_ended else None
