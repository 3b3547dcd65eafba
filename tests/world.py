"""Processes for tests, all forked from one parent that has imported what they need.

Importing torch, transformers and a room takes seconds, and forking a process that has done so takes
milliseconds. So a session of tests starts one parent, which never runs a second thread, and asks it for every
rank and every command. Each call gets new processes: nothing that one test leaves behind reaches another.

Run as a program this file is that parent. It reads one JSON object a line, from standard input, and answers
each with one:

    {"prepare": FILE}                                  imports the Python file
    {"fork": {"file":, "function":, "arguments":, …}}  the process id of a child that calls the function
    {"reap": PID}                                      the exit code of a child that has ended

When its standard input closes it kills whatever still runs, and ends.
"""

import importlib.util
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

# --- in the tests ----------------------------------------------------------------------------------------


class Forked:
    """A process that the warm parent has forked. Behaves as a `subprocess.Popen` that wrote to files."""

    def __init__(self, parent: "WarmParent", pid: int, out: Path, err: Path) -> None:
        self._parent, self.pid, self._out, self._err = parent, pid, out, err
        self._ends = os.pidfd_open(pid)
        self.returncode: int | None = None

    @property
    def out(self) -> str:
        """What it has written to standard output until now."""
        return self._out.read_text(errors="replace")  # it may be in the middle of a letter

    @property
    def err(self) -> str:
        """What it has written to standard error until now."""
        return self._err.read_text(errors="replace")

    def poll(self) -> int | None:
        return self._reap(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._reap(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"forked process {self.pid}: {self.err}", timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.out, self.err

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            signal.pidfd_send_signal(self._ends, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _reap(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ends], [], [], timeout)[0]:
            self.returncode = self._parent.ask(reap=self.pid)
            os.close(self._ends)
        return self.returncode


class WarmParent:
    """The parent of all processes of a session of tests; see the top of this file."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the parent of the tests' processes has ended"
        answer = json.loads(answer)
        assert "error" not in answer, answer["error"]
        return answer["is"]

    def new_folder(self) -> Path:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        return folder

    def fork(
        self,
        file: Path | str,
        function: str,
        arguments: Sequence[Any],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        name: str = "process",
        *,
        ends: bool = False,
    ) -> Forked:
        """A process that calls the function of the file (named from here), with arguments that JSON can hold.

        Its exit code is 0, or that of `SystemExit`, or 1 with a traceback on standard error. It just stops
        there, unless it `ends` as a program does: with what is registered for the end, and other threads
        waited for.
        """
        folder = folder or self.new_folder()
        out, err = folder / f"{name}.out", folder / f"{name}.err"
        out.touch()
        err.touch()
        asked = {
            "file": str(Path(__file__).parent / file),
            "function": function,
            "arguments": list(arguments),
            "ends": ends,
        }
        pid = self.ask(
            fork=asked | {"environment": dict(environment or {}), "out": str(out), "err": str(err)}
        )
        return Forked(self, pid, out, err)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


# --- in a rank -------------------------------------------------------------------------------------------


def be_rank(file: str, function: str, rank: int, size: int, folder: str, arguments: Any) -> None:
    """Call the function with (rank, size, arguments) in torch's default group, gloo; save what it returns.

    Then stay until all ranks have come so far: one that ends takes its connections along, also those that
    another has not quite made.
    """
    import torch
    import torch.distributed as dist

    os.environ["WORLD_FOLDER"] = folder
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    result = getattr(_module(file), function)(rank, size, arguments)
    torch.save(result, f"{folder}/{rank}.new")
    os.rename(f"{folder}/{rank}.new", f"{folder}/{rank}.pt")
    stay()


def _say_done() -> Path:
    folder = Path(os.environ["WORLD_FOLDER"])
    (folder / f"{os.environ['RANK']}.done").touch()
    return folder


def stop() -> None:
    """What a rank calls to be stopped; it is killed when all others are done."""
    _say_done()
    os.kill(os.getpid(), signal.SIGSTOP)


def stay() -> NoReturn:
    """What a rank calls to fall silent: it is there, but does nothing more until all others are done."""
    folder = _say_done()
    while not (folder / "end").exists():
        time.sleep(0.002)
    os._exit(0)


# --- in the parent ---------------------------------------------------------------------------------------

_modules: dict[str, ModuleType] = {}


def _module(file: str) -> ModuleType:
    """The Python file, imported once."""
    if file == __file__:
        return sys.modules[__name__]
    if file not in _modules:
        spec = importlib.util.spec_from_file_location(f"forked_{len(_modules)}", file)
        assert spec is not None
        assert spec.loader is not None
        _modules[file] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = _modules[file]
        spec.loader.exec_module(_modules[file])
    return _modules[file]


def _be_child(asked: Mapping[str, Any]) -> int:
    """Call the function; the exit code of the process."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, asked["out"]), (2, asked["err"])):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    os.environ |= asked["environment"]
    try:
        getattr(_module(asked["file"]), asked["function"])(*asked["arguments"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _answer(kind: str, asked: Any, children: set[int]) -> int | None:
    """Do what the tests ask for; 0 in a child."""
    if kind == "prepare":
        _module(asked)
        return None
    if kind == "reap":
        children.remove(asked)
        return os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1])
    _module(asked["file"])
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork is safe only while no other thread runs, and {len(threads)} do"
    child = os.fork()
    if child:
        children.add(child)
    return child


def _serve() -> Mapping[str, Any] | None:
    """Answer until standard input closes. In a child: what it is to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests; closing our input ends us
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    children: set[int] = set()
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as said:
        for line in lines:
            ((kind, asked),) = json.loads(line).items()
            try:
                answer = {"is": _answer(kind, asked, children)}
            except Exception:
                answer = {"error": traceback.format_exc()}
            if kind == "fork" and answer.get("is") == 0:
                return asked
            print(json.dumps(answer), file=said, flush=True)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None


def _import_what_ranks_need() -> None:
    import torch
    import torch._dynamo  # the first optimizer of a process imports it
    import torch.distributed

    torch.set_num_threads(1)


if __name__ == "__main__":
    _import_what_ranks_need()
    to_do = _serve()
    if to_do is not None:
        code = _be_child(to_do)
        sys.stdout.flush()
        sys.stderr.flush()
        if not to_do["ends"]:
            os._exit(code)  # what ends a process in an orderly way takes longer than most ranks do
        sys.exit(code)
